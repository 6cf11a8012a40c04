"""Store what candidates are compared with: the full-precision model's next-token distributions, the
most likely tokens each and what is left of the probability as one more.

The KL divergence over that partition is a little below that over all tokens (by what tokens that
are left do to each other), by the same share for all candidates: dev/LOG.md, "Targets of the
search". Probabilities are stored as float16 scaled so that small ones keep their digits, and are
normalized again when read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from quantkit.machine.memory import free_memory
from quantkit.ranks.group import Ranks

MOST_TOKENS = 4096  # of a position, that are told apart
_SCALE = 4096.0  # float16 holds 6e-8 .. 65504: probabilities from 1.5e-11 up survive
_LEAST = 1e-12  # of a candidate's probability for all tokens that are left
_DEVICE_SHARE = 0.3  # of a GPU's free memory that targets may take
# On a CPU, of a few rows at a time: what is in between stays in the cache, three times as fast.
_VALUES_AT_ONCE = 1 << 18
_EXCHANGED_BYTES = 1 << 26  # at once


def target_bytes(n_rows: int, n_vocab: int) -> int:
    """Return what the distributions of so many positions take."""
    return n_rows * _row(n_vocab).itemsize


def _row(n_vocab: int) -> np.dtype[np.void]:
    """A position: tokens, and their scaled probabilities."""
    n = min(MOST_TOKENS, n_vocab)
    return np.dtype([("ids", np.int32, n), ("p", np.float16, n)])


class Targets:
    """Base distributions of `n_rows` positions over `n_vocab` tokens: on the GPU that compares with
    them where they fit there, else in a file.

    What depends on the base alone, the probability of what is left and each distribution's sum and
    entropy, is kept beside it.
    """

    def __init__(self, path: Path, n_rows: int, n_vocab: int, device: torch.device) -> None:
        self.n_vocab = n_vocab
        self._path, self._row = path, _row(n_vocab)
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None
        if _fits(target_bytes(n_rows, n_vocab), device):
            shape = (n_rows, min(MOST_TOKENS, n_vocab))
            self._table = (
                torch.zeros(shape, dtype=torch.int32, device=device),
                torch.zeros(shape, dtype=torch.float16, device=device),
            )
        else:
            path.write_bytes(b"")  # what another attempt has left must be zeros
            os.truncate(path, target_bytes(n_rows, n_vocab))
        self._left = torch.zeros(n_rows, dtype=torch.float64, device=device)
        self._totals = torch.zeros(n_rows, dtype=torch.float64, device=device)
        self._entropies = torch.zeros(n_rows, dtype=torch.float64, device=device)

    def put(self, first: int, logits: torch.Tensor) -> None:
        """Store the distributions of consecutive positions: logits (n, n_vocab), float32."""
        for own, part in self._parts(first, logits):
            p = torch.softmax(part.float(), -1)
            ids = p.topk(min(MOST_TOKENS, self.n_vocab), sorted=False).indices.sort(-1).values
            kept = p.gather(-1, ids)
            stored = (kept * _SCALE).half()
            self._write(own.start, ids.int(), stored)
            every, of_kept = (x.sum(-1, dtype=torch.float64) for x in (p, kept))
            left = (every - of_kept).clamp(min=0) * _SCALE
            if ids.shape[-1] == self.n_vocab:
                left.zero_()
            known = torch.cat((stored.double(), left[:, None]), -1)
            total = known.sum(-1)
            self._left[own], self._totals[own] = left, total
            self._entropies[own] = total.log() - torch.xlogy(known, known).sum(-1) / total

    def complete(self, ranks: Ranks) -> None:
        """Bring what other ranks have put: every position must have been put by one of them."""
        if ranks.is_alone:
            return
        # Zeros everywhere but where they were put: a sum is what was put, to the bit.
        ranks.sum([self._left, self._totals, self._entropies])
        n = max(1, _EXCHANGED_BYTES // self._row.itemsize)
        for first in range(0, len(self._totals), n):
            stored = self._read(first, min(n, len(self._totals) - first))
            # On the device also where this rank has a file: another may have a table.
            ids, p = (rows.to(self._totals.device) for rows in stored)
            ranks.sum([ids, p.view(torch.uint8)])
            self._write(first, ids, p)

    def kl(self, first: int, logits: torch.Tensor) -> torch.Tensor:
        """Return KL(base || candidate) in nats at consecutive positions: float64 (n,), on the
        logits' device, for candidate logits (n, n_vocab), float32.
        """
        return torch.cat([self._kl(own, part) for own, part in self._parts(first, logits)])

    def _kl(self, own: slice, logits: torch.Tensor) -> torch.Tensor:
        ids, p = (stored.to(logits.device) for stored in self._read(own.start, len(logits)))
        cross, share = _cross_entropy(ids, p, logits)
        left = self._left[own]
        of_left = -torch.log((1 - share).clamp(min=_LEAST))
        cross = cross + torch.where(left > 0, left * of_left, 0.0)
        return cross / self._totals[own] - self._entropies[own]

    def _parts(self, first: int, logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits of consecutive positions, and which positions those are."""
        n = len(logits) if logits.is_cuda else max(1, _VALUES_AT_ONCE // self.n_vocab)
        for i, part in enumerate(logits.split(n)):
            yield slice(first + n * i, first + n * i + len(part)), part

    # Written and read, not mapped: pages of a mapped file count as memory of the process.

    def _write(self, first: int, ids: torch.Tensor, p: torch.Tensor) -> None:
        if self._table is not None:
            for table, rows in zip(self._table, (ids, p), strict=True):
                table[first : first + len(rows)] = rows.to(table.device)
            return
        records = np.empty(len(ids), self._row)
        records["ids"], records["p"] = ids.cpu().numpy(), p.cpu().numpy()
        with self._path.open("r+b") as file:
            file.seek(first * self._row.itemsize)
            file.write(records.data)

    def _read(self, first: int, n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._table is not None:
            ids, p = (table[first : first + n_rows] for table in self._table)
            return ids, p
        offset = first * self._row.itemsize
        stored = np.fromfile(self._path, self._row, n_rows, offset=offset)
        return torch.from_numpy(stored["ids"].copy()), torch.from_numpy(stored["p"].copy())


def _cross_entropy(
    ids: torch.Tensor, p: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over tokens `ids`, int32 (n, k), of p times -log softmax(logits), and of softmax(logits)
    itself: float64 (n,) each.
    """
    if logits.is_cuda:
        from quantkit.search.kernels_cuda import cross_entropy

        return cross_entropy(ids, p, logits)
    # Logarithms first: the sum then runs over small numbers, and float32 is enough for it.
    logs = logits.gather(-1, ids.long()) - logits.logsumexp(-1, keepdim=True)
    return -torch.linalg.vecdot(p.float(), logs).double(), logs.exp().sum(-1, dtype=torch.float64)


def _fits(n_bytes: int, device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return n_bytes < _DEVICE_SHARE * free_memory(str(device))
