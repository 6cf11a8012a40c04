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
    """Base distributions of `n_rows` positions over `n_vocab` tokens, in a memory-mapped file."""

    def __init__(self, path: Path, n_rows: int, n_vocab: int, write: bool) -> None:
        self._table = np.memmap(path, np.float16, "w+" if write else "r", shape=(n_rows, n_vocab))

    def put(self, first: int, logits: torch.Tensor) -> None:
        """Store the distributions of consecutive positions: logits (n, n_vocab), float32."""
        p = torch.softmax(logits.float(), -1) * _SCALE
        self._table[first : first + len(p)] = p.half().cpu().numpy()

    def flush(self) -> None:
        self._table.flush()

    def kl(self, first: int, logits: torch.Tensor) -> torch.Tensor:
        """KL(base || candidate) in nats at consecutive positions: float64 (n,) for candidate logits
        (n, n_vocab).
        """
        rows = np.ascontiguousarray(self._table[first : first + len(logits)])
        p = torch.from_numpy(rows).to(logits.device).float()
        return kl_divergence(p, logits)


def kl_divergence(weights: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(p || softmax(logits)) per row, p being `weights` normalized: float64 (n,). Shapes (n,
    n_vocab), float32.
    """
    total = weights.sum(-1, dtype=torch.float64)
    cross = (
        torch.logsumexp(logits.float(), -1).double()
        - (weights * logits).sum(-1, dtype=torch.float64) / total
    )
    entropy = total.log() - torch.xlogy(weights, weights).sum(-1, dtype=torch.float64) / total
    return cross - entropy
