"""Block formats, to the bit: our reading of a block against libggml's.

On bytes that ggml made, on random bytes with every finite float16 scale, and on extreme codes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from blocks import (
    ALL_FORMATS,
    HALVES,
    N_COLUMNS,
    WITH_HALVES,
    finite_halves,
    gguf_values,
    half_lists,
    importance,
    our_values,
    random_blocks,
    same_bits,
    weights,
)
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from quantkit.ggml import e8m0, native
from quantkit.ggml.formats import FORMATS
from quantkit.ggml.types import QuantType
from quantkit.gptq.roundings_cpu import round_to_power


@ALL_FORMATS
@pytest.mark.parametrize("weighted", [False, True])
def test_grid_and_codes_reproduce_ggmls_values(qtype: QuantType, weighted: bool) -> None:
    packed = native.quantize(weights(), qtype, importance() if weighted else None)
    ours = our_values(packed, FORMATS[qtype])
    assert same_bits(ours, gguf_values(packed, qtype))
    assert same_bits(ours, native.dequantize(packed, qtype))
    assert not ours[0].any() or qtype.name in ("IQ4_NL", "IQ4_XS")  # their table has no zero


@ALL_FORMATS
@examples(30)
@given(seed=st.integers(0, 2**32 - 1), halves=half_lists)
def test_any_bytes_are_read_as_ggml_reads_them(
    qtype: QuantType, seed: int, halves: list[int]
) -> None:
    packed = random_blocks(qtype, np.random.default_rng(seed), 3, halves)
    ours = our_values(packed, FORMATS[qtype])
    assert same_bits(ours, native.dequantize(packed, qtype))
    assert same_bits(ours, gguf_values(packed, qtype))


@WITH_HALVES
def test_all_finite_scales_are_read_as_ggml_reads_them(qtype: QuantType) -> None:
    """All 63,488 finite float16 bit patterns, denormals and negative zero among them."""
    patterns = [bits for bits in range(1 << 16) if bits & 0x7C00 != 0x7C00]
    per_row = N_COLUMNS // qtype.block_size * len(HALVES[qtype.name])
    n_rows = -(-len(patterns) // per_row)
    packed = random_blocks(qtype, np.random.default_rng(3), n_rows, patterns)
    assert same_bits(our_values(packed, FORMATS[qtype]), native.dequantize(packed, qtype))


@ALL_FORMATS
@examples(30)
@given(data=st.data())
def test_packing_round_trips(qtype: QuantType, data: st.DataObject) -> None:
    """Any codes go in and come out; the scales and everything else of the bytes stay."""
    form = FORMATS[qtype]
    low, high = form.low, form.high
    edges = st.sampled_from((low, high, 0, min(1, high)))
    codes = data.draw(
        npst.arrays(np.int16, (2, N_COLUMNS), elements=st.integers(low, high) | edges, fill=edges)
    )
    seed, halves = data.draw(st.integers(0, 1000)), data.draw(half_lists)
    packed = torch.from_numpy(random_blocks(qtype, np.random.default_rng(seed), 2, halves))
    before = packed.clone()
    changed = form.with_codes(packed, torch.from_numpy(codes))
    assert bool((packed == before).all()), "the argument was written to"
    assert np.array_equal(form.codes(changed).numpy(), codes)
    old, new = form.grid(packed), form.grid(changed)
    assert torch.equal(old.scale, new.scale) and torch.equal(old.minimum, new.minimum)
    back = form.with_codes(changed, form.codes(packed))
    stored = form.codes(packed)
    if bool((stored >= low).all()):  # Q8_0's -128 is not a code of ours, yet comes out of bytes
        assert torch.equal(back, packed)


@ALL_FORMATS
def test_extreme_codes(qtype: QuantType) -> None:
    """Every code in every position of a block, through libggml's own reading of the bytes."""
    form = FORMATS[qtype]
    packed = torch.from_numpy(native.quantize(weights(4), qtype, importance()))[3:]
    grid = form.grid(packed)
    for code in range(form.low, form.high + 1):
        codes = torch.full((1, N_COLUMNS), code, dtype=torch.int16)
        changed = form.with_codes(packed, codes)
        assert bool((form.codes(changed) == code).all())
        values = native.dequantize(changed.numpy(), qtype)
        assert same_bits(values, grid.values(codes).numpy())


@ALL_FORMATS
def test_each_code_lands_in_its_own_column(qtype: QuantType) -> None:
    """One odd code among equal ones moves one value, in its own column."""
    form = FORMATS[qtype]
    packed = torch.from_numpy(native.quantize(weights(4), qtype, importance()))[3:]
    flat = torch.full((1, N_COLUMNS), form.low, dtype=torch.int16)
    before = native.dequantize(form.with_codes(packed, flat).numpy(), qtype)
    n = qtype.block_size
    codes = flat.repeat(n, 1)
    codes[torch.arange(n), torch.arange(n)] = form.high
    changed = form.with_codes(packed.repeat(n, 1), codes)
    moved = native.dequantize(changed.numpy(), qtype) != before
    assert np.array_equal(np.argwhere(moved), np.stack([np.arange(n)] * 2, 1))


@ALL_FORMATS
def test_ggmls_codes_lie_within_the_format(qtype: QuantType) -> None:
    form = FORMATS[qtype]
    packed = torch.from_numpy(native.quantize(weights(8), qtype, importance()))
    codes = form.codes(packed)
    assert int(codes.min()) >= form.low and int(codes.max()) <= form.high
    assert codes.dtype == torch.int16 and codes.shape == (8, N_COLUMNS)
    assert form.grid(packed).scale.shape == (8, N_COLUMNS // form.group)


@WITH_HALVES
@examples(20)
@given(halves=st.lists(finite_halves, min_size=2, max_size=8))
def test_other_scales_go_in_and_nothing_else_changes(qtype: QuantType, halves: list[int]) -> None:
    form, at = FORMATS[qtype], HALVES[qtype.name]
    packed = torch.from_numpy(native.quantize(weights(2, seed=5), qtype, importance()))
    n_blocks = N_COLUMNS // qtype.block_size
    bits = np.resize(np.array(halves, np.uint16), (2, len(at), n_blocks))
    scales = torch.from_numpy(bits.view(np.float16).astype(np.float32).reshape(2, -1))
    changed = form.with_scales(packed, scales)
    assert torch.equal(form.codes(changed), form.codes(packed))
    wanted = packed.numpy().copy().reshape(2, n_blocks, -1)
    for field, start in enumerate(at):
        wanted[..., start : start + 2] = bits[:, field, :, None].view(np.uint8)
    assert np.array_equal(changed.numpy().reshape(wanted.shape), wanted)
    assert torch.equal(form.scales(changed), scales)
    assert torch.equal(form.with_scales(packed, form.scales(packed)), packed)


HAVE_INTEGERS = pytest.mark.parametrize(
    "qtype", [q for q, f in FORMATS.items() if f.scale_range], ids=str
)


@HAVE_INTEGERS
@examples(20)
@given(seed=st.integers(0, 2**32 - 1))
def test_integer_scales_round_trip(qtype: QuantType, seed: int) -> None:
    """Any integers in the format's ranges, the ends among them; codes, d and dmin stay."""
    form, rng = FORMATS[qtype], np.random.default_rng(seed)
    packed = torch.from_numpy(random_blocks(qtype, rng, 3, [0x3C00, 0x0001, 0xBC00]))

    def draw(limits: tuple[int, int] | None) -> torch.Tensor:
        low, high = limits or (0, 0)
        values = rng.integers(low, high + 1, (3, N_COLUMNS // form.group))
        values.flat[rng.integers(values.size, size=9)] = low
        values.flat[rng.integers(values.size, size=9)] = high
        return torch.from_numpy(values).float()

    scale, minimum = draw(form.scale_range), draw(form.minimum_range)
    changed = form.with_multipliers(packed, scale, minimum)
    read_scale, read_minimum = form.multipliers(form.blocks(changed))
    assert torch.equal(read_scale.reshape(3, -1), scale)
    if form.minimum_range is not None:
        assert torch.equal(read_minimum.reshape(3, -1), minimum)
    assert torch.equal(form.codes(changed), form.codes(packed))
    assert torch.equal(form.scales(changed), form.scales(packed))
    assert same_bits(our_values(changed.numpy(), form), native.dequantize(changed.numpy(), qtype))
    own = (x.reshape(3, -1) for x in form.multipliers(form.blocks(packed)))
    assert torch.equal(form.with_multipliers(packed, *own), packed)


@HAVE_INTEGERS
def test_integer_ranges_are_what_the_bits_hold(qtype: QuantType) -> None:
    """Over random bytes every value of the range is met, and none outside."""
    form = FORMATS[qtype]
    packed = random_blocks(qtype, np.random.default_rng(1), 400, [0x3C00])
    found = form.multipliers(form.blocks(torch.from_numpy(packed)))
    for limits, values in zip((form.scale_range, form.minimum_range), found, strict=True):
        if limits is not None:
            assert (int(values.min()), int(values.max())) == limits
            assert len(values.unique()) == limits[1] - limits[0] + 1


@ALL_FORMATS
@given(level=st.floats(-200, 200, width=32))
def test_nearest_code(qtype: QuantType, level: float) -> None:
    form = FORMATS[qtype]
    levels = np.array(form.table or range(form.low, form.high + 1), np.float64)
    code = int(form.nearest(torch.tensor([level]))[0])
    assert form.low <= code <= form.high
    assert abs(levels[code - form.low] - level) == np.abs(levels - level).min()


def test_scales_of_one_byte_are_ggmls() -> None:
    """All 256, the denormal ones and that of NaN, which ggml reads as a number, among them."""
    qtype = QuantType("MXFP4")
    packed = np.zeros((256, qtype.block_bytes), np.uint8)
    packed[:, 0], packed[:, 1:] = np.arange(256), 1  # codes of half, which ggml has doubled
    scales = FORMATS[qtype].scales(torch.from_numpy(packed)).numpy()
    assert np.array_equal(scales, native.dequantize(packed, qtype)[:, :1])


@given(st.floats(0, 2.0**126, width=32))
def test_the_nearest_scale_of_one_byte(scale: float) -> None:
    all_scales = e8m0.decode(torch.arange(255, dtype=torch.uint8)).numpy().astype(np.float64)
    found = float(e8m0.nearest(torch.tensor([scale]))[0])
    assert found in all_scales and e8m0.nearest(torch.tensor([-scale])) == found
    assert abs(found - scale) == np.abs(all_scales - scale).min()
    compiled = np.array([scale], np.float32)
    round_to_power(compiled)
    assert compiled[0] == found


def test_bytes_keep_their_scales() -> None:
    form = FORMATS[QuantType("MXFP4")]
    packed = torch.from_numpy(native.quantize(weights(), form.qtype))
    assert torch.equal(form.with_scales(packed, form.scales(packed)), packed)
    changed = form.with_scales(packed, 4 * form.scales(packed))
    assert torch.equal(form.codes(changed), form.codes(packed))
    assert torch.equal(form.scales(changed), 4 * form.scales(packed))


def test_the_order_of_the_two_scales_is_as_the_fields_say() -> None:
    """`HALVES` above lists d before dmin; so does every format."""
    for qtype, form in FORMATS.items():
        if not HALVES[qtype.name]:
            continue
        fields = [form.d_at] + ([] if form.dmin_at is None else [form.dmin_at])
        assert tuple(fields) == HALVES[qtype.name]
