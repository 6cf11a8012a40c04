"""Calibration text as documents: split by document, packed into sequences of tokens.

Three parts never share a document. *train* makes the Hessians, *heldout* judges quantizers and
drives the search, *eval* is only looked at in validation. Which part a document falls into is
decided by its own hash and the seed, so adding a source moves nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantkit.errors import QuantkitError

PARTS = {"train": 0.65, "heldout": 0.25, "eval": 0.10}


@dataclass(frozen=True)
class Domain:
    """Documents of one kind, in a fixed order, and where they come from."""

    name: str
    source: str
    documents: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of the documents joined by blank lines, as UTF-8."""
        return hashlib.sha256("\n\n".join(self.documents).encode()).hexdigest()


def split(domain: Domain, seed: int) -> dict[str, tuple[str, ...]]:
    """The documents of each part, in their own order.

    Documents are ranked by hash and dealt out by characters, so that each part has its share of
    text, and every part at least one document. Raises QuantkitError when there are fewer than three
    documents.
    """
    if len(domain.documents) < len(PARTS):
        raise QuantkitError(
            f"The calibration text {domain.source} is one piece.",
            "Give at least three documents: blank lines separate them in a .txt file.",
        )

    def rank(index: int) -> bytes:
        return hashlib.sha256(
            f"{seed}\0{domain.name}\0".encode() + domain.documents[index].encode()
        ).digest()

    ranked = sorted(range(len(domain.documents)), key=lambda i: (rank(i), i))
    n_total = sum(map(len, domain.documents))
    parts: dict[str, list[int]] = {part: [] for part in PARTS}
    # The small parts first: they take documents until they have their share, train takes the rest.
    for part in ("eval", "heldout"):
        n_taken = 0
        while (n_taken < PARTS[part] * n_total or not parts[part]) and len(ranked) > 1:
            parts[part].append(ranked.pop(0))
            n_taken += len(domain.documents[parts[part][-1]])
    parts["train"] = ranked
    return {
        part: tuple(domain.documents[i] for i in sorted(chosen)) for part, chosen in parts.items()
    }


def pack(documents: Iterable[str], tokenizer: Any, n_sequences: int, n_tokens: int) -> np.ndarray:
    """Documents as token ids, int64 (n, n_tokens) with n <= n_sequences, each row starting as a
    text would start.

    Documents follow each other with a blank line between; the tail that does not fill a row is
    dropped.
    """
    bos = tokenizer("a").input_ids[
        : len(tokenizer("a").input_ids) - len(tokenizer("a", add_special_tokens=False).input_ids)
    ]
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


def interleave(
    parts: Sequence[np.ndarray], weights: Sequence[float], n_sequences: int
) -> np.ndarray:
    """Rows of several domains in proportion to their weights, spread evenly.

    A domain that runs out leaves its share to the others. Returns int64 (n, n_tokens), n <=
    n_sequences.
    """
    taken = [0] * len(parts)
    rows: list[np.ndarray] = []
    while len(rows) < n_sequences:
        left = [i for i in range(len(parts)) if taken[i] < len(parts[i])]
        if not left:
            break
        due = min(left, key=lambda i: ((taken[i] + 1) / weights[i], i))
        rows.append(parts[due][taken[due]])
        taken[due] += 1
    width = parts[0].shape[1]
    return np.array(rows, np.int64).reshape(-1, width)
