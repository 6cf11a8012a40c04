"""Calibration text as documents: split by document, packed into sequences of tokens.

Three parts never share a document. *train* makes the Hessians, *heldout* judges quantizers and
drives the search, *eval* is only looked at in validation. Which part a document falls into is
decided by its own hash and the seed, so adding a source moves nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quantkit.config import N_CTX
from quantkit.errors import QuantkitError

EVAL_TOKENS = N_CTX + N_CTX // 8  # one window, though llama.cpp should count a few tokens less
LANGUAGE_TOKENS = 4096  # of each language beside its share: enough to validate on two windows
PARTS = {"train": 0.65, "heldout": 0.25, "eval": 0.10}
# A short text gives more to evaluation, which needs whole windows: so many characters, but not more
# than this share.
_EVAL_CHARACTERS = 4000
_EVAL_SHARE = 0.30


@dataclass(frozen=True)
class Domain:
    """Documents of one kind, in a fixed order, and where they come from. Without a `license` they
    stay on this machine.
    """

    name: str
    source: str
    documents: tuple[str, ...]
    license: str | None = None

    @property
    def sha256(self) -> str:
        """Return that of the documents joined by blank lines, as UTF-8."""
        return hashlib.sha256("\n\n".join(self.documents).encode()).hexdigest()


def up_to(limit: int, texts: Iterable[str | None]) -> Iterator[str]:
    """Yield texts until they hold `limit` characters; what is null is left out."""
    n = 0
    for text in texts:
        if text is not None:
            yield text
            n += len(text)
        if n >= limit:
            return


def without(domain: Domain, known: Container[str]) -> Domain:
    """Return the domain without documents that another one also has: they could fall into two
    parts.

    Raises QuantkitError when none is left.
    """
    kept = tuple(text for text in domain.documents if text not in known)
    if domain.documents and not kept:
        raise QuantkitError(
            f"All of the calibration text {domain.source} is also in another text.",
            "List each text only once.",
        )
    return replace(domain, documents=kept)


def split(domain: Domain, seed: int) -> dict[str, tuple[str, ...]]:
    """Return the documents of each part, in their own order.

    Documents are ranked by hash and dealt out by characters, so that each part has its share of
    text (of a short one evaluation has more), and every part at least one document. Equal documents
    stay together: what is evaluated was not calibrated on. With fewer than three different ones all
    are for training.
    """
    n_copies = Counter(domain.documents)
    if len(n_copies) < len(PARTS):
        return {"train": domain.documents} | dict.fromkeys(("heldout", "eval"), ())

    def rank(text: str) -> bytes:
        return hashlib.sha256(f"{seed}\0{domain.name}\0{text}".encode()).digest()

    left = deque(sorted(n_copies, key=rank))
    n_total = sum(map(len, domain.documents))
    part_of: dict[str, str] = {}
    # The small parts first: they take documents until they have their share and leave one for each
    # part that comes after; train takes the rest.
    n_eval = max(PARTS["eval"] * n_total, min(_EVAL_CHARACTERS, _EVAL_SHARE * n_total))
    n_heldout = PARTS["heldout"] * n_total
    for part, n_wanted, n_after in (("eval", n_eval, 2), ("heldout", n_heldout, 1)):
        n_taken = 0
        while len(left) > n_after and (not n_taken or n_taken < n_wanted):
            text = left.popleft()
            part_of[text] = part
            n_taken += len(text) * n_copies[text]
    return {
        part: tuple(text for text in domain.documents if part_of.get(text, "train") == part)
        for part in PARTS
    }


def pack(documents: Iterable[str], tokenizer: Any, n_sequences: int, n_tokens: int) -> np.ndarray:
    """Pack documents as token ids, int64 (n, n_tokens) with n <= n_sequences, each row starting as
    a text would start.

    Documents follow each other with a blank line between; the tail that does not fill a row is
    dropped.
    """
    bos = _beginning(tokenizer)
    body = n_tokens - len(bos)
    stream: list[int] = []
    rows: list[list[int]] = []
    for document in documents:
        stream += tokenizer(document + "\n\n", add_special_tokens=False, verbose=False).input_ids
        while len(stream) >= body and len(rows) < n_sequences:
            rows.append(bos + stream[:body])
            stream = stream[body:]
        if len(rows) == n_sequences:
            break
    return np.array(rows, np.int64).reshape(-1, n_tokens)


def _beginning(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts before a text, without those that it puts behind."""
    text = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    n = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), None)
    if n is None:
        raise QuantkitError(
            "The tokenizer tokenizes text differently when special tokens are added.",
            "This tokenizer is not supported yet: please open an issue with the model's id.",
        )
    return whole[:n]


def interleave(
    parts: Sequence[np.ndarray], weights: Sequence[float], n_sequences: int
) -> np.ndarray:
    """Interleave rows of several domains in proportion to their weights, spread evenly.

    A domain that runs out leaves its share to the others. Returns int64 (n, n_tokens), n <=
    n_sequences.
    """
    rows = [parts[i][row] for i, row in _order(parts, weights, n_sequences)]
    return np.array(rows, np.int64).reshape(-1, parts[0].shape[1])


def n_interleaved(
    parts: Sequence[np.ndarray], weights: Sequence[float], n_sequences: int
) -> list[int]:
    """Return how many rows of each domain `interleave` takes: its first ones."""
    taken = Counter(i for i, _ in _order(parts, weights, n_sequences))
    return [taken[i] for i in range(len(parts))]


def _order(
    parts: Sequence[np.ndarray], weights: Sequence[float], n_sequences: int
) -> Iterator[tuple[int, int]]:
    """The domain and the row of it that comes next, `n_sequences` times or until none is left."""
    taken = [0] * len(parts)
    for _ in range(min(n_sequences, sum(map(len, parts)))):
        left = [i for i in range(len(parts)) if taken[i] < len(parts[i])]
        due = min(left, key=lambda i: ((taken[i] + 1) / weights[i], i))
        yield due, taken[due]
        taken[due] += 1


def unpack(rows: np.ndarray, tokenizer: Any) -> str:
    """Return the text of rows that `pack` made, which follow each other."""
    begin = len(_beginning(tokenizer))
    return str(tokenizer.decode(rows[:, begin:].ravel().tolist()))
