"""Coordinate descent over everything that a packed row stores: codes, group scales, block scales.

GPTQ decides a column without knowing what later columns will round to, and never touches the scales
that ggml chose without looking at the Hessian's off-diagonal. Here every stored number of a row
gets another look while all others stay: the codes of a block one by one, then the integer scale and
minimum of each of its groups (K-quants), then its d and dmin together. Each step moves to
the best storable value, so tr(E H Eᵀ) never rises; sizes never change.

What is kept up to date is the gradient E H of every row. Inside a block every step reaches only the
block; the rest follows in one matrix product per block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from quantkit.ggml.decode import Readable
from quantkit.ggml.formats import Format, levels_of
from quantkit.gptq import kernels_cpu
from quantkit.gptq.products import add_product, product
from quantkit.gptq.solver import output_error

N_SWEEPS = 4  # dev/LOG.md: what each sweep is worth
_WINDOW = 128  # columns whose changes reach all others in one product, on a CPU
_REACH = 1024  # columns whose changes reach all others in one product, on a GPU


@dataclass(frozen=True)
class RowState:
    """Packed rows taken apart; steps change the tensors in place.

    Shapes: codes int8 (n_rows, n_columns); `d`, `dmin` float32 (n_rows, n_blocks), dmin without
    columns where the format has none; `scale`, `minimum` float32 (n_rows, n_groups), the integers
    that d and dmin are multiplied with; gradient E H float32 (n_rows, n_columns).
    """

    form: Format
    codes: torch.Tensor
    d: torch.Tensor
    dmin: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor
    gradient: torch.Tensor


@dataclass(frozen=True)
class Block:
    """Where a block lies in a row, and its own part of the Hessian, float32 (width, width)."""

    index: int
    columns: slice
    groups: slice
    hessian: torch.Tensor


Step = Callable[[RowState, Block], torch.Tensor]
"""Descends on one block of the state, in place; returns what that added to the values, float32
(n_rows, width). The state's gradient is left to the caller.
"""


def descend(
    form: Format,
    packed: torch.Tensor,
    weight: torch.Tensor,
    hessian: torch.Tensor,
    n_sweeps: int = N_SWEEPS,
    step: Step | None = None,
) -> torch.Tensor:
    """Return packed rows uint8 (n_rows, row_bytes) after `n_sweeps` of descent on tr(E H Eᵀ).

    `weight` is float32 (n_rows, n_columns), `hessian` float32 (n, n), or (n_experts, n, n) for as
    many rows of each expert, one expert after the other. `step` replaces the device's fastest block
    step, for tests.
    """
    if hessian.dim() == 3 and not packed.is_cuda:
        parts = zip(packed.chunk(len(hessian)), weight.chunk(len(hessian)), hessian, strict=True)
        return torch.cat([descend(form, p, w, h, n_sweeps, step) for p, w, h in parts])
    state = take_apart(form, packed, weight, hessian)
    sweep = _SWEEPS.get(packed.device.type) if step is None else None
    if sweep is not None:
        sweep(state, hessian, n_sweeps)
        return put_together(state, packed)
    step = step or step_block
    width = form.qtype.block_size
    per_block = width // form.group
    for _ in range(n_sweeps):
        for index in range(state.d.shape[1]):
            columns = slice(index * width, (index + 1) * width)
            groups = slice(index * per_block, (index + 1) * per_block)
            own = hessian[columns, columns].contiguous()
            change = step(state, Block(index, columns, groups, own))
            add_product(state.gradient, change, hessian[columns])
    return put_together(state, packed)


def take_apart(
    form: Format, packed: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor
) -> RowState:
    """Take packed rows apart into the numbers that they store, with the gradient of their error."""
    n_rows = len(packed)
    codes = form.codes(packed).to(torch.int8)
    scales = form.scales(packed)
    n_blocks = form.blocks(packed).shape[1]
    scale, minimum = (x.reshape(n_rows, -1).clone() for x in form.multipliers(form.blocks(packed)))
    gradient = per_expert(form.grid(packed).values(codes) - weight, hessian)
    gradient = product(gradient, hessian).view(n_rows, -1)
    d, dmin = scales[:, :n_blocks].clone(), scales[:, n_blocks:].clone()
    return RowState(form, codes, d, dmin, scale, minimum, gradient)


def per_expert(rows: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """View rows (n_rows, n_columns) with the axes that a batch of Hessians has."""
    return rows if hessian.dim() == 2 else rows.view(len(hessian), -1, rows.shape[-1])


def put_together(state: RowState, packed: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a state; `packed` gives their layout."""
    form = state.form
    out = form.with_codes(packed, state.codes)
    if form.scale_range is not None:
        out = form.with_multipliers(out, state.scale, state.minimum)
    return form.with_scales(out, torch.cat([state.d, state.dmin], 1))


def step_block(state: RowState, block: Block) -> torch.Tensor:
    """Step one block in torch, all rows at once: the reference, and the fallback for devices
    without a kernel.
    """
    gradient = state.gradient[:, block.columns].clone()
    change = torch.zeros_like(gradient)
    _move_codes(state, block, gradient, change)
    if state.form.scale_range is not None:
        _move_integers(state, block, gradient, change)
    change += _fit_halves(state, block, gradient)
    return change


def _move_codes(
    state: RowState, block: Block, gradient: torch.Tensor, change: torch.Tensor
) -> None:
    """Every code of the block in turn, all else fixed."""
    form = state.form
    worths = state.d[:, block.index, None] * state.scale[:, block.groups]
    codes = state.codes[:, block.columns]
    for column in range(codes.shape[1]):
        worth = worths[:, column // form.group]
        free = worth != 0
        old = levels_of(codes[:, column], form.table)
        curvature = block.hessian[column, column] * torch.where(free, worth, 1.0)
        code = form.nearest(old - gradient[:, column] / curvature)
        step = torch.where(free, (levels_of(code, form.table) - old) * worth, 0.0)
        codes[:, column] = torch.where(free, code.to(torch.int8), codes[:, column])
        change[:, column] += step
        gradient.addr_(step, block.hessian[column])


def _move_integers(
    state: RowState, block: Block, gradient: torch.Tensor, change: torch.Tensor
) -> None:
    """The integer scale and minimum of every group of the block in turn."""
    form = state.form
    levels = levels_of(state.codes[:, block.columns], form.table)
    for k, index in enumerate(range(block.groups.start, block.groups.stop)):
        own = slice(k * form.group, (k + 1) * form.group)
        moves = [(state.scale, form.scale_range, state.d[:, block.index], levels[:, own])]
        if form.minimum_range is not None:
            unit = form.dmin_sign * state.dmin[:, block.index]
            moves.append((state.minimum, form.minimum_range, unit, torch.ones_like(levels[:, own])))
        for integers, limits, unit, basis in moves:
            assert limits is not None
            slope = (basis * gradient[:, own]).sum(1)
            curvature = ((basis @ block.hessian[own, own]) * basis).sum(1)
            free = (curvature > 0) & (unit != 0)
            old = integers[:, index]
            new = (old - slope / torch.where(free, curvature * unit, 1.0)).round().clamp(*limits)
            step = (new - old) * unit
            good = free & (2 * step * slope + step * step * curvature < 0)
            integers[:, index] = torch.where(good, new, old)
            moved = torch.where(good, step, 0.0)[:, None] * basis
            change[:, own] += moved
            gradient.addmm_(moved, block.hessian[own])


def _fit_halves(state: RowState, block: Block, gradient: torch.Tensor) -> torch.Tensor:
    """d and dmin together: the least-squares step, rounded as it is stored, taken where it helps.

    Returns what that adds to the values.
    """
    form = state.form

    def widen(per_group: torch.Tensor) -> torch.Tensor:
        return per_group[:, block.groups].repeat_interleave(form.group, 1)

    d = state.d[:, block.index]
    u = levels_of(state.codes[:, block.columns], form.table) * widen(state.scale)
    hu = u @ block.hessian
    au, uu = (u * gradient).sum(1), (u * hu).sum(1)
    free = uu > 0
    to_d, to_m = torch.where(free, -au / torch.where(free, uu, 1.0), 0.0), torch.zeros_like(au)
    av = uv = vv = v = torch.zeros_like(au)
    if form.dmin_at is not None:
        v = form.dmin_sign * widen(state.minimum)
        hv = v @ block.hessian
        av, uv, vv = (v * gradient).sum(1), (v * hu).sum(1), (v * hv).sum(1)
        det = uu * vv - uv * uv
        both = free & (det > 1e-6 * uu * vv)
        det = torch.where(both, det, 1.0)
        to_d = torch.where(both, -(vv * au - uv * av) / det, to_d)
        to_m = torch.where(both, -(uu * av - uv * au) / det, to_m)
    step_d = form.storable(d + to_d) - d
    step_m = torch.zeros_like(step_d)
    if form.dmin_at is not None:
        dmin = state.dmin[:, block.index]
        step_m = form.storable(dmin + to_m) - dmin
    gain = 2 * (step_d * au + step_m * av)
    gain += step_d * step_d * uu + 2 * step_d * step_m * uv + step_m * step_m * vv
    good = free & (gain < 0)
    step_d, step_m = torch.where(good, step_d, 0.0), torch.where(good, step_m, 0.0)
    state.d[:, block.index] += step_d
    moved = step_d[:, None] * u
    if form.dmin_at is not None:
        state.dmin[:, block.index] += step_m
        moved += step_m[:, None] * v
    return moved


def _sweep_cpu(state: RowState, hessian: torch.Tensor, n_sweeps: int) -> None:
    """All sweeps by the compiled kernel, a window of blocks at a time; other columns hear of a
    window in one product.
    """
    form = state.form
    width, group, n_columns = form.qtype.block_size, form.group, hessian.shape[-1]
    reach = max(1, _WINDOW // width) * width
    # Transposed, neighboring rows lie next to each other.
    fields = (state.codes, state.gradient, state.d, state.dmin, state.scale, state.minimum)
    codes, gradient, d, dmin, scale, minimum = (x.T.contiguous() for x in fields)
    table = np.array(form.table or (), np.float32)
    shape = kernels_cpu.Shape(
        width, group, form.low, form.high, form.dmin_sign, form.scale_is_power
    )
    limits = (*(form.scale_range or (0, -1)), *(form.minimum_range or (0, -1)))
    for _ in range(n_sweeps):
        for first in range(0, n_columns, reach):
            last = min(first + reach, n_columns)
            own = hessian[first:last, first:last].contiguous()
            sums = own.unflatten(0, (-1, group)).sum(1).unflatten(1, (-1, group)).sum(2)
            columns, groups = slice(first, last), slice(first // group, last // group)
            blocks = slice(first // width, last // width)
            change = torch.empty((last - first, len(state.codes)))
            kernels_cpu.descend(
                codes[columns].numpy(),
                gradient[columns].numpy(),
                change.numpy(),
                d[blocks].numpy(),
                dmin[blocks].numpy(),
                scale[groups].numpy(),
                minimum[groups].numpy(),
                own.numpy(),
                sums.numpy(),
                table,
                shape,
                limits,
            )
            add_product(gradient, hessian[columns].T, change)
    for field, found in zip(fields, (codes, gradient, d, dmin, scale, minimum), strict=True):
        field.copy_(found.T)


def _sweep_cuda(state: RowState, hessian: torch.Tensor, n_sweeps: int) -> None:
    """All sweeps by the compiled kernel, which takes several narrow blocks at once; columns far
    away hear of many windows in one product.
    """
    from quantkit.gptq import kernels_cuda  # needs triton

    n_columns, group = hessian.shape[-1], state.form.group
    group_sums = hessian.unflatten(-2, (n_columns // group, group)).sum(-2)
    gradient = per_expert(state.gradient, hessian)
    table = torch.tensor(state.form.table or (), dtype=torch.float32, device=hessian.device)
    for sweep in range(n_sweeps):
        for first in range(0, n_columns, _REACH):
            last = min(first + _REACH, n_columns)
            changes = []
            for start in range(first, last, kernels_cuda.WINDOW):
                change = kernels_cuda.descend(state, hessian, group_sums, table, start)
                end = start + change.shape[1]
                change = per_expert(change.contiguous(), hessian)
                near, far = gradient[..., first:last], hessian[..., start:end, first:last]
                add_product(near, change, far)
                changes.append(change)
            change = torch.cat(changes, -1)
            own = hessian[..., first:last, :]
            if last < n_columns:
                add_product(gradient[..., last:], change, own[..., last:])
            if first > 0 and sweep < n_sweeps - 1:  # else nobody comes back to them
                add_product(gradient[..., :first], change, own[..., :first])


_SWEEPS = {"cpu": _sweep_cpu, "cuda": _sweep_cuda}


def row_errors(
    form: Readable, packed: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    """Return e H eᵀ of every packed row: float32 (n_rows,); inf where scales are not finite."""
    difference = per_expert(form.values(packed) - weight, hessian)
    errors = output_error(difference, hessian).flatten()
    return torch.where(torch.isfinite(errors), errors, torch.inf)
