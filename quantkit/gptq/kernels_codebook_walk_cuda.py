"""The walk of GPTQ's block feedback onto codebooks on an NVIDIA GPU, in Triton.

Rows are independent: a program of one warp owns one row and walks its units of eight columns. The
same in torch is the reference: `quantkit.gptq.codebook_steps.walk_units`. Imported only where
tensors are on a GPU.
"""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantkit.ggml.codebooks import UNIT
from quantkit.ggml.searches_cuda import tl, triton
from quantkit.gptq.codebook_tables import norms_of, sizes_of, table_of
from quantkit.gptq.kernels_codebook_units_cuda import choose, lane, lines_of

if TYPE_CHECKING:
    from quantkit.gptq.codebook_steps import UnitStack

UNITS = 16  # at most, of one launch
REGISTERS = 128  # of a lane at most


# One binary for all shapes: it is seconds until it is compiled.
_NUMBERS = [
    "n_columns",
    "n_rows",
    "weight_step",
    "entry_step",
    "signs_step",
    "scale_step",
    "unit_step",
]


@triton.jit(do_not_specialize=_NUMBERS)
def _feed(  # type: ignore[no-untyped-def]
    weight,
    upper,
    metrics,
    norms,
    scale,
    half,
    group_of,
    entry,
    signs,
    table,
    n_columns,
    n_rows,
    weight_step,
    entry_step,
    signs_step,
    scale_step,
    unit_step,
    n_entries: tl.constexpr,
    n_table: tl.constexpr,
    width: tl.constexpr,
    sign_kind: tl.constexpr,
    n_listed: tl.constexpr,
    n_rounds: tl.constexpr,
    n_units: tl.constexpr,
):
    per_unit: tl.constexpr = 8 // width
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0)
    weight += expert * weight_step + row
    entry += expert * entry_step + row
    signs += expert * signs_step + row
    upper += expert * n_columns * n_columns
    scale += expert * scale_step + row
    half += expert * scale_step + row
    group_of += expert * unit_step
    metrics += expert * unit_step * 64
    norms += expert * unit_step * per_unit * n_table
    i = tl.arange(0, 8)[None, :]
    unit_at = tl.arange(0, n_units)[:, None]
    place = 8 * unit_at + i
    within = place < n_columns
    held = tl.load(weight + place * n_rows, mask=within, other=0.0)
    for unit in range(n_columns // 8):
        first = 8 * unit
        group = tl.load(group_of + unit) * n_rows
        s = tl.load(scale + group)
        own_half = tl.load(half + group).to(tl.int32)
        value = tl.sum(tl.where(unit_at == unit, held, 0.0), 0)[None, :]
        error = value
        found = tl.zeros_like(i) + own_half * n_entries
        byte = 0
        if s != 0:
            levels, found = choose(
                value / s,
                own_half,
                lines_of(metrics + unit * 64, 8),
                tl.load(metrics + unit * 64 + 9 * i),
                norms + unit * per_unit * n_table,
                table,
                n_entries,
                n_table,
                width,
                sign_kind,
                n_listed,
                n_rounds,
            )
            error = value - levels * s
            byte = tl.sum(tl.sum(tl.where(levels < 0, 1 << i, 0), 1), 0)
        tl.store(entry + (first + i) // width * n_rows, found.to(tl.int16), mask=i % width == 0)
        if sign_kind > 0:
            tl.store(signs + unit * n_rows, tl.cast(byte, tl.uint8))
        own = upper + first * (n_columns + 1)
        for j in tl.static_range(8):  # the scaled errors: those of the unit by substitution
            line = tl.load(own + j * n_columns + i)
            scaled = lane(error / line, j)
            error = tl.where(i == j, scaled, error - tl.where(i > j, scaled * line, 0.0))
        tl.store(weight + (first + i) * n_rows, error)
        error += tl.zeros(place.shape, tl.float32)
        later = within & (unit_at > unit)
        for j in tl.static_range(8):
            line = upper + (first + j) * n_columns + place
            held -= lane(error, j) * tl.load(line, mask=later, other=0.0)


def feed(
    stack: UnitStack, upper: torch.Tensor, start: int, end: int, *, only_compile: bool = False
) -> None:
    """Decide the units of at most 128 columns, start..end: their scaled errors replace them in
    `stack.weight`. Experts may be an axis in front of all tensors. To compile only changes nothing.
    """
    own = slice(start // UNIT, end // UNIT)
    weight, metrics = stack.weight[..., start:end, :], stack.metrics[..., own, :, :]
    entry = stack.entry[..., start // stack.book.width : end // stack.book.width, :]
    signs, group_of = stack.signs[..., own, :], stack.group_of[..., own].contiguous()
    n_rows = weight.shape[-1]
    n_experts = len(weight) if weight.dim() == 3 else 1
    _feed.run(
        weight,
        upper[..., start:end, start:end].contiguous(),
        metrics.contiguous(),
        norms_of(stack.book, metrics),
        stack.scale,
        stack.half,
        group_of,
        entry,
        signs,
        table_of(stack.book.qtype, weight.device),
        end - start,
        n_rows,
        weight.stride(0),
        entry.stride(0),
        signs.stride(0),
        stack.scale.stride(0),
        group_of.shape[-1],
        **sizes_of(stack.book),
        n_units=UNITS,
        num_warps=1,
        maxnreg=REGISTERS,
        grid=(n_rows, n_experts),
        warmup=only_compile,
    )
