"""Round to nearest as ggml does where no scale is searched for: the types of blocks of 32 and 64.

In torch, on any device, bit for bit what `quantize_row_q*_ref` of ggml-quants.c makes.
"""

from __future__ import annotations

import torch

from quantkit.ggml import e8m0
from quantkit.ggml.formats import FORMATS
from quantkit.ggml.types import QuantType


def quantize(weight: torch.Tensor, qtype: QuantType) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed rows uint8 (n_rows, row_bytes) of float32 `weight` (n_rows, n_columns) in Q4_0,
    Q4_1, Q5_0, Q5_1, Q8_0, Q2_0 or MXFP4, and the d and minimums of their blocks as they are
    stored.
    """
    form = FORMATS[qtype]
    blocks = weight.view(len(weight), -1, form.group)
    if form.dmin_at is not None:
        minimum = blocks.amin(-1, keepdim=True)
        d = (blocks.amax(-1, keepdim=True) - minimum) / form.high
        codes = ((blocks - minimum) * _inverse(d) + 0.5).trunc().clamp_max(form.high)
        halves = torch.cat([d[..., 0], minimum[..., 0]], 1)
    elif qtype.name in ("Q8_0", "Q2_0"):
        # Q2_0's largest weight becomes 1: 2 is for those who search
        d = blocks.abs().amax(-1, keepdim=True) / (form.high if qtype.name == "Q8_0" else 1)
        levels = blocks * _inverse(d)
        whole = levels.trunc()
        codes = whole + torch.where((levels - whole).abs() >= 0.5, levels.sign(), 0.0)
        halves = d[..., 0]
    elif qtype.name == "MXFP4":
        farthest = blocks.abs().amax(-1, keepdim=True)
        exponent = torch.where(farthest > 0, farthest.log2().floor() + 125, 0.0)
        d = e8m0.decode(exponent.clamp(0, 255).to(torch.uint8))
        table = torch.tensor(form.table, dtype=torch.float32, device=weight.device)
        # Of two that are as near ggml takes the first in its order: the smaller of positive ones,
        # of negative ones as well, and the positive zero.
        codes = torch.bucketize(blocks.abs() / d, (table[9:] + table[8:-1]) / 2)
        codes = torch.where((blocks < 0) & (codes > 0), 7 - codes, 8 + codes)
        halves = d[..., 0]
    else:
        farthest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        d = farthest / form.low
        codes = (blocks * _inverse(d) + (0.5 - form.low)).trunc() + form.low
        codes = codes.clamp_max(form.high)
        halves = d[..., 0]
    packed = torch.zeros(
        (len(weight), qtype.row_bytes(weight.shape[1])), dtype=torch.uint8, device=weight.device
    )
    packed = form.with_codes(packed, codes.view(weight.shape).to(torch.int8))
    return form.with_scales(packed, halves), form.storable(halves)


def _inverse(d: torch.Tensor) -> torch.Tensor:
    return torch.where(d == 0, 0.0, 1.0 / torch.where(d == 0, 1.0, d))
