"""Check that the tokens of a GGUF are those of the original tokenizer.

llama.cpp and transformers run in the converter's own sandbox as soon as there is a GGUF: `plan`
checks the skeleton, a run checks `base.gguf`. A difference that is a fault ends either before the
long work. What llama.cpp does differently by design is recorded, and reported with the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

from quantkit.errors import QuantkitError
from quantkit.llamacpp import templates
from quantkit.llamacpp.converter.pretokenizer import PROBES
from quantkit.llamacpp.converter.vocabulary import original_tokenizer
from quantkit.run.check import Check
from quantkit.sandbox import untrusted
from quantkit.sandbox.outcome import plain

NAME = "tokens against the tokenizer's"
MOST_IDS = 128


@dataclass(frozen=True)
class Tokens:
    """The result of the comparison."""

    check: Check
    apart: tuple[str, ...] = ()  # what llama.cpp does differently by design; sentences
    ids: tuple[int, ...] = ()  # of a text, by the original tokenizer: to compute logits with
    text: str = ""  # what it is: the rendered chat template, or plain text

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what belongs into the log."""
        if self.check.passed:
            return tuple(f"{sentence}." for sentence in self.apart)
        return (f"{self.check.name}: {self.check.about}.",)


class Found(TypedDict):
    """The answer of `compare_in`."""

    wrong: list[str]
    apart: list[str]
    n_vocab: int
    n_texts: int
    ids: list[int]
    text: str


class NotFound(TypedDict):
    """Its answer if nothing could be compared."""

    error: str


def judged(said: Any) -> Tokens:
    """Return what an answer of `compare_in` means, which a stranger may have given. That nothing
    could be compared is a check that failed.

    Raises QuantkitError for tokens that are wrong.
    """
    try:
        found = untrusted.typed(Found | NotFound, said)
    except untrusted.Damaged:
        found = {"error": "the answer does not have the expected form"}
    if "error" in found:
        return Tokens(Check(NAME, False, f"not compared: {plain(found['error']).rstrip('.')}"))
    if found["wrong"]:
        raise QuantkitError(
            f"The tokens of the GGUF are not the tokenizer's: {plain('; '.join(found['wrong']))}.",
            "llama.cpp would tokenize text differently. The tokenizer's files may not belong"
            " together: compare them with those of its base model.",
        )
    about = f"{found['n_vocab']:,} ids and the tokens of {found['n_texts']} texts are the same"
    apart = tuple(map(plain, found["apart"]))
    ids = tuple(found["ids"][:MOST_IDS])
    check = Check(NAME, True, plain("; ".join([about, *apart])))
    return Tokens(check, apart, ids, plain(found["text"]))


def compare_in(folder: str, gguf: str) -> Found | NotFound:
    """Return what a GGUF's tokens and the tokenizer in `folder` differ in, as JSON values; for a
    sandboxed process.
    """
    from evaluators import vocabulary

    try:
        tokenizer = original_tokenizer(folder)
        chat = templates.rendered(tokenizer, templates.CONVERSATION)
        texts = {f"text {i + 1}": text for i, text in enumerate(PROBES)}
        texts |= {"rendered chat": chat["text"]} if "text" in chat else {}
        found = vocabulary.compare(gguf, tokenizer, texts)
        text = chat.get("text") or "\n".join(PROBES)
        ids = vocabulary.token_ids(tokenizer, text, is_chat="text" in chat)
    except Exception as error:  # whatever a strange tokenizer raises is a failed check
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}
    return {
        "wrong": found.wrong,
        "apart": [*found.apart, *([chat["error"].rstrip(".")] if "error" in chat else [])],
        "n_vocab": found.n_vocab,
        "n_texts": len(texts),
        "ids": ids[:MOST_IDS],
        "text": "the rendered chat template" if "text" in chat else "plain text",
    }
