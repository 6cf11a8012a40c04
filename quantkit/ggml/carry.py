"""Put integers times scales, as other quantizers made them, onto the grids of GGUF's types.

Nothing is rounded where a type has room for the codes and its scales hold the source's: then the
values are equal to the bit. A pure function of tensors, on any device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.ggml.formats import FORMATS, Format
from quantkit.ggml.types import QuantType

WIDTH = 32  # columns that must have one scale: no type has blocks of fewer
# Smallest first. Tables hold no grid of equal steps.
TYPES = tuple(sorted(q for q, form in FORMATS.items() if form.table is None))


@dataclass(frozen=True)
class Carried:
    """Rows of integers in a type: uint8 (n_rows, row_bytes), how many weights are equal to the
    source's to the bit, and the squares of what the others are off and of all weights.
    """

    packed: torch.Tensor
    n_equal: int
    off: float
    power: float


def has_room(codes: torch.Tensor, scale: torch.Tensor, qtype: QuantType) -> bool:
    """Return whether a type has a code for each of `codes`, and a block for each scale; arguments
    are those of `carry`.
    """
    if codes.shape[1] % qtype.block_size:
        return False
    form = FORMATS[qtype]
    blocks = codes.view(len(codes), -1, form.group)
    low, high = blocks.amin(-1), blocks.amax(-1)
    if form.dmin_at is not None:
        fits = bool((high - low <= form.high - form.low).all())
        limit = form.minimum_range
        if limit is not None:
            lift = (-low).clamp_min(0)
            fits &= bool(((lift <= limit[1]) & (high + lift <= form.high)).all())
    elif form.scale_range is not None:
        fits = bool((low >= form.low).all() & (high <= form.high).all())
    else:
        turned = _is_within(form, -high, -low)
        fits = bool((_is_within(form, low, high) | turned).all())
    n = qtype.block_size // WIDTH
    per_block = scale.view(len(scale), -1, n)
    return fits and bool((per_block == per_block[..., :1]).all())


def carry(codes: torch.Tensor, scale: torch.Tensor, qtype: QuantType) -> Carried:
    """Return integers `codes`, int16 (n_rows, n_columns), times `scale`, float32 (n_rows, n_columns
    / 32), in a type that `has_room`.
    """
    form = FORMATS[qtype]
    n_rows, n_columns = codes.shape
    d = scale[:, :: qtype.block_size // WIDTH]
    packed = torch.zeros(
        (n_rows, qtype.row_bytes(n_columns)), dtype=torch.uint8, device=codes.device
    )
    blocks = codes.view(n_rows, -1, form.group)
    if form.scale_range is not None:
        packed, stored = _onto_integers(form, packed, blocks, d)
    elif form.dmin_at is not None:
        packed, stored = _onto_minimum(form, packed, blocks, d)
    else:
        packed, stored = _onto_scale(form, packed, blocks, d)
    packed = form.with_codes(packed, stored.reshape(n_rows, n_columns))
    wanted = codes.float() * scale.repeat_interleave(WIDTH, 1)
    difference = form.values(packed) - wanted
    n_equal = int((difference == 0).sum())
    off, power = (float(x.double().square().sum()) for x in (difference, wanted))
    return Carried(packed, n_equal, off, power)


def _is_within(form: Format, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Whether codes of a range can be stored: in Q8_0 also the -128 that ggml leaves unused."""
    least = -128 if form.qtype.name == "Q8_0" else form.low
    return (low >= least) & (high <= form.high)


def _onto_scale(
    form: Format, packed: torch.Tensor, blocks: torch.Tensor, d: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """With d alone, which is negative where the codes fit only the other way round."""
    turned = ~_is_within(form, blocks.amin(-1), blocks.amax(-1))
    stored = torch.where(turned[..., None], -blocks, blocks)
    return form.with_scales(packed, torch.where(turned, -d, d)), stored


def _onto_minimum(
    form: Format, packed: torch.Tensor, blocks: torch.Tensor, d: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """With a minimum of its own, float16: of the whole steps that leave room for all codes, the
    one that is stored best.
    """
    low, high = blocks.amin(-1), blocks.amax(-1)
    best = torch.full_like(d, torch.inf)
    floor = torch.zeros_like(low)
    for k in range(int((high - form.high).min()), int(low.max()) + 1):
        minimum = k * d
        off = (form.storable(minimum) - minimum).abs()
        better = (high - form.high <= k) & (k <= low) & (off < best)
        best, floor = torch.where(better, off, best), torch.where(better, k, floor)
    return form.with_scales(packed, torch.cat([d, floor * d], 1)), blocks - floor[..., None]


def _onto_integers(
    form: Format, packed: torch.Tensor, blocks: torch.Tensor, d: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """With integers beside d: a scale of one step, and a minimum of whole steps."""
    n_rows, n_groups, _ = blocks.shape
    lift = torch.zeros((n_rows, n_groups), dtype=blocks.dtype, device=blocks.device)
    halves = d
    if form.minimum_range is not None:
        lift = (-blocks.amin(-1)).clamp_min(0)
        halves = torch.cat([d, d], 1)
    packed = form.with_multipliers(packed, torch.ones_like(lift), lift)
    return form.with_scales(packed, halves), blocks + lift[..., None]
