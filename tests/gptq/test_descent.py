"""Coordinate descent over everything that a packed row stores.

The compiled step against the torch step; the error against its own promise (it never rises); each
single move against trying all storable values.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit.ggml import native
from quantkit.ggml.formats import FORMATS
from quantkit.ggml.types import QuantType
from quantkit.gptq.descent import descend, put_together, row_errors, step_block, take_apart
from quantkit.gptq.roundings_cpu import round_to_half
from quantkit.gptq.solver import Rows, factorize, gptq

TYPES = tuple(FORMATS)
EACH = pytest.mark.parametrize("qtype", TYPES, ids=str)


def hessian(n: int = 512, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator) / n**0.5 + torch.eye(n)
    x = torch.randn(1500, n, generator=generator) @ mix
    h = x.T @ x / 1500
    h.diagonal().add_(0.05 * h.diagonal().median())
    return h


def rows(n_rows: int = 12, n: int = 512, seed: int = 1) -> torch.Tensor:
    w = torch.randn(n_rows, n, generator=torch.Generator().manual_seed(seed))
    w[0] = 0
    w[1, :256] = 0
    return w


def start(w: torch.Tensor, h: torch.Tensor, qtype: QuantType, by_gptq: bool) -> torch.Tensor:
    packed = torch.from_numpy(native.quantize(w.numpy(), qtype, h.diagonal().numpy().copy()))
    if not by_gptq:
        return packed
    (codes,) = gptq([Rows(w, FORMATS[qtype].grid(packed))], factorize(h, 0.01))
    return FORMATS[qtype].with_codes(packed, codes)


def error(packed: torch.Tensor, qtype: QuantType, w: torch.Tensor, h: torch.Tensor) -> np.ndarray:
    """e H eᵀ of every row in float64, of the values that libggml reads."""
    e = torch.from_numpy(native.dequantize(packed.numpy(), qtype)).double() - w.double()
    return ((e @ h.double()) * e).sum(1).numpy()


@EACH
@pytest.mark.parametrize("by_gptq", [False, True], ids=["rounded", "gptq"])
def test_every_sweep_lowers_the_error(qtype: QuantType, by_gptq: bool) -> None:
    """Of every row, sweep by sweep; 1e-4 is for gradients kept in float32."""
    h, w = hessian(), rows()
    packed = start(w, h, qtype, by_gptq)
    before = first = error(packed, qtype, w, h)
    for _ in range(3):
        packed = descend(FORMATS[qtype], packed, w, h, n_sweeps=1)
        after = error(packed, qtype, w, h)
        assert (after <= before * (1 + 1e-4) + 1e-9).all()
        before = after
    assert after.sum() < first.sum()


@EACH
def test_the_compiled_step_is_the_torch_step(qtype: QuantType) -> None:
    """The same rows but for a tie here and there, which float32 may settle either way."""
    h, w, form = hessian(), rows(70), FORMATS[qtype]
    packed = start(w, h, qtype, by_gptq=True)
    compiled = descend(form, packed, w, h, n_sweeps=1)
    plain = descend(form, packed, w, h, n_sweeps=1, step=step_block)
    assert int((compiled != plain).any(1).sum()) <= 3
    both = [error(p, qtype, w, h)[1:].sum() for p in (compiled, plain)]
    assert both[0] == pytest.approx(both[1], rel=0.005)


@EACH
def test_it_stops_where_nothing_can_be_gained(qtype: QuantType) -> None:
    """After many sweeps another one hardly changes anything."""
    h, w, form = hessian(256), rows(8, 256), FORMATS[qtype]
    packed = descend(form, start(w, h, qtype, by_gptq=True), w, h, n_sweeps=40)
    again = descend(form, packed, w, h, n_sweeps=1)
    old, new = error(packed, qtype, w, h).sum(), error(again, qtype, w, h).sum()
    assert new == pytest.approx(old, rel=1e-4)


@EACH
def test_no_code_alone_can_gain_then(qtype: QuantType) -> None:
    """All values of all codes of a row, one at a time, in float64: none is better by more than
    float32's rounding. At 256 columns a K-quant's row is one block, at 32 of others it is several.
    """
    h, w, form = hessian(256), rows(5, 256), FORMATS[qtype]
    packed = descend(form, start(w, h, qtype, by_gptq=True), w, h, n_sweeps=60)
    grid, codes = form.grid(packed), form.codes(packed)
    e = (grid.values(codes) - w).double()
    slope, curvature = e @ h.double(), h.diagonal().double()
    now = (e @ h.double() * e).sum(1)
    best = torch.zeros_like(now)
    for code in range(form.low, form.high + 1):
        step = (grid.values(torch.full_like(codes, code)) - grid.values(codes)).double()
        gain = 2 * step * slope + step.square() * curvature
        best = torch.minimum(best, gain.amin(1))
    assert bool((best >= -2e-3 * now - 1e-12).all()), (best / now).tolist()


@EACH
def test_what_it_does_not_decide_stays(qtype: QuantType) -> None:
    h, w, form = hessian(256), rows(4, 256), FORMATS[qtype]
    packed = start(w, h, qtype, by_gptq=False)
    kept = (packed.clone(), w.clone(), h.clone())
    out = descend(form, packed, w, h)
    assert all(torch.equal(a, b) for a, b in zip(kept, (packed, w, h), strict=True))
    assert out.shape == packed.shape and out.dtype == torch.uint8
    assert torch.equal(descend(form, packed, w, h, n_sweeps=0), packed)
    assert not native.dequantize(out[:1].numpy(), qtype).any(), "a row of zeros stays one"


@EACH
def test_taking_apart_and_putting_together(qtype: QuantType) -> None:
    h, w, form = hessian(), rows(), FORMATS[qtype]
    packed = start(w, h, qtype, by_gptq=True)
    state = take_apart(form, packed, w, h)
    assert torch.equal(put_together(state, packed), packed)
    e = torch.from_numpy(native.dequantize(packed.numpy(), qtype)) - w
    assert torch.allclose(state.gradient, e @ h, atol=1e-4)


def test_the_state_after_steps_is_what_the_bytes_say() -> None:
    """What the steps claim to have added is what the stored numbers became."""
    h, w = hessian(256), rows(6, 256)
    for qtype in TYPES:
        form = FORMATS[qtype]
        packed = start(w, h, qtype, by_gptq=True)
        seen: list[torch.Tensor] = []

        def step(state, block, seen=seen):  # type: ignore[no-untyped-def]
            change = step_block(state, block)
            seen.append(change)
            return change

        out = descend(form, packed, w, h, n_sweeps=1, step=step)
        moved = native.dequantize(out.numpy(), qtype) - native.dequantize(packed.numpy(), qtype)
        assert np.allclose(torch.cat(seen, 1).numpy(), moved, atol=2e-6), qtype


def test_dead_columns_and_rows_without_scale() -> None:
    """A Hessian whose damped diagonal is small, rows of zeros, rows of one value: all finite."""
    h = torch.eye(256) * 1e-6
    h[:200, :200] += hessian(200)
    w = rows(4, 256)
    w[2] = 0.25
    for qtype in TYPES:
        packed = start(w, h, qtype, by_gptq=False)
        out = descend(FORMATS[qtype], packed, w, h)
        assert np.isfinite(native.dequantize(out.numpy(), qtype)).all()
        assert bool((row_errors(FORMATS[qtype], out, w, h) < torch.inf).all())


def test_broken_scales_count_as_infinitely_bad() -> None:
    h, w, form = hessian(256), rows(5, 256)[2:], FORMATS[QuantType("Q4_K")]
    packed = start(w, h, QuantType("Q4_K"), by_gptq=False)
    broken = form.with_scales(packed, form.scales(packed) * torch.tensor([[1], [1e9], [torch.nan]]))
    errors = row_errors(form, broken, w, h)
    assert torch.isfinite(errors[0]) and torch.isinf(errors[1:]).all()


def rounded(x: np.ndarray) -> np.ndarray:
    out = x.copy()
    round_to_half(out)
    return out


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_rounding_to_half_is_numpys(x: float) -> None:
    """Ties to even, subnormals, and the largest finite value instead of infinity."""
    with np.errstate(over="ignore"):
        wanted = np.float32(np.float16(np.float32(x)))
    wanted = np.clip(wanted, np.float32(-65504), np.float32(65504))
    assert rounded(np.array([x], np.float32))[0] == wanted


def test_rounding_to_half_at_every_midpoint() -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[1:] + halves[:-1]) / 2
    for values in (halves, middles, np.nextafter(middles, 0), np.nextafter(middles, np.inf)):
        some = values[:: 7 if len(values) > 4000 else 1]
        wanted = np.minimum(some.astype(np.float16).astype(np.float32), 65504)
        assert np.array_equal(rounded(some), wanted)
        assert np.array_equal(rounded(-some), -wanted)
