"""GPTQ onto a fixed grid: decide the codes, keep the scales.

Follows Frantar et al. 2022 (arXiv:2210.17323) with static groups: the grid of every row is fixed
before any error feedback, columns are taken in the order of falling diag(H), and the rounding error
of a column is spread over the columns still to come by the Cholesky factor of the damped inverse
Hessian. Rows are independent given H. So all rows of all tensors that read the same input, at all
levels, are stacked and solved in one sweep with one factorization.

Everything here is a pure function of torch tensors, float32, on the device of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from quantkit.errors import QuantkitError
from quantkit.ggml.formats import Grid
from quantkit.gptq import kernels_cpu
from quantkit.gptq.products import add_product, rough_product

_DAMPINGS = (1.0, 10.0, 100.0, 1000.0)  # factors tried in turn when the factorization fails
_LEAF = 128  # columns walked one by one before their errors are applied by a matrix product


@dataclass(frozen=True)
class Factor:
    """A factorized Hessian: what one sweep needs and all stacked rows share.

    `order` (n,) sorts the columns, or units of several, by falling diag(H); `upper` (n, n) is the
    upper Cholesky factor U of the damped inverse in that order, H⁻¹ = UᵀU. `damping` is the share
    of mean(diag H) that was added; it exceeds what was asked when the factorization failed at first
    (`escalated`). `n_dead` columns never saw an input.
    """

    order: torch.Tensor
    upper: torch.Tensor
    diagonal: torch.Tensor  # (n,) of the damped Hessian, columns in their own order
    damping: float
    escalated: bool
    n_dead: int


def factorize(hessian: torch.Tensor, damping: float, unit: int = 1) -> Factor:
    """Factorize `hessian` (n, n) with `damping` times the median of its diagonal added. With a
    `unit`, so many neighboring columns stay together in the order.

    Raises QuantkitError when the Hessian is not finite, or not positive definite even at a
    thousandfold damping.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise QuantkitError(
            "The calibration activations hold NaN or infinite values.",
            "The checkpoint is broken or overflows in its own precision: try another revision.",
        )
    dead = diagonal <= 0
    typical = diagonal[~dead].median() if bool((~dead).any()) else diagonal.new_ones(())
    units = torch.argsort(diagonal.view(-1, unit).mean(1), descending=True, stable=True)
    order = (units[:, None] * unit + torch.arange(unit, device=units.device)).flatten()
    for factor in _DAMPINGS:
        raised = torch.where(dead, typical, diagonal + damping * factor * typical)
        damped = hessian[order][:, order]
        damped.diagonal().copy_(raised[order])
        upper, failed = _inverse_factor(damped)
        if not failed and bool(torch.isfinite(upper).all()):
            return Factor(order, upper, raised, damping * factor, factor > 1, int(dead.sum()))
    raise QuantkitError(
        f"A Hessian of {len(order)} columns cannot be factorized, even heavily damped.",
        "Give more calibration tokens, or leave gptq out of --methods.",
    )


def _inverse_factor(damped: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The upper Cholesky factor of the inverse, and whether there is none."""
    if damped.is_cuda:
        # Cholesky from the other end, H = RRᵀ with R upper, gives H⁻¹ = UᵀU with U = R⁻¹: half the
        # work.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        one = torch.eye(len(damped), device=damped.device)
        return torch.linalg.solve_triangular(lower.flip(0, 1), one, upper=True).triu(), bool(failed)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):
        return lower, True
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return upper, bool(failed)


@dataclass(frozen=True)
class Rows:
    """Weights (n_rows, n_columns) float32 to be put onto `grid`."""

    weight: torch.Tensor
    grid: Grid


@dataclass(frozen=True)
class Stack:
    """Rows of several tensors and levels side by side, transposed: every column's data is
    contiguous.
    """

    weight: (
        torch.Tensor
    )  # (n_columns, n_rows), in the factor's order; becomes the scaled errors as the sweep goes
    scale: torch.Tensor  # (n_columns / group, n_rows)
    minimum: torch.Tensor
    low: torch.Tensor  # (n_rows,)
    high: torch.Tensor
    group_of: torch.Tensor  # (n_columns,) int64: the group of the i-th column in the factor's order
    table: torch.Tensor  # (16,), or empty for plain grids
    codes: torch.Tensor  # (n_columns, n_rows) int8, filled by the sweep


def _stack(rows: Sequence[Rows], order: torch.Tensor) -> Stack:
    group = min(r.grid.group for r in rows)
    device = order.device
    columns = [r.weight.shape[0] for r in rows]

    def per_group(values: torch.Tensor, own: int) -> torch.Tensor:
        return values.repeat_interleave(own // group, 1).T

    def per_row(values: list[int]) -> torch.Tensor:
        return torch.cat(
            [
                torch.full((n,), float(v), device=device)
                for n, v in zip(columns, values, strict=True)
            ]
        )

    weight = torch.cat([r.weight.T[order] for r in rows], 1)
    return Stack(
        weight,
        torch.cat([per_group(r.grid.scale, r.grid.group) for r in rows], 1).contiguous(),
        torch.cat([per_group(r.grid.minimum, r.grid.group) for r in rows], 1).contiguous(),
        per_row([r.grid.low for r in rows]),
        per_row([r.grid.high for r in rows]),
        order // group,
        torch.tensor(rows[0].grid.table or (), dtype=torch.float32, device=device),
        torch.empty(weight.shape, dtype=torch.int8, device=device),
    )


def walk_columns(stack: Stack, upper: torch.Tensor, start: int, end: int) -> None:
    """Decide columns start..end one by one; their scaled errors replace them in `stack.weight`. The
    reference.
    """
    weight = stack.weight
    for column in range(start, end):
        scale, minimum = (x[stack.group_of[column]] for x in (stack.scale, stack.minimum))
        level = (weight[column] - minimum) / torch.where(scale == 0, 1.0, scale)
        if stack.table.numel() == 0:
            level = code = torch.minimum(torch.maximum(level.round(), stack.low), stack.high)
        else:
            code = torch.bucketize(level, (stack.table[1:] + stack.table[:-1]) / 2)
            level = stack.table[code]
        stack.codes[column] = code.to(torch.int8)
        error = (weight[column] - (level * scale + minimum)) / upper[column, column]
        weight[column + 1 : end].addr_(upper[column, column + 1 : end], error, alpha=-1)
        weight[column] = error


def _walk_columns_cpu(stack: Stack, upper: torch.Tensor, start: int, end: int) -> None:
    kernels_cpu.gptq(
        stack.weight[start:end].numpy(),
        upper[start:end, start:end].contiguous().numpy(),
        stack.scale.numpy(),
        stack.minimum.numpy(),
        stack.group_of[start:end].numpy(),
        stack.low.numpy(),
        stack.high.numpy(),
        stack.table.numpy(),
        stack.codes[start:end].numpy(),
    )


def _walk_columns_cuda(stack: Stack, upper: torch.Tensor, start: int, end: int) -> None:
    from quantkit.gptq import kernels_cuda  # needs triton

    kernels_cuda.gptq(
        stack.weight[..., start:end, :],
        upper[..., start:end, start:end],
        stack.scale,
        stack.minimum,
        stack.group_of[..., start:end],
        stack.low,
        stack.high,
        stack.table,
        stack.codes[..., start:end, :],
    )


_WALKS = {"cpu": _walk_columns_cpu, "cuda": _walk_columns_cuda}

Walk = Callable[[Stack, torch.Tensor, int, int], None]


class _HasWeight(Protocol):
    """Rows on their way, transposed: float32 (..., n_columns, n_rows) in the factor's order."""

    @property
    def weight(self) -> torch.Tensor: ...


_Any = TypeVar("_Any", bound=_HasWeight)


def sweep(
    stack: _Any,
    upper: torch.Tensor,
    start: int,
    end: int,
    walk: Callable[[_Any, torch.Tensor, int, int], None],
) -> None:
    """Decide columns start..end and leave their scaled errors in `stack.weight`.

    Halves recursively, so that nearly all of the error feedback is matrix products: the left half
    is decided, its errors reach the right half in one product, the right half is decided.
    """
    if end - start <= _LEAF:
        walk(stack, upper, start, end)
        return
    middle = start + max(_LEAF, (end - start) // 2 // _LEAF * _LEAF)
    sweep(stack, upper, start, middle, walk)
    weight = stack.weight
    share = upper[..., start:middle, middle:end].mT
    add_product(weight[..., middle:end, :], share, weight[..., start:middle, :], -1)
    sweep(stack, upper, middle, end, walk)


def gptq(rows: Sequence[Rows], factor: Factor, walk: Walk | None = None) -> list[torch.Tensor]:
    """Return the codes, int8 (n_rows, n_columns), of every entry of `rows`; all share the
    factorized input.

    Grids of each table and plain grids are swept apart, the rest together. `walk` replaces the
    fastest column walk of the device, for tests.
    """
    if walk is None:
        walk = _WALKS.get(factor.upper.device.type, walk_columns)
    codes: list[torch.Tensor | None] = [None] * len(rows)
    for table in dict.fromkeys(r.grid.table for r in rows):
        chosen = [i for i, r in enumerate(rows) if r.grid.table == table]
        stack = _stack([rows[i] for i in chosen], factor.order)
        sweep(stack, factor.upper, 0, len(factor.order), walk)
        in_place = torch.empty_like(stack.codes)
        in_place[factor.order] = stack.codes
        for i, part in zip(
            chosen, in_place.T.split([len(rows[i].weight) for i in chosen]), strict=True
        ):
            codes[i] = part.contiguous()
    return codes  # type: ignore[return-value]


def gptq_experts(
    rows: Sequence[Sequence[Rows]], factors: Sequence[Factor]
) -> list[list[torch.Tensor]]:
    """Do `gptq` for several experts, each with its own factor: on a GPU in one sweep over all of
    them. The experts' rows are alike: as many, on grids of the same kinds.
    """
    if not factors[0].upper.is_cuda:
        return [gptq(own, factor) for own, factor in zip(rows, factors, strict=True)]
    upper = torch.stack([factor.upper for factor in factors])
    codes: list[list[torch.Tensor]] = [[torch.empty(0)] * len(rows[0]) for _ in rows]
    for table in dict.fromkeys(r.grid.table for r in rows[0]):
        chosen = [i for i, r in enumerate(rows[0]) if r.grid.table == table]
        stacks = [
            _stack([own[i] for i in chosen], f.order) for own, f in zip(rows, factors, strict=True)
        ]
        first = stacks[0]
        stack = Stack(
            torch.stack([s.weight for s in stacks]),
            torch.stack([s.scale for s in stacks]),
            torch.stack([s.minimum for s in stacks]),
            first.low,
            first.high,
            torch.stack([s.group_of for s in stacks]),
            first.table,
            torch.stack([s.codes for s in stacks]),
        )
        sweep(stack, upper, 0, upper.shape[-1], _walk_columns_cuda)
        for expert, factor in enumerate(factors):
            in_place = torch.empty_like(first.codes)
            in_place[factor.order] = stack.codes[expert]
            sizes = [len(rows[expert][i].weight) for i in chosen]
            for i, part in zip(chosen, in_place.T.split(sizes), strict=True):
                codes[expert][i] = part.contiguous()
    return codes


def output_error(difference: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of each row's output, e H eᵀ, for weight differences (n_rows,
    n_columns): (n_rows,). Experts may be an axis in front of all three.
    """
    return (rough_product(difference, hessian) * difference).sum(-1)
