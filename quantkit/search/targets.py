"""Store what candidates are compared with: the full-precision model's next-token distributions, in
16 bits.

Probabilities are stored as float16 scaled so that small ones keep their digits, and are normalized
again when read: the KL divergence is then exact to a distribution within a few parts in ten
thousand of the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from quantkit.machine.memory import free_memory

_SCALE = 4096.0  # float16 holds 6e-8 .. 65504: probabilities from 1.5e-11 up survive
_DEVICE_SHARE = 0.3  # of a GPU's free memory that targets may take
# On a CPU, of a few rows at a time: what is in between stays in the cache, three times as fast.
_VALUES_AT_ONCE = 1 << 18


class Targets:
    """Base distributions of `n_rows` positions over `n_vocab` tokens: on the GPU that compares with
    them where they fit there, else in a file.

    What depends on the base alone, each distribution's sum and entropy, is kept beside it.
    """

    def __init__(self, path: Path, n_rows: int, n_vocab: int, device: torch.device) -> None:
        self.n_vocab = n_vocab
        self._path = path
        self._table: torch.Tensor | None = None
        if _fits(n_rows * n_vocab * 2, device):
            self._table = torch.empty((n_rows, n_vocab), dtype=torch.float16, device=device)
        else:
            path.touch()
        self._totals = torch.zeros(n_rows, dtype=torch.float64, device=device)
        self._entropies = torch.zeros(n_rows, dtype=torch.float64, device=device)

    def put(self, first: int, logits: torch.Tensor) -> None:
        """Store the distributions of consecutive positions: logits (n, n_vocab), float32."""
        for own, part in self._parts(first, logits):
            stored = (torch.softmax(part.float(), -1) * _SCALE).half()
            self._write(own.start, stored)
            p = stored.float()
            total = p.sum(-1, dtype=torch.float64)
            of_logs = torch.xlogy(p, p).sum(-1, dtype=torch.float64)
            self._totals[own] = total
            self._entropies[own] = total.log() - of_logs / total

    def kl(self, first: int, logits: torch.Tensor) -> torch.Tensor:
        """Return KL(base || candidate) in nats at consecutive positions: float64 (n,), on the
        logits' device, for candidate logits (n, n_vocab), float32.
        """
        parts = [
            _cross_entropy(self._read(own.start, len(part)).to(part.device), part)
            / self._totals[own]
            - self._entropies[own]
            for own, part in self._parts(first, logits)
        ]
        return torch.cat(parts)

    def _parts(self, first: int, logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits of consecutive positions, and which positions those are."""
        n = len(logits) if logits.is_cuda else max(1, _VALUES_AT_ONCE // self.n_vocab)
        for i, part in enumerate(logits.split(n)):
            yield slice(first + n * i, first + n * i + len(part)), part

    # Written and read, not mapped: pages of a mapped file count as memory of the process.

    def _write(self, first: int, rows: torch.Tensor) -> None:
        if self._table is not None:
            self._table[first : first + len(rows)] = rows.to(self._table.device)
            return
        with self._path.open("r+b") as file:
            file.seek(2 * first * self.n_vocab)
            file.write(rows.cpu().numpy().data)

    def _read(self, first: int, n_rows: int) -> torch.Tensor:
        if self._table is not None:
            return self._table[first : first + n_rows]
        offset = 2 * first * self.n_vocab
        stored = np.fromfile(self._path, np.float16, n_rows * self.n_vocab, offset=offset)
        return torch.from_numpy(stored).view(n_rows, -1)


def _cross_entropy(p: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Sums over the vocabulary of p times -log softmax(logits), float64 (n,)."""
    if logits.is_cuda:
        from quantkit.search.kernels_cuda import cross_entropy

        return cross_entropy(p, logits)
    # Logarithms first: the sum then runs over small numbers, and float32 is enough for it.
    return -torch.linalg.vecdot(p.float(), torch.log_softmax(logits, -1)).double()


def _fits(n_bytes: int, device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return n_bytes < _DEVICE_SHARE * free_memory(str(device))
