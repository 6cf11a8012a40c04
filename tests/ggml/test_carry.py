"""Integers of other quantizers on GGUF's grids: equal to the bit as libggml reads them, or said to
be off.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from quantkit.ggml import native
from quantkit.ggml.carry import TYPES, carry, has_room
from quantkit.ggml.types import QuantType


def integers(
    low: int, high: int, group: int, seed: int = 0, n_rows: int = 6, n_columns: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of every size, and float16 scales of groups of columns."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(low, high + 1, (n_rows, n_columns)).astype(np.int16)
    codes[:, ::group], codes[:, 1::group] = low, high
    scale = rng.uniform(1e-3, 0.05, (n_rows, n_columns // group)).astype(np.float16)
    wide = scale.astype(np.float32).repeat(group // 32, 1)
    return torch.from_numpy(codes), torch.from_numpy(wide)


def first_exact(codes: torch.Tensor, scale: torch.Tensor) -> str | None:
    for qtype in TYPES:
        if has_room(codes, scale, qtype):
            made = carry(codes, scale, qtype)
            values = native.dequantize(made.packed.numpy(), qtype)
            wanted = codes.numpy().astype(np.float32) * scale.numpy().repeat(32, 1)
            assert made.n_equal == int((values == wanted).sum())
            if made.n_equal == codes.numel():
                assert np.array_equal(values, wanted) and made.off == 0
                return qtype.name
    return None


@pytest.mark.parametrize(
    ("low", "high", "group", "name"),
    [
        (-1, 1, 64, "Q2_0"),  # ternary
        (-1, 2, 128, "Q2_0"),
        (-2, 1, 64, "Q2_0"),  # symmetric 2 bits: the scale turns
        (-2, 1, 32, "Q4_0"),  # no block of Q2_0 is that short
        (-3, 0, 512, "Q2_K"),  # affine, with a scale a row
        (-4, 3, 512, "Q3_K"),
        (-4, 3, 128, "Q4_0"),  # symmetric 3 bits
        (-8, 7, 32, "Q4_0"),
        (-7, 8, 32, "Q4_0"),
        (-8, 7, 128, "Q4_0"),
        (-5, 10, 256, "Q4_K"),  # affine 4 bits, one scale for a block of 256
        (-4, 11, 128, "Q4_1"),  # 4 scales are a float16
        (-15, 15, 128, "Q5_0"),  # affine 4 bits with any zeros
        (-128, 127, 32, "Q8_0"),
        (-128, 127, 128, "Q8_0"),
        (-127, 128, 32, "Q8_0"),
        (-255, 0, 32, None),  # affine 8 bits: a minimum of one scale has no room
    ],
)
def test_the_smallest_type_that_holds_them(
    low: int, high: int, group: int, name: str | None
) -> None:
    assert first_exact(*integers(low, high, group)) == name


@examples(40)
@given(st.integers(-8, 0), st.sampled_from((32, 64, 128)), st.integers(0, 1000))
def test_affine_codes_are_off_by_their_minimum_alone(low: int, group: int, seed: int) -> None:
    """Four bits with any zero: in Q4_1 off by half a unit of a float16, in Q5_0 not at all."""
    codes, scale = integers(low, low + 15, group, seed)
    made = carry(codes, scale, QuantType("Q4_1"))
    assert made.off <= 1e-6 * made.power
    values = native.dequantize(made.packed.numpy(), QuantType("Q4_1"))
    wanted = codes.float() * scale.repeat_interleave(32, 1)
    assert np.abs(values - wanted.numpy()).max() <= 2**-11 * 8 * float(scale.max())


def test_scales_that_are_no_float16_are_off() -> None:
    codes, scale = integers(-8, 7, 32)
    made = carry(codes, scale * (1 + 2**-14), QuantType("Q4_0"))
    assert 0 < made.off < 1e-7 * made.power and made.n_equal < codes.numel()
    assert made.n_equal >= int((codes == 0).sum())


def test_groups_that_cut_a_block_have_no_room() -> None:
    codes, scale = integers(-1, 1, 64)
    shifted = scale.roll(1, 1)
    assert has_room(codes, scale, QuantType("Q2_0"))
    assert not has_room(codes, shifted, QuantType("Q2_0"))
    assert not has_room(codes[:, :32], scale[:, :1], QuantType("Q2_0"))
