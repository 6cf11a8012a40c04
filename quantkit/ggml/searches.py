"""Search scales under importances for the types for which ggml searches none.

ggml rounds to Q2_0 and MXFP4 by the largest weight of a block, whatever the importances: Q2_0's
code 2 is never used, and most weights become zero. In torch, on any device.
"""

from __future__ import annotations

import torch

from quantkit.errors import QuantkitError
from quantkit.ggml import e8m0
from quantkit.ggml.formats import FORMATS, Format, levels_of
from quantkit.ggml.types import QuantType

SEARCHED = (QuantType("Q2_0"), QuantType("MXFP4"))
_AT_ONCE = 1 << 22  # weights: a candidate takes several times their size
_REACHES = tuple(0.8 + 0.1 * i for i in range(23))  # the largest weight of a block, in d
_STEPS = (-1, 0, 1)  # from ggml's exponent


def quantize(
    weight: torch.Tensor, qtype: QuantType, importance: torch.Tensor | None
) -> torch.Tensor:
    """Return packed rows uint8 (n_rows, row_bytes) of float32 `weight` (n_rows, n_columns) in a
    type of `SEARCHED`: of every block the scale with the least sum of squares under `importance`,
    float32 (n_columns,), or (n_experts, n_columns) for as many rows of each expert.

    Raises QuantkitError when weights are NaN, infinite, or too large for the scales.
    """
    form = FORMATS[qtype]
    n_rows, n_columns = weight.shape
    if importance is None:
        importance = torch.ones(n_columns, device=weight.device)
    shares = importance.view(-1, n_columns)
    step = max(1, min(_AT_ONCE // n_columns, n_rows // len(shares)))
    packed = torch.empty(
        (n_rows, qtype.row_bytes(n_columns)), dtype=torch.uint8, device=weight.device
    )
    for expert, own in enumerate(weight.chunk(len(shares))):
        start = expert * len(own)
        for first in range(0, len(own), step):
            rows = own[first : first + step]
            packed[start + first : start + first + len(rows)] = _rows(form, rows, shares[expert])
    finite = torch.isfinite(form.scales(packed)).all() & torch.isfinite(weight).all()
    if not bool(finite):
        raise QuantkitError(
            f"Quantizing to {qtype} gave invalid blocks.",
            "The weights hold NaN or infinite values, or are too large for its scales.",
        )
    return packed


def _rows(form: Format, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    blocks = weight.reshape(len(weight), -1, form.group)
    shares = importance.view(-1, form.group)
    best = torch.full_like(blocks[..., 0], torch.inf)
    d = torch.zeros_like(best)
    for candidate in _candidates(form, blocks):
        fitted = form.storable(_fitted(form, blocks, shares, candidate))
        error = _left(form, blocks, fitted).square().mul_(shares).sum(-1)
        better = error < best
        best, d = torch.where(better, error, best), torch.where(better, fitted, d)
    codes = form.nearest(_levels(blocks, d))
    shape = len(weight), form.qtype.row_bytes(weight.shape[1])
    packed = torch.zeros(shape, dtype=torch.uint8, device=weight.device)
    packed = form.with_codes(packed, codes.to(torch.int16).view(weight.shape))
    return form.with_scales(packed, d)


def _candidates(form: Format, blocks: torch.Tensor) -> list[torch.Tensor]:
    """Scales to start from, (n_rows, n_blocks) each; a block of zeros has the scale zero."""
    largest = blocks.abs().amax(-1)
    if not form.scale_is_power:
        return [sign * largest / reach for reach in _REACHES for sign in (1, -1)]
    middle = e8m0.nearest(largest / 8)
    return [torch.where(largest > 0, middle * 2.0**step, 0.0) for step in _STEPS]


def _fitted(
    form: Format, blocks: torch.Tensor, shares: torch.Tensor, d: torch.Tensor
) -> torch.Tensor:
    """The scale of least squares for the codes that are nearest at `d`, if it can be chosen."""
    if form.scale_is_power:
        return d
    levels = levels_of(form.nearest(_levels(blocks, d)), form.table)
    weighted = levels * shares
    power = (weighted * levels).sum(-1)
    return torch.where(power > 0, (weighted * blocks).sum(-1) / power.clamp_min(1e-38), d)


def _left(form: Format, blocks: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    codes = form.nearest(_levels(blocks, d))
    return levels_of(codes, form.table) * d[..., None] - blocks


def _levels(blocks: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    return blocks / torch.where(d == 0, 1.0, d)[..., None]
