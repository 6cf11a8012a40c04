"""Rows of a codebook that follow gradients: untouched they are the rows themselves; the forward
pass sees the nearest allowed point and what the bytes say; a loss falls in bytes.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from triton_marks import HAS_GPU, KERNELS

from quantkit.ggml import native
from quantkit.ggml.codebooks import CODEBOOKS, UNIT
from quantkit.ggml.types import QuantType
from quantkit.tuning.tunable_units import TunableUnits
from quantkit.tuning.units import nearest

EACH = pytest.mark.parametrize("qtype", tuple(CODEBOOKS), ids=str)


def rows(qtype: QuantType, n_rows: int = 6, n_columns: int = 512) -> tuple[torch.Tensor, ...]:
    """Weights with a row of zeros, and their bytes as ggml rounds them."""
    weight = torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(1))
    weight[0] = 0
    importance = np.ones(n_columns, np.float32)
    return weight, torch.from_numpy(native.quantize(weight.numpy(), qtype, importance))


def read(packed: torch.Tensor, qtype: QuantType) -> torch.Tensor:
    """Values as libggml reads them."""
    return torch.from_numpy(native.dequantize(packed.numpy(), qtype))


def moved(tunable: TunableUnits, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        tunable.level += size * torch.randn(tunable.level.shape, generator=generator)


@EACH
def test_untouched_rows_are_the_rows(qtype: QuantType) -> None:
    _, packed = rows(qtype)
    tunable = TunableUnits(qtype, packed)
    assert torch.equal(tunable.packed(), packed)
    assert torch.equal(tunable.weight(), read(packed, qtype))


@EACH
def test_a_loss_falls_in_the_bytes(qtype: QuantType) -> None:
    """Outputs for random inputs are pulled back to the original's."""
    weight, packed = rows(qtype)
    x = torch.randn(256, weight.shape[1], generator=torch.Generator().manual_seed(2))
    x = x @ (torch.eye(weight.shape[1]) + 0.3)  # correlated: errors can make up for each other
    wanted = x @ weight.T
    tunable = TunableUnits(qtype, packed)
    groups = [
        {"params": [tunable.scales], "lr": 5e-4},
        {"params": [tunable.level, tunable.integers], "lr": 2e-2},
    ]
    optimizer = torch.optim.Adam(groups)
    for _ in range(40):
        optimizer.zero_grad()
        (x @ tunable.weight().T - wanted).square().mean().backward()
        optimizer.step()

    def loss(of: torch.Tensor) -> float:
        return float((x @ read(of, qtype).T - wanted).square().mean())

    tuned = tunable.packed()
    assert loss(tuned) < 0.9 * loss(packed)
    assert torch.equal(tunable.weight(), read(tuned, qtype))
    assert not read(tuned, qtype)[0].any()


@EACH
def test_the_point_is_the_nearest_of_all(qtype: QuantType) -> None:
    """Against all entries with all signs that the type allows, one unit at a time."""
    book = CODEBOOKS[qtype]
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(12, UNIT, generator=generator) * float(book.entries.max())
    half = torch.arange(12) % 2 if book.halves else torch.zeros(12, dtype=torch.long)
    found = nearest(book, target, half)
    table = torch.from_numpy(book.entries)
    bits = (found.signs[:, None] >> torch.arange(UNIT)) & 1
    own = table[found.entry.long()].flatten(1) * (1 - 2 * bits.float())
    if book.signs_are_even:
        assert not (bits.sum(1) % 2).any()
    choices = [(1.0,)] if not book.has_signs else [(1.0, -1.0)]
    signs = torch.tensor(list(itertools.product(*choices * book.width)))
    signed = (table[:, None] * signs).flatten(0, 1)  # all points of the columns of an entry
    is_odd = ((signs < 0).sum(1) % 2 == 1).repeat(len(table))
    is_upper = torch.arange(len(table)).repeat_interleave(len(signs)) >= len(table) // 2
    for index in range(len(target)):
        allowed = is_upper == bool(half[index]) if book.halves else torch.ones_like(is_upper)
        parts = [(t - signed[allowed]).square().sum(1) for t in target[index].split(book.width)]
        odd = is_odd[allowed]
        even_least = [p[~odd].min() if book.signs_are_even else p.min() for p in parts]
        least = sum(even_least)
        if book.signs_are_even and len(parts) == 2:
            least = min(least, sum(p[odd].min() for p in parts))
        assert float((own[index] - target[index]).square().sum()) == pytest.approx(float(least))


@EACH
def test_what_is_not_looked_up_again_stays_the_nearest(qtype: QuantType) -> None:
    """Levels that move in small steps, as they do while tuning."""
    _, packed = rows(qtype)
    tunable = TunableUnits(qtype, packed)
    moved(tunable, 0.5, 4)
    for step in range(20):
        moved(tunable, 0.03, 5 + step)
        points, values = tunable.take()
        wanted, expected = tunable.reference()
        different = (points.entry != wanted.entry).sum() + (points.signs != wanted.signs).sum()
        assert different <= 2  # two points may be equally near
        assert (values != expected).sum() <= 2 * UNIT
        assert torch.equal(values, read(tunable.packed(), qtype))


@EACH
def test_gradients_are_those_of_the_smooth_function(qtype: QuantType) -> None:
    """Of values that are linear in levels, multipliers and d, as autograd sees them."""
    weight, packed = rows(qtype)
    tunable = TunableUnits(qtype, packed)
    book, codes = tunable.book, tunable.book.codes(packed)
    pull = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    (tunable.weight() * pull).sum().backward()
    level = (book.levels(codes) / tunable.unit).requires_grad_()
    integers, d = codes.integer.float().requires_grad_(), codes.d.clone().requires_grad_()
    first, step = book.multipliers[0], book.multipliers[1] - book.multipliers[0]
    per_block = integers.shape[1] // d.shape[1]
    scale = (first + step * integers) * d.repeat_interleave(per_block, 1)
    values = (level * tunable.unit).unflatten(1, (-1, book.group)) * scale[..., None]
    (values.flatten(1) * pull).sum().backward()
    for found, wanted in (
        (tunable.level.grad, level.grad),
        (tunable.integers.grad, integers.grad),
        (tunable.scales.grad, d.grad * codes.d),
    ):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


@EACH
def test_beyond_the_table_nothing_pulls_further(qtype: QuantType) -> None:
    _, packed = rows(qtype)
    tunable = TunableUnits(qtype, packed)
    with torch.no_grad():
        tunable.level.sign_().mul_(tunable.bound + 1)
    outwards = -tunable.level.detach()  # a step against the gradient goes out
    tunable.weight().backward(outwards)
    assert not tunable.level.grad.any()
    tunable.weight().backward(-outwards)
    assert tunable.level.grad[1:].all()


@KERNELS
@EACH
def test_unit_kernels_are_the_torch_form(qtype: QuantType) -> None:
    from quantkit.tuning import kernels_units_cuda

    weight, packed = rows(qtype, 5, 256)  # more than one program's units
    tunable = TunableUnits(qtype, packed)
    moved(tunable, 1.0, 6)
    pull = torch.randn(weight.shape, generator=torch.Generator().manual_seed(7))
    (tunable.weight() * pull).sum().backward()
    device = "cuda" if HAS_GPU else "cpu"
    level, scale = tunable.level.detach().to(device), tunable.scale().to(device)
    points, values = kernels_units_cuda.values(
        tunable.book, level, tunable.unit, tunable.half.to(device), scale
    )
    wanted, expected = tunable.reference()
    assert (points.entry.cpu() != wanted.entry).sum() <= 2  # two points may be equally near
    assert (points.signs.cpu() != wanted.signs).sum() <= 2
    assert (values.cpu() != expected).sum() <= 2 * UNIT
    to_level, along = torch.empty_like(level), torch.empty_like(scale)
    kernels_units_cuda.gradients(
        tunable.unit, tunable.bound, pull.to(device), level, values, scale, to_level, along
    )
    assert torch.allclose(to_level.cpu(), tunable.level.grad, rtol=1e-6, atol=0)
    by_group = (pull * expected).unflatten(1, (-1, tunable.book.group)).sum(2)
    assert torch.allclose(along.cpu(), by_group, rtol=1e-3, atol=1e-3)
