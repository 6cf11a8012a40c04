"""What the GPU's kernels for codebooks are handed of a codebook, and the norms of its entries."""

from __future__ import annotations

from functools import cache

import torch

from quantkit.ggml.codebooks import CODEBOOKS, Codebook
from quantkit.ggml.types import QuantType
from quantkit.gptq.codebook_units import N_LISTED, N_ROUNDS


@cache
def table_of(qtype: QuantType, device: torch.device) -> torch.Tensor:
    """Return the table, float16 (n_table, width): all of its values are float16."""
    return torch.from_numpy(CODEBOOKS[qtype].entries).to(device, torch.float16)


@cache
def multipliers_of(qtype: QuantType, device: torch.device) -> torch.Tensor:
    """Return what integers stand for, float32 (n_integers,)."""
    return torch.tensor(CODEBOOKS[qtype].multipliers, device=device)


def norms_of(book: Codebook, metrics: torch.Tensor) -> torch.Tensor:
    """Return Σ m e² of every entry by the diagonals of metrics, float32 (..., 8, 8) -> (..., 8 /
    width, n_table).
    """
    own = metrics.diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, book.width))
    return own @ table_of(book.qtype, metrics.device).T.float().square()


def sizes_of(book: Codebook) -> dict[str, int]:
    """Return what the kernels know of a codebook when they are compiled."""
    n_table = len(book.entries)
    return {
        "n_entries": n_table // 2 if book.halves else n_table,
        "n_table": n_table,
        "width": book.width,
        "sign_kind": book.sign_kind,
        "n_listed": N_LISTED[book.width],
        "n_rounds": N_ROUNDS,
    }
