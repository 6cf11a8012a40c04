"""The error type that users see."""

from __future__ import annotations

import json
from collections.abc import Iterator


class QuantkitError(Exception):
    """Something a user can act on: what happened (`message`) and what to do about it (`remedy`).

    Both are plain sentences. The command line prints them and exits with 1; a run writes them to
    its last event.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message} {remedy}".strip())
        self.message = message
        self.remedy = remedy


class NeedsToken(QuantkitError):
    """Only a token, or one of another account, helps. `step` is what has to be done on the Hub
    before. The remedy speaks to whoever sits at a terminal; a page asks for the token itself.
    """

    def __init__(
        self,
        message: str,
        step: str = "",
        ask: str = "Set HF_TOKEN or run `hf auth login`.",
    ) -> None:
        super().__init__(message, f"{step} {ask}".strip())
        self.step = step


class UsageError(QuantkitError):
    """The command or form was filled in wrongly and nothing was started: exit status 2."""


def printable(text: str, kept: str = "\n\t") -> str:
    """Return text for a terminal or a log: names and licenses are strangers' words, so what could
    control a terminal, or cannot be encoded, is shown as JSON writes it. Characters in `kept` stay.
    """
    return "".join(
        letter if letter.isprintable() or letter in kept else json.dumps(letter)[1:-1]
        for letter in text
    )


def check_writable_name(name: str) -> None:
    """Raise UsageError for a name that no record could hold: bytes that are no UTF-8, or what could
    steer a terminal.
    """
    if not name.isprintable():
        raise UsageError(
            f"The name {printable(name, '')} has characters that cannot be shown.",
            "Give the file or the folder another name.",
        )


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes: libraries wrap the one that says what happened in others."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
