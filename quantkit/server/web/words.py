"""What to do about an error, in words for who reads them.

Errors speak to whoever sits at a terminal (`QuantkitError.remedy`). A visitor of the page and a
caller of the API have none: an option is a field or an argument there, a token is given in other
ways, and what only the host can do is left out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

from quantkit.errors import NeedsToken, QuantkitError
from quantkit.server.runs.record import NoSuchRun
from quantkit.server.runs.view import RunView

# What the form and the API have for an option of the command line.
FIELDS = {
    **{"like": "Type", "size": "File size", "bpw": "Bits per weight", "family": "Sizes"},
    **{"fits": "Other memory", "levels": "Levels", "types": "Pinned types", "methods": "Methods"},
    **{"profile": "Quality", "calibration": "Calibration text", "revision": "Revision"},
    **{"seed": "Seed", "device": "Device", "compare": "Compare with"},
    "equalize": "Equalize channels",
}
ARGUMENTS = {
    **{name: name for name in ("like", "size", "bpw", "family", "levels", "profile", "seed")},
    **{name: name for name in ("calibration", "revision", "compare")},
    "fits": "memory",
}
_HOST = "Whoever runs this server can mend it."

_OPTION = re.compile(r"(?<![\w-])--([a-z]+)(?![\w-])")
# What only somebody at a terminal of the machine can type or set.
TERMINAL = re.compile(
    r"(?<![\w-])--[a-z]|\b(?:HF|QUANTKIT|GRADIO)_[A-Z_]+|`(?:hf|quantkit|make|pip|python) |hf auth"
    r"|pip install|make install|deploy\.py|local folder"
)
_ASIDE = re.compile(rf" \([^()]*(?:{TERMINAL.pattern})[^()]*\)")
_SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+(?=[A-Z“])")


@dataclass(frozen=True)
class Audience:
    """Who reads what went wrong."""

    fields: Mapping[str, str]  # what an option is called here
    token: str  # how a token is given
    is_host: bool  # whether the machine is the reader's own
    runs: str = ""  # how a run is found; empty as on the page

    def remedy(self, error: QuantkitError) -> str:
        """Return what the reader can do about an error."""
        if isinstance(error, NeedsToken):
            return self.give_token(error.step)
        found = self.runs if isinstance(error, NoSuchRun) else ""
        return found or self.words(error.remedy)

    def give_token(self, step: str) -> str:
        """Return how a token is given, after a `step` on the Hub."""
        return f"{step} {self.token}".strip()

    def run_of(self, run: RunView) -> RunView:
        """Return a run with the remedy of what it failed of in the reader's words."""
        step = run.token_step
        remedy = self.words(run.remedy) if step is None else self.give_token(step)
        return dataclasses.replace(run, remedy=remedy)

    def words(self, remedy: str) -> str:
        """Return the remedy of a terminal for the reader."""
        named = _OPTION.sub(lambda found: self.fields.get(found[1], found[0]), remedy)
        if self.is_host or not named:
            return named
        sentences = _SENTENCE_ENDS.split(_ASIDE.sub("", named))
        kept = filter(None, map(_without_terminal, sentences))
        return " ".join(kept) or _HOST


def _without_terminal(sentence: str) -> str:
    """The sentence without the alternatives that need a terminal; empty when nothing else is."""
    if not TERMINAL.search(sentence):
        return sentence
    head, _, last = sentence.rstrip(".").rpartition(", or ")
    kept = [part for part in (*head.split(", "), last) if part and not TERMINAL.search(part)]
    if not kept:
        return ""
    *more, end = kept
    text = f"{', '.join(more)} or {end}" if more else end
    return f"{text[0].upper()}{text[1:]}."


def of_page(sign_in: bool, public: bool) -> Audience:
    """Return the visitors of the page."""
    how = (
        "Sign in above with an account that has access."
        if sign_in
        else "Enter a token of an account that has access."
    )
    fields = {option: f"“{label}”" for option, label in FIELDS.items()}
    return Audience(fields, how, not public)


def of_api(public: bool) -> Audience:
    """Return the callers of the API, agents among them."""
    how = "Send a Hub token that has access in the header Authorization, after Bearer."
    return Audience(ARGUMENTS, how, not public, "list_jobs names yours.")
