"""Packed rows that follow gradients: untouched they are the rows themselves; what the forward pass
sees is what the bytes say; a loss falls in bytes, not only in numbers beside them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton_marks import HAS_GPU, KERNELS

from quantkit.ggml import native, searches
from quantkit.ggml.formats import FORMATS
from quantkit.ggml.types import QuantType
from quantkit.tuning.tunable import Tunable

EACH = pytest.mark.parametrize("qtype", tuple(FORMATS), ids=str)


def rows(qtype: QuantType, n_rows: int = 8, n_columns: int = 512) -> tuple[torch.Tensor, ...]:
    """Weights with a row of zeros, and their bytes as ggml rounds them, with scales searched."""
    weight = torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(1))
    weight[0] = 0
    if qtype in searches.SEARCHED:
        return weight, searches.quantize(weight, qtype, None)
    return weight, torch.from_numpy(native.quantize(weight.numpy(), qtype, None))


def read(packed: torch.Tensor, qtype: QuantType) -> torch.Tensor:
    """Values as libggml reads them."""
    return torch.from_numpy(native.dequantize(packed.numpy(), qtype))


@EACH
def test_untouched_rows_are_the_rows(qtype: QuantType) -> None:
    weight, packed = rows(qtype)
    # Codes that are not the nearest ones, as GPTQ leaves them.
    shifted = (FORMATS[qtype].codes(packed) + 1).clamp(FORMATS[qtype].low, FORMATS[qtype].high)
    for start in (packed, FORMATS[qtype].with_codes(packed, shifted)):
        tunable = Tunable(qtype, start, weight)
        assert torch.equal(tunable.packed(), start)
        assert torch.allclose(tunable.weight(), read(start, qtype), rtol=1e-5, atol=1e-6)


@EACH
def test_a_loss_falls_in_the_bytes(qtype: QuantType) -> None:
    """Outputs for random inputs are pulled back to the original's."""
    weight, packed = rows(qtype)
    x = torch.randn(256, weight.shape[1], generator=torch.Generator().manual_seed(2))
    x = x @ (torch.eye(weight.shape[1]) + 0.3)  # correlated: errors can make up for each other
    wanted = x @ weight.T
    tunable = Tunable(qtype, packed, weight)
    groups = [
        {"params": [tunable.scales], "lr": 5e-4},
        {"params": [tunable.level], "lr": 2e-2},
    ]
    optimizer = torch.optim.Adam(groups)
    for _ in range(40):
        optimizer.zero_grad()
        (x @ tunable.weight().T - wanted).square().mean().backward()
        optimizer.step()

    def loss(of: torch.Tensor) -> float:
        return float((x @ read(of, qtype).T - wanted).square().mean())

    tuned = tunable.packed()
    assert loss(tuned) < 0.97 * loss(packed)
    assert torch.allclose(tunable.weight(), read(tuned, qtype), rtol=1e-5, atol=1e-5)
    assert np.array_equal(read(tuned, qtype)[0].numpy(), np.zeros(weight.shape[1], np.float32))


@EACH
def test_gradients_are_those_of_the_smooth_function(qtype: QuantType) -> None:
    """Of values that are linear in the levels and in d and dmin, as autograd sees them."""
    form = FORMATS[qtype]
    weight, packed = rows(qtype)
    tunable = Tunable(qtype, packed, weight)
    pull = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    (tunable.weight() * pull).sum().backward()
    levels = (tunable.level.detach() * tunable.unit).requires_grad_()
    halves = tunable.halves.clone().requires_grad_()
    scale, minimum = tunable.grid(halves)
    codes = form.codes(packed)
    table = torch.tensor(form.table) if form.table else None
    rounded = codes.float() if table is None else table[codes.long()].float()
    for through, wanted in ((levels, tunable.level.grad), (rounded, tunable.scales.grad)):
        values = through.view(len(codes), -1, form.group) * scale[..., None]
        if minimum is not None:
            values = values + minimum[..., None]
        of = levels if through is levels else halves
        (found,) = torch.autograd.grad(
            (values.view(codes.shape) * pull).sum(), of, retain_graph=True
        )
        found = found * tunable.unit if through is levels else found * halves
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


@KERNELS
@EACH
def test_kernels_are_the_torch_form(qtype: QuantType) -> None:
    """Values to the last bit; their gradients but for the order of sums."""
    from quantkit.tuning import kernels_cuda

    weight, packed = rows(qtype, n_columns=768)
    tunable = Tunable(qtype, packed, weight)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # beyond the last codes, too
        tunable.level += 3 * torch.randn(tunable.level.shape, generator=generator)
    pull = torch.randn(weight.shape, generator=generator)
    values = tunable.weight()
    (values * pull).sum().backward()
    device = "cuda" if HAS_GPU else "cpu"
    level, form = tunable.level.detach().to(device), tunable.form
    scale, minimum = tunable.grid(tunable.stored_halves())
    scale, has_minimum = scale.to(device), minimum is not None
    found = kernels_cuda.values(
        form, level, tunable.unit, scale, None if minimum is None else minimum.to(device)
    )
    assert torch.equal(found.cpu(), values.detach())
    to_level, by_level, plain = (
        x.cpu()
        for x in kernels_cuda.gradients(
            form, pull.to(device), level, tunable.unit, tunable.range, scale, has_minimum
        )
    )
    wanted = tunable.level.grad
    assert wanted is not None and (wanted == 0).any()
    assert torch.allclose(to_level, wanted, rtol=1e-6, atol=0)
    parts = [tunable.per_block(by_level * tunable.scale)]
    if has_minimum:
        parts.append(tunable.per_block(plain * tunable.minimum) * form.dmin_sign)
    found = torch.cat(parts, 1) * tunable.halves
    assert torch.allclose(found, tunable.scales.grad, rtol=1e-4, atol=1e-4)
