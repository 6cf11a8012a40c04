"""Compare a GGUF's tokens with the original tokenizer's: the text and kind of every id, and the ids
of texts.

llama.cpp has tokenizers of its own. Where they differ from the original by design, the difference
is known here by name, found again by doing the same to the text or to the original's tokens; any
other is a fault of the file.
"""

from __future__ import annotations

import ctypes
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import llama_cpp.llama_cpp as lib

from evaluators.errors import EvaluationError
from evaluators.llama_native import LOG, because

_UNKNOWN, _UNUSED, _NORMAL, _CONTROL, _USER_DEFINED, _BYTE = (1 << i for i in range(6))  # ATTR_*
_KINDS = {
    _UNKNOWN: "unknown",
    _UNUSED: "unused",
    _NORMAL: "normal",
    _CONTROL: "control",
    _USER_DEFINED: "user-defined",
    _BYTE: "byte",
}
_OWN = _UNKNOWN | _CONTROL | _USER_DEFINED  # kinds that llama.cpp looks for in a text as a whole
_SPM = 1  # LLAMA_VOCAB_TYPE_SPM
_BYTE_TEXT = re.compile(r"<0x[0-9A-F]{2}>")
_FORMS: tuple[Literal["NFC", "NFKC", "NFD", "NFKD"], ...] = ("NFC", "NFKC", "NFD", "NFKD")
_SHOWN = 5  # differences that are told

SPACE = "llama.cpp puts a space piece before text that follows a special token"
FIRST_SPACE = "llama.cpp puts a space piece before text that begins with a space, too"
STRIPPED = "llama.cpp keeps spaces beside special tokens that the tokenizer drops"
NORMALIZED = "the tokenizer normalizes text ({0}), llama.cpp does not: such texts get other tokens"
AROUND = "llama.cpp puts other special tokens before or after a text than the tokenizer does"


@dataclass
class Findings:
    """`wrong` are faults of the file, `apart` what llama.cpp does differently by design."""

    n_vocab: int
    wrong: list[str] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)


def compare(file: str, tokenizer: Any, texts: Mapping[str, str]) -> Findings:
    """Compare a GGUF's vocabulary (its weights may be a hole) with a tokenizer of transformers.

    `texts` are tokenized by both, with special tokens in them taken as such; by name. Raises
    EvaluationError for a file that llama.cpp cannot read.
    """
    with _opened(Path(file)) as vocab:
        found = Findings(lib.llama_vocab_n_tokens(vocab), _wrong_ids(vocab, tokenizer))
        both = _Both(vocab, tokenizer)
        for name, text in texts.items():
            wanted = both.original(text)
            if both.llama(text) == wanted:
                continue
            reasons = both.explain(text, wanted)
            if reasons is None:
                found.wrong.append(_difference(name, both, text, wanted))
            else:
                found.apart += reasons
        if both.llama("a", around=True) != tokenizer.encode("a"):
            found.apart.append(AROUND)
    found.apart = list(dict.fromkeys(found.apart))
    return found


def token_ids(tokenizer: Any, text: str, is_chat: bool) -> list[int]:
    """Return the tokenizer's ids; a rendered chat has its special tokens already."""
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=not is_chat)]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    LOG.start()
    lib.llama_backend_init()
    parameters = lib.llama_model_default_params()
    parameters.vocab_only = True
    model = lib.llama_model_load_from_file(os.fsencode(path), parameters)
    if not model:
        raise EvaluationError(
            f"llama.cpp cannot read the vocabulary{because(LOG.reason())}.",
            "The tokenizer's files may be broken; download the model again.",
        )
    try:
        yield lib.llama_model_get_vocab(model)
    finally:
        lib.llama_model_free(model)


# ---- ids


def _wrong_ids(vocab: Any, tokenizer: Any) -> list[str]:
    """Ids whose text or kind is another than the tokenizer's, as sentences: the first few."""
    names = {i: text for text, i in tokenizer.get_vocab().items()}
    added = {int(i): token.content for i, token in tokenizer.added_tokens_decoder.items()}
    n = lib.llama_vocab_n_tokens(vocab)
    is_spm = lib.llama_vocab_type(vocab) == _SPM
    wrong = [f"token {i} ({names[i]!r}) is missing" for i in sorted({*names, *added}) if i >= n]
    for i in range(n):
        text = lib.llama_vocab_get_text(vocab, i).decode("utf-8", "replace")
        kind = lib.llama_vocab_get_attr(vocab, i) & (_OWN | _UNUSED | _NORMAL | _BYTE)
        if i in added:
            wanted, good = added[i], _OWN
            same = text in (wanted, wanted.replace("▁", " "))
        elif i in names:
            wanted = names[i]
            is_byte = _BYTE_TEXT.fullmatch(wanted) is not None
            # A token that the tokenizer does not look for, but could give, may be taken as a whole.
            good = _BYTE if is_spm and is_byte else _NORMAL | _BYTE | _OWN
            same = text == wanted
        else:
            wanted, good, same = "no token", _UNUSED, True
        if not same or not kind & good:
            wrong.append(f"token {i} is {text!r} ({_KINDS.get(kind, kind)}) instead of {wanted!r}")
    more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
    return wrong[:_SHOWN] + more


# ---- texts


class _Both:
    """The tokens of either side."""

    def __init__(self, vocab: Any, tokenizer: Any) -> None:
        self._vocab, self._tokenizer = vocab, tokenizer
        self._added = {
            token.content: (int(i), token) for i, token in tokenizer.added_tokens_decoder.items()
        }
        names = sorted(self._added, key=len, reverse=True)
        self._own = re.compile("|".join(map(re.escape, names))) if names else None
        self._is_spm = lib.llama_vocab_type(vocab) == _SPM

    def original(self, text: str) -> list[int]:
        """Return the tokenizer's ids, none around them."""
        return [int(i) for i in self._tokenizer.encode(text, add_special_tokens=False)]

    def llama(self, text: str, around: bool = False) -> list[int]:
        """Return llama.cpp's ids, special tokens in the text taken as such; with those around a
        text.
        """
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 16))()
        n = lib.llama_tokenize(self._vocab, data, len(data), ids, len(ids), around, True)
        return list(ids[: max(n, 0)])

    def explain(self, text: str, wanted: list[int]) -> list[str] | None:
        """Return what llama.cpp does differently by design, if that is all the difference."""
        for changed, reasons in self._equivalent(text):
            if self.original(changed) != wanted:
                continue
            found = self.llama(changed)
            if found == wanted:
                return reasons
            if self._is_spm:
                for more, extra in ((False, [SPACE]), (True, [SPACE, FIRST_SPACE])):
                    if found == self._spaced(changed, more):
                        return [*reasons, *(extra if self._has_own(changed) else extra[1:])]
        return None

    def _equivalent(self, text: str) -> Iterator[tuple[str, list[str]]]:
        """Texts that should be the same to the tokenizer, and how they differ from `text`."""
        yield text, []
        bare = self._stripped(text)
        if bare != text:
            yield bare, [STRIPPED]
        for form in _FORMS:
            for start, reasons in ((text, []), (bare, [STRIPPED])):
                normal = unicodedata.normalize(form, start)
                if normal != start:
                    yield normal, [*reasons, NORMALIZED.format(form)]

    def _has_own(self, text: str) -> bool:
        return self._own is not None and self._own.search(text) is not None

    def _stripped(self, text: str) -> str:
        """Without the spaces that added tokens swallow on their left or right."""
        for name, (_, token) in self._added.items():
            if token.lstrip:
                text = re.sub(rf"\s+(?={re.escape(name)})", "", text)
            if token.rstrip:
                text = re.sub(rf"(?<={re.escape(name)})\s+", "", text)
        return text

    def _spaced(self, text: str, even_before_spaces: bool) -> list[int]:
        """The tokenizer's ids with every piece between special tokens taken as a text's beginning;
        with one more space, where it begins with one.
        """
        ids: list[int] = []
        at = 0
        found = list(self._own.finditer(text)) if self._own is not None else []
        for match in [*found, None]:
            piece = text[at : match.start() if match else len(text)]
            if even_before_spaces and piece.startswith(" "):
                piece = f" {piece}"
            ids += self.original(piece) if piece else []
            if match:
                ids.append(self._added[match[0]][0])
                at = match.end()
        return ids


def _difference(name: str, both: _Both, text: str, wanted: Sequence[int]) -> str:
    found = both.llama(text)
    at = next(
        (i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b),
        min(len(found), len(wanted)),
    )
    return (
        f"{name}: token {at} of {len(wanted)} is {list(found[at : at + 4])} in llama.cpp,"
        f" {list(wanted[at : at + 4])} by the tokenizer"
    )
