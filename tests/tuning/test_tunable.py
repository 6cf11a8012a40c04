"""Packed rows that follow gradients: untouched they are the rows themselves; what the forward pass
sees is what the bytes say; a loss falls in bytes, not only in numbers beside them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.ggml import native
from quantkit.ggml.formats import FORMATS
from quantkit.ggml.types import QuantType
from quantkit.tuning.tunable import Tunable

EACH = pytest.mark.parametrize("qtype", tuple(FORMATS), ids=str)


def rows(qtype: QuantType, n_rows: int = 8, n_columns: int = 512) -> tuple[torch.Tensor, ...]:
    """Weights with a row of zeros, and their bytes as ggml rounds them."""
    weight = torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(1))
    weight[0] = 0
    return weight, torch.from_numpy(native.quantize(weight.numpy(), qtype, None))


def read(packed: torch.Tensor, qtype: QuantType) -> torch.Tensor:
    """Values as libggml reads them."""
    return torch.from_numpy(native.dequantize(packed.numpy(), qtype))


@EACH
@pytest.mark.parametrize("with_codes", [False, True], ids=["scales", "codes"])
def test_untouched_rows_are_the_rows(qtype: QuantType, with_codes: bool) -> None:
    weight, packed = rows(qtype)
    # Codes that are not the nearest ones, as GPTQ leaves them.
    shifted = (FORMATS[qtype].codes(packed) + 1).clamp(FORMATS[qtype].low, FORMATS[qtype].high)
    for start in (packed, FORMATS[qtype].with_codes(packed, shifted)):
        tunable = Tunable(qtype, start, weight, with_codes)
        assert torch.equal(tunable.packed(), start)
        assert torch.allclose(tunable.weight(), read(start, qtype), rtol=1e-5, atol=1e-6)


@EACH
@pytest.mark.parametrize("with_codes", [False, True], ids=["scales", "codes"])
def test_a_loss_falls_in_the_bytes(qtype: QuantType, with_codes: bool) -> None:
    """Outputs for random inputs are pulled back to the original's."""
    weight, packed = rows(qtype)
    x = torch.randn(256, weight.shape[1], generator=torch.Generator().manual_seed(2))
    x = x @ (torch.eye(weight.shape[1]) + 0.3)  # correlated: errors can make up for each other
    wanted = x @ weight.T
    tunable = Tunable(qtype, packed, weight, with_codes)
    groups = [{"params": [tunable.scales], "lr": 5e-4}]
    if with_codes:
        groups.append({"params": [tunable.level], "lr": 2e-2})
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
    tunable = Tunable(qtype, packed, weight, with_codes=True)
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
