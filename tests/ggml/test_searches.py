"""Scales that we search where ggml does not: never worse than its rounding, for any block."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from blocks import N_COLUMNS, importance, weights

from quantkit.errors import QuantkitError
from quantkit.ggml import native, searches
from quantkit.ggml.formats import FORMATS
from quantkit.ggml.types import QuantType

EACH = pytest.mark.parametrize("qtype", searches.SEARCHED, ids=str)


def block_errors(packed: np.ndarray, qtype: QuantType, w: np.ndarray, shares: np.ndarray):
    squares = (native.dequantize(packed, qtype) - w) ** 2 * shares
    return squares.reshape(len(w), -1, qtype.block_size).sum(2)


@EACH
def test_no_block_is_worse_than_ggmls(qtype: QuantType) -> None:
    w, shares = weights(12), importance()
    ours = searches.quantize(torch.from_numpy(w), qtype, torch.from_numpy(shares)).numpy()
    before = block_errors(native.quantize(w, qtype, shares), qtype, w, shares)
    after = block_errors(ours, qtype, w, shares)
    assert (after <= before * (1 + 1e-3) + 1e-30).all()
    assert after.sum() < 0.95 * before.sum()
    assert not native.dequantize(ours[:1], qtype).any(), "a row of zeros stays one"


def test_scales_of_two_bits_have_both_signs() -> None:
    """Code 2 is for the side that reaches farther."""
    w = weights(12)
    ours = searches.quantize(torch.from_numpy(w), QuantType("Q2_0"), None)
    form = FORMATS[QuantType("Q2_0")]
    assert bool((form.scales(ours) < 0).any() and (form.scales(ours) > 0).any())
    assert bool((form.codes(ours) == 2).any())


def test_a_grid_of_four_values_is_found(seed: int = 0) -> None:
    """Weights that lie on it come back to the bit, whichever side reaches farther."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-1, 3, (9, N_COLUMNS)).astype(np.float32)
    d = rng.uniform(-0.1, 0.1, (9, N_COLUMNS // 64)).astype(np.float16).astype(np.float32)
    w = codes * d.repeat(64, 1)
    packed = searches.quantize(torch.from_numpy(w), QuantType("Q2_0"), None)
    assert np.array_equal(native.dequantize(packed.numpy(), QuantType("Q2_0")), w)


@EACH
def test_each_expert_has_its_importances(qtype: QuantType) -> None:
    w = torch.from_numpy(weights(12))
    shares = torch.from_numpy(np.stack([importance(seed=k) for k in range(3)]))
    together = searches.quantize(w, qtype, shares)
    parts = zip(w.chunk(3), shares, strict=True)
    assert torch.equal(together, torch.cat([searches.quantize(a, qtype, b) for a, b in parts]))


@EACH
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(qtype: QuantType, bad: float) -> None:
    w = torch.from_numpy(weights())
    w[5, 300] = bad
    with pytest.raises(QuantkitError, match="invalid"):
        searches.quantize(w, qtype, None)
