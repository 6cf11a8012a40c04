"""The walk of GPTQ's block feedback onto codebooks on an NVIDIA GPU, in Triton.

Rows are independent: a program owns some rows and walks the units of eight columns. What passes
from lanes of columns to lanes of rows goes through memory, behind barriers. The same in torch is
the reference: `quantkit.gptq.codebook_steps.walk_units`. Imported only where tensors are on a GPU.
"""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantkit.ggml.codebooks import UNIT
from quantkit.ggml.searches_cuda import tl, triton
from quantkit.gptq.codebook_tables import columns_of, norms_of, sizes_of
from quantkit.gptq.kernels_codebook_units_cuda import choose

if TYPE_CHECKING:
    from quantkit.gptq.codebook_steps import UnitStack

COLUMNS = 128  # at most, of one launch
ROWS, WARPS = 8, 1


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
    columns,
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
    wide: tl.constexpr,
    tile: tl.constexpr,
):
    per_unit: tl.constexpr = 8 // width
    expert = tl.program_id(1).to(tl.int64)
    weight += expert * weight_step
    entry += expert * entry_step
    signs += expert * signs_step
    upper += expert * n_columns * n_columns
    scale += expert * scale_step
    half += expert * scale_step
    group_of += expert * unit_step
    metrics += expert * unit_step * 64
    norms += expert * unit_step * per_unit * n_table
    rows = tl.program_id(0) * tile + tl.arange(0, tile)
    inside = rows < n_rows
    index = tl.arange(0, wide)
    at = index[None, :] * n_rows + rows[:, None]
    within = inside[:, None] & (index < n_columns)[None, :]
    held = tl.load(weight + at, mask=within, other=0.0)
    for unit in range(n_columns // 8):
        first = 8 * unit
        tl.debug_barrier()
        tl.store(weight + at, held, mask=within & (index // 8 == unit)[None, :])
        tl.debug_barrier()
        group = tl.load(group_of + unit) * n_rows + rows
        s = tl.load(scale + group, mask=inside, other=0.0)
        own_half = tl.load(half + group, mask=inside, other=0).to(tl.int32)
        free = s != 0
        divisor = tl.where(free, s, 1.0)
        value, target = (), ()
        for i in tl.static_range(8):
            own = tl.load(weight + (first + i) * n_rows + rows, mask=inside, other=0.0)
            value = value + (own,)
            target = target + (own / divisor,)
        level, one, two = choose(
            target,
            own_half,
            metrics + unit * 64,
            norms + unit * per_unit * n_table,
            columns,
            n_entries,
            n_table,
            width,
            sign_kind,
            n_listed,
            n_rounds,
            8,
        )
        lowest = own_half * n_entries
        place = per_unit * unit * n_rows + rows
        one = tl.where(free, one, lowest)
        tl.store(entry + place, one.to(tl.int16), mask=inside)
        if per_unit == 2:
            two = tl.where(free, two, lowest)
            tl.store(entry + place + n_rows, two.to(tl.int16), mask=inside)
        byte = tl.zeros_like(own_half)
        errors = ()
        for i in tl.static_range(8):  # the scaled errors: those of the unit by substitution
            error = value[i] - level[i] * s
            for j in tl.static_range(i):
                error -= errors[j] * tl.load(upper + (first + j) * n_columns + first + i)
            error = error / tl.load(upper + (first + i) * n_columns + first + i)
            errors = errors + (error,)
            byte += tl.where(level[i] < 0, 1 << i, 0)
        if sign_kind > 0:
            byte = tl.where(free, byte, 0)
            tl.store(signs + unit * n_rows + rows, byte.to(tl.uint8), mask=inside)
        for i in tl.static_range(8):
            line = upper + (first + i) * n_columns + index
            share = tl.load(line, mask=index < n_columns, other=0.0)
            held -= errors[i][:, None] * share[None, :]
        tl.debug_barrier()
        for i in tl.static_range(8):
            tl.store(weight + (first + i) * n_rows + rows, errors[i], mask=inside)


def feed(stack: UnitStack, upper: torch.Tensor, start: int, end: int) -> None:
    """Decide the units of at most 128 columns, start..end: their scaled errors replace them in
    `stack.weight`. Experts may be an axis in front of all tensors.
    """
    own = slice(start // UNIT, end // UNIT)
    weight, metrics = stack.weight[..., start:end, :], stack.metrics[..., own, :, :]
    entry = stack.entry[..., start // stack.book.width : end // stack.book.width, :]
    signs, group_of = stack.signs[..., own, :], stack.group_of[..., own].contiguous()
    n_rows = weight.shape[-1]
    n_experts = len(weight) if weight.dim() == 3 else 1
    _feed[(triton.cdiv(n_rows, ROWS), n_experts)](
        weight,
        upper[..., start:end, start:end].contiguous(),
        metrics.contiguous(),
        norms_of(stack.book, metrics),
        stack.scale,
        stack.half,
        group_of,
        entry,
        signs,
        columns_of(stack.book.qtype, weight.device),
        end - start,
        n_rows,
        weight.stride(0),
        entry.stride(0),
        signs.stride(0),
        stack.scale.stride(0),
        group_of.shape[-1],
        **sizes_of(stack.book),
        wide=COLUMNS,
        tile=ROWS,
        num_warps=WARPS,
    )
