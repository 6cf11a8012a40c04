"""What candidates are compared with: the full-precision model's next-token distributions, kept in
16 bits.

Probabilities are stored as float16 scaled so that small ones keep their digits, and are normalized
again when read: the KL divergence is then exact to a distribution within a few parts in ten
thousand of the model's own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

_SCALE = 4096.0  # float16 holds 6e-8 .. 65504: probabilities from 1.5e-11 up survive


class Targets:
    """Base distributions of `n_rows` positions over `n_vocab` tokens, in a memory-mapped file.

    What depends on the base alone, each distribution's sum and entropy, is kept beside it.
    """

    def __init__(self, path: Path, n_rows: int, n_vocab: int) -> None:
        self._table = np.memmap(path, np.float16, "w+", shape=(n_rows, n_vocab))
        self._totals = torch.zeros(n_rows, dtype=torch.float64)
        self._entropies = torch.zeros(n_rows, dtype=torch.float64)

    def put(self, first: int, logits: torch.Tensor) -> None:
        """Store the distributions of consecutive positions: logits (n, n_vocab), float32."""
        stored = (torch.softmax(logits.float(), -1) * _SCALE).half().cpu()
        own = slice(first, first + len(stored))
        self._table[own] = stored.numpy()
        p = stored.float()
        total = p.sum(-1, dtype=torch.float64)
        self._totals[own] = total
        self._entropies[own] = total.log() - torch.xlogy(p, p).sum(-1, dtype=torch.float64) / total

    def kl(self, first: int, logits: torch.Tensor) -> torch.Tensor:
        """KL(base || candidate) in nats at consecutive positions: float64 (n,) for candidate logits
        (n, n_vocab), float32.
        """
        own = slice(first, first + len(logits))
        rows = torch.from_numpy(np.ascontiguousarray(self._table[own]))
        p = rows.to(logits.device).float()
        # Logarithms first: the sum then runs over small numbers, and float32 is enough for it.
        log_q = torch.log_softmax(logits, -1)
        cross = -torch.linalg.vecdot(p, log_q).double().cpu() / self._totals[own]
        return cross - self._entropies[own]
