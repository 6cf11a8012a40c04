"""GPTQ and descent onto codebooks, eight columns at a time.

Block feedback (LDLQ over blocks, Tseng et al. 2024, arXiv:2402.04396; GPTQ, arXiv:2210.17323, is
the case of single columns): units of eight neighboring columns are taken in the order of falling
importance. What an error e of a unit costs, once all columns still to come have made up for what
they can, is e M eᵀ with M = (Uᵀ U)⁻¹ of the unit's own part of the factor U; entry and signs are
chosen by it, and the error is spread over those columns by U. Scales stay.

The descent then takes every unit again, all others fixed, where M is the unit's own part of H; and
with it the integer that scales its group, and d. No step lets tr(E H Eᵀ) rise.

Everything here is a pure function of torch tensors, float32, on the device of its arguments. On a
CPU compiled kernels do the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache

import numpy as np
import torch

from quantkit.ggml import codebook_scales
from quantkit.ggml.codebooks import BLOCK, CODEBOOKS, UNIT, Codebook, Codes
from quantkit.ggml.types import QuantType
from quantkit.gptq import kernels_codebooks as kernels
from quantkit.gptq.codebook_steps import (
    LEAST_STEP,
    Step,
    UnitBlock,
    UnitStack,
    Walk,
    halves_of,
    own_parts,
    step_block,
    walk_units,
)
from quantkit.gptq.codebook_units import N_LISTED, N_ROUNDS
from quantkit.gptq.descent import per_expert
from quantkit.gptq.products import add_product, product
from quantkit.gptq.solver import Factor, sweep


def feedback(
    book: Codebook,
    packed: torch.Tensor,
    weight: torch.Tensor,
    factors: Sequence[Factor],
    walk: Walk | None = None,
) -> torch.Tensor:
    """Return packed rows uint8 (n_rows, row_bytes) with the scales of `packed` and entries and
    signs by block feedback of `weight`, float32 (n_rows, n_columns). Each of `factors`, of units of
    eight, is that of an expert with as many rows, one expert after the other. `walk` replaces the
    fastest walk of the device, for tests.
    """
    walk = walk or _WALKS.get(packed.device.type, walk_units)
    n = len(factors)
    parts = zip(packed.chunk(n), weight.chunk(n), factors, strict=True)
    stacks = [_unit_stack(book, *part) for part in parts]
    if n > 1 and walk is _walk_units_cuda:
        names = [field.name for field in fields(UnitStack) if field.name != "book"]
        all_of = {name: torch.stack([getattr(s, name) for s in stacks]) for name in names}
        stack = UnitStack(book, **all_of)
        upper = torch.stack([factor.upper for factor in factors])
        sweep(stack, upper, 0, upper.shape[-1], walk)
        stacks = [
            replace(own, entry=stack.entry[i], signs=stack.signs[i]) for i, own in enumerate(stacks)
        ]
    else:
        for own, factor in zip(stacks, factors, strict=True):
            sweep(own, factor.upper, 0, len(factor.order), walk)
    entries, signs = [], []
    for own, factor in zip(stacks, factors, strict=True):
        order = _unit_order(factor)
        entry, sign = torch.empty_like(own.entry), torch.empty_like(own.signs)
        shape = (-1, UNIT // book.width)
        entry.unflatten(0, shape)[order] = own.entry.unflatten(0, shape)
        sign[order] = own.signs
        entries.append(entry.T)
        signs.append(sign.T)
    codes = book.codes(packed)
    return book.pack(replace(codes, entry=torch.cat(entries), signs=torch.cat(signs)))


def _unit_order(factor: Factor) -> torch.Tensor:
    return factor.order.view(-1, UNIT)[:, 0] // UNIT


def _unit_stack(
    book: Codebook, packed: torch.Tensor, weight: torch.Tensor, factor: Factor
) -> UnitStack:
    codes, order = book.codes(packed), _unit_order(factor)
    own = own_parts(factor.upper)
    one = torch.eye(UNIT, device=own.device).expand_as(own)
    inverse = torch.linalg.solve_triangular(own.contiguous(), one, upper=True)
    n_units, n_rows = len(order), len(packed)
    n_entries = n_units * UNIT // book.width
    return UnitStack(
        book,
        weight.T[factor.order].contiguous(),
        (inverse @ inverse.mT).contiguous(),
        order * UNIT // book.group,
        book.scale(codes).T.contiguous(),
        halves_of(book, codes.entry).T.to(torch.uint8).contiguous(),
        torch.empty((n_entries, n_rows), dtype=torch.int16, device=packed.device),
        torch.zeros((n_units, n_rows), dtype=torch.uint8, device=packed.device),
    )


@cache
def _kernel_book(qtype: QuantType) -> kernels.Book:
    book = CODEBOOKS[qtype]
    return kernels.Book(
        book.entries,
        np.ascontiguousarray(book.entries.T),
        book.sign_kind,
        book.group,
        np.array(book.multipliers, np.float32),
        int(book.halves),
        N_LISTED[book.width],
        N_ROUNDS,
        np.float32(LEAST_STEP),
    )


def _walk_units_cpu(stack: UnitStack, upper: torch.Tensor, start: int, end: int) -> None:
    units = slice(start // UNIT, end // UNIT)
    entries = slice(start // stack.book.width, end // stack.book.width)
    kernels.feed(
        stack.weight[start:end].numpy(),
        upper[start:end, start:end].contiguous().numpy(),
        stack.metrics[units].numpy(),
        stack.scale.numpy(),
        stack.group_of[units].numpy(),
        stack.half.numpy(),
        _kernel_book(stack.book.qtype),
        stack.entry[entries].numpy(),
        stack.signs[units].numpy(),
    )


def _walk_units_cuda(stack: UnitStack, upper: torch.Tensor, start: int, end: int) -> None:
    from quantkit.gptq import kernels_codebook_walk_cuda  # needs triton

    kernels_codebook_walk_cuda.feed(stack, upper, start, end)


_WALKS: dict[str, Walk] = {"cpu": _walk_units_cpu, "cuda": _walk_units_cuda}


def descend(
    book: Codebook,
    packed: torch.Tensor,
    weight: torch.Tensor,
    hessian: torch.Tensor,
    n_sweeps: int,
    step: Step | None = None,
) -> torch.Tensor:
    """Return packed rows uint8 (n_rows, row_bytes) after `n_sweeps` of descent on tr(E H Eᵀ).

    `weight` is float32 (n_rows, n_columns), `hessian` float32 (n, n), or (n_experts, n, n) for as
    many rows of each expert, one expert after the other. `step` replaces the fastest step of the
    device, for tests.
    """
    step = step or _STEPS.get(packed.device.type, step_block)
    if hessian.dim() == 3 and step is not _step_block_cuda:
        n = len(hessian)
        parts = zip(packed.chunk(n), weight.chunk(n), hessian, strict=True)
        return torch.cat([descend(book, p, w, h, n_sweeps, step) for p, w, h in parts])
    codes, shape = book.codes(packed), hessian.shape[:-2]
    gradient = product(per_expert(book.decoded(codes) - weight, hessian), hessian)
    inverses = torch.linalg.inv(own_parts(hessian)).contiguous()
    blocks, columns = [], []
    per_block = BLOCK // UNIT
    for index in range(codes.d.shape[1]):
        own = slice(index * BLOCK, (index + 1) * BLOCK)
        numbers = [x.unflatten(0, (*shape, -1)) for x in _of_block(codes, index)]
        inverse = inverses[..., index * per_block : (index + 1) * per_block, :, :].contiguous()
        square = hessian[..., own, own].contiguous()
        numbers += [gradient[..., own], square, inverse]
        blocks.append(UnitBlock(book, *numbers))
        columns.append(own)
    for _ in range(n_sweeps):
        for block, own in zip(blocks, columns, strict=True):
            add_product(gradient, step(block), hessian[..., own, :])
    return _packed(book, blocks)


def rounded(
    book: Codebook, weight: torch.Tensor, importance: torch.Tensor | None, step: Step | None = None
) -> torch.Tensor:
    """Return packed rows uint8 (n_rows, row_bytes) of float32 (n_rows, n_columns) without ggml:
    scales are searched, then fitted with the codes. `importance` as in `fit_scales`, or None where
    all columns count the same.

    Raises QuantkitError when weights are NaN, infinite, or too large for the scales.
    """
    start = codebook_scales.start(book, weight, importance)
    if importance is None:
        importance = torch.ones(weight.shape[1], device=weight.device)
    return fit_scales(book, start, weight, importance, step)


def fit_scales(
    book: Codebook,
    packed: torch.Tensor,
    weight: torch.Tensor,
    importance: torch.Tensor,
    step: Step | None = None,
) -> torch.Tensor:
    """Return packed rows uint8 (n_rows, row_bytes) after a sweep of descent under importances
    alone, float32 (n_columns,), or (n_experts, n_columns) for as many rows of each expert. ggml's
    scales are too large for what is rounded with them: it does not look at codes again once it has
    rounded scales.
    """
    step = step or _STEPS.get(packed.device.type, step_block)
    shares = importance.view(-1, weight.shape[1])
    codes = book.codes(packed)
    off = (book.decoded(codes) - weight).view(len(shares), -1, weight.shape[1])
    gradient = (off * shares[:, None]).view(weight.shape)
    n_blocks, n_experts = codes.d.shape[1], len(shares)
    hessians = torch.diag_embed(shares.view(n_experts, n_blocks, BLOCK))
    inverses = torch.where(shares > 0, 1 / shares.clamp_min(1e-38), 0.0)
    inverses = torch.diag_embed(inverses.view(n_experts, n_blocks, -1, UNIT))
    blocks = []
    for index in range(n_blocks):
        own = slice(index * BLOCK, (index + 1) * BLOCK)
        numbers = [*_of_block(codes, index), gradient[:, own]]
        numbers = [x.unflatten(0, (n_experts, -1)) for x in numbers]
        numbers += [hessians[:, index], inverses[:, index]]
        blocks.append(UnitBlock(book, *numbers, is_diagonal=True))
    if step is _step_block_cuda:  # blocks do not depend on each other: all at once
        together = _joined(book, blocks)
        step(together)
        parts = {name: getattr(together, name).chunk(n_blocks) for name in _NUMBERS}
        changed = [{name: own[i] for name, own in parts.items()} for i in range(n_blocks)]
        done = [replace(block, **own) for block, own in zip(blocks, changed, strict=True)]
        return _packed(book, done)
    for block in blocks:
        for expert in range(n_experts):
            step(UnitBlock(book, *(getattr(block, name)[expert] for name in _TENSORS)))
    return _packed(book, blocks)


_NUMBERS = ("entry", "signs", "integer", "d")
_TENSORS = tuple(f.name for f in fields(UnitBlock) if f.name not in ("book", "is_diagonal"))


def _of_block(codes: Codes, index: int) -> list[torch.Tensor]:
    """The numbers of one block of all rows: entries, signs, integers, (n_rows, ..), and d."""
    n_blocks = codes.d.shape[1]
    wide = [
        x.chunk(n_blocks, 1)[index].contiguous() for x in (codes.entry, codes.signs, codes.integer)
    ]
    return [*wide, codes.d[:, index].contiguous()]


def _joined(book: Codebook, blocks: Sequence[UnitBlock]) -> UnitBlock:
    """Blocks with experts in front as one with blocks times experts in front."""
    numbers = (torch.cat([getattr(block, name) for block in blocks]) for name in _TENSORS)
    return UnitBlock(book, *numbers, is_diagonal=blocks[0].is_diagonal)


def _packed(book: Codebook, blocks: Sequence[UnitBlock]) -> torch.Tensor:
    """The bytes of a row's blocks."""
    n_rows = blocks[0].d.numel()
    entry, signs, integer, d = (
        torch.cat([getattr(block, name).reshape(n_rows, -1) for block in blocks], 1)
        for name in _NUMBERS
    )
    return book.pack(Codes(entry, signs, integer, d))


def _step_block_cpu(block: UnitBlock) -> torch.Tensor:
    change = torch.empty(block.gradient.shape)
    kernels.descend(
        block.entry.numpy(),
        block.signs.numpy(),
        block.integer.numpy(),
        block.d.numpy(),
        block.gradient.contiguous().numpy(),
        change.numpy(),
        block.hessian.numpy(),
        block.inverses.numpy(),
        _kernel_book(block.book.qtype),
    )
    return change


def _step_block_cuda(block: UnitBlock) -> torch.Tensor:
    from quantkit.gptq import kernels_codebook_step_cuda  # needs triton

    return kernels_codebook_step_cuda.descend(block, LEAST_STEP)


_STEPS: dict[str, Step] = {"cpu": _step_block_cpu, "cuda": _step_block_cuda}
