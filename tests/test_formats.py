"""Block formats and ggml's own quantizers, to the bit.

Compared with each other: our reading of a block (grid and codes), gguf-py's `dequantize` and
libggml's `dequantize_row_*`, on bytes that ggml made, on random bytes with every finite float16
scale, and on extreme codes. `native.quantize` is compared with gguf-py where that can quantize.
"""

from __future__ import annotations

import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from quantkit.errors import QuantkitError
from quantkit.kquants import native
from quantkit.kquants.formats import FORMATS, Format
from quantkit.qtypes import BF16, F16, F32, QUANTIZED, QuantType

N_COLUMNS = 512
ALL_FORMATS = pytest.mark.parametrize("qtype", FORMATS, ids=str)
ALL_TYPES = pytest.mark.parametrize("qtype", QUANTIZED, ids=str)

# ggml builds tables for these once per process, which takes seconds.
_SLOW = ("IQ1_S", "IQ1_M", "IQ2_XS", "IQ2_S")
QUANTIZED_SLOWLY_LAST = [
    pytest.param(q, marks=pytest.mark.slow, id=q.name) if q.name in _SLOW else q for q in QUANTIZED
]
QUICK = [q for q in QUANTIZED if q.name not in _SLOW]
CAN_QUANTIZE_IN_GGUF = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"}

# Where the float16 fields lie in a block, counted in bytes: from the structs of ggml-common.h, not
# from quantkit.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "IQ4_NL": (0,),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_XS": (0,),
    "IQ1_S": (0,),
    "IQ1_M": (),  # its scale is spread over the high nibbles of four fields
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "MXFP4": (),
}


def weights(n_rows: int = 6, n_columns: int = N_COLUMNS, seed: int = 0) -> np.ndarray:
    """Rows of several magnitudes: one all zeros, one with a zero block, one with an outlier."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((n_rows, n_columns), np.float32)
    values *= np.logspace(-3, 2, n_rows, dtype=np.float32)[:, None]
    values[0] = 0
    values[1:2, :256] = 0
    values[2:3, 7] = 300
    return values


def importance(n_columns: int = N_COLUMNS, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random(n_columns, np.float32) + np.float32(0.01)


def gguf_values(packed: np.ndarray, qtype: QuantType) -> np.ndarray:
    return gguf.quants.dequantize(packed, qtype.ggml)


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal to the bit, but for the sign of zero and the payload of NaN: there gguf-py and libggml
    differ themselves.
    """
    assert one.dtype == other.dtype == np.float32 and one.shape == other.shape
    equal = one.view(np.uint32) == other.view(np.uint32)
    equal |= ((one == 0) & (other == 0)) | (np.isnan(one) & np.isnan(other))
    return bool(equal.all())


def our_values(packed: np.ndarray, form: Format) -> np.ndarray:
    rows = torch.from_numpy(packed.copy())
    return form.grid(rows).values(form.codes(rows)).numpy()


def random_blocks(
    qtype: QuantType, rng: np.random.Generator, n_rows: int, halves: list[int]
) -> np.ndarray:
    """Random bytes, and in the float16 fields the given bit patterns in turn."""
    n_blocks = N_COLUMNS // qtype.block_size
    packed = rng.integers(0, 256, (n_rows, n_blocks, qtype.block_bytes), dtype=np.uint8)
    if not HALVES[qtype.name]:
        return packed.reshape(n_rows, -1)
    patterns = np.resize(np.array(halves, np.uint16), (n_rows, n_blocks, len(HALVES[qtype.name])))
    for field, at in enumerate(HALVES[qtype.name]):
        packed[..., at : at + 2] = patterns[..., field, None].view(np.uint8)
    return packed.reshape(n_rows, -1)


finite_halves = st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7C00 != 0x7C00)
half_lists = st.lists(finite_halves, min_size=1, max_size=16)


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


@ALL_FORMATS
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


@ALL_FORMATS
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


def test_the_order_of_the_two_scales_is_as_the_fields_say() -> None:
    """`HALVES` above lists d before dmin; so does every format."""
    for qtype, form in FORMATS.items():
        fields = [form.d_at] + ([] if form.dmin_at is None else [form.dmin_at])
        assert tuple(fields) == HALVES[qtype.name]


@ALL_TYPES
@examples(10)
@given(seed=st.integers(0, 2**32 - 1), halves=half_lists)
def test_any_bytes_have_ggufs_values(qtype: QuantType, seed: int, halves: list[int]) -> None:
    packed = random_blocks(qtype, np.random.default_rng(seed), 3, halves)
    with np.errstate(all="ignore"):
        assert same_bits(native.dequantize(packed, qtype), gguf_values(packed, qtype))


@pytest.mark.parametrize("qtype", QUANTIZED_SLOWLY_LAST, ids=str)
def test_what_ggml_made_has_ggufs_values(qtype: QuantType) -> None:
    packed = native.quantize(weights(), qtype, importance())
    values = native.dequantize(packed, qtype)
    assert values.shape == (6, N_COLUMNS) and packed.shape == (6, qtype.row_bytes(N_COLUMNS))
    assert same_bits(values, gguf_values(packed, qtype))


@pytest.mark.parametrize("qtype", (F32, F16, BF16), ids=str)
def test_plain_types(qtype: QuantType) -> None:
    """Rounding to 16 bits is gguf's, and for values that have 16 bits nothing is lost."""
    values = weights()
    packed = native.quantize(values, qtype)
    wanted = gguf.quants.quantize(values, qtype.ggml)
    assert packed.tobytes() == wanted.tobytes()
    assert packed.shape == (6, qtype.row_bytes(N_COLUMNS))
    again = native.quantize(native.dequantize(packed, qtype), qtype)
    assert np.array_equal(again, packed)


@pytest.mark.parametrize("name", sorted(CAN_QUANTIZE_IN_GGUF))
def test_quantize_is_ggufs_to_the_byte(name: str) -> None:
    """Values of few bits, so that the answer does not hang on whether ggml was built with FMA: with
    it Q4_0 and Q5_0 round some ties the other way (gguf-py PR 8939).
    """
    qtype = QuantType(name)
    rng = np.random.default_rng(0)
    values = rng.integers(-64, 65, (16, N_COLUMNS)).astype(np.float32) / np.float32(16)
    values[0] = 0
    values[1, :256] = 0
    ours, wanted = native.quantize(values, qtype), gguf.quants.quantize(values, qtype.ggml)
    wrong = np.argwhere((ours != wanted).reshape(-1, qtype.block_bytes).any(1))
    assert len(wrong) == 0, f"{len(wrong)} blocks differ, the first is {wrong[:1]}"


def test_gguf_quantizes_what_is_listed_and_nothing_else() -> None:
    for qtype in QUANTIZED:
        try:
            gguf.quants.quantize(np.zeros((1, 256), np.float32), qtype.ggml)
            able = True
        except NotImplementedError:
            able = False
        assert able == (qtype.name in CAN_QUANTIZE_IN_GGUF)


@pytest.mark.parametrize("qtype", QUANTIZED_SLOWLY_LAST, ids=str)
def test_rows_do_not_depend_on_each_other(qtype: QuantType) -> None:
    """Row by row gives the bytes of all at once: how the work is cut among threads cannot show."""
    values = weights(200, 256, seed=9)
    together = native.quantize(values, qtype, importance(256))
    some = [0, 1, 63, 64, 199]
    apart = [native.quantize(row[None], qtype, importance(256)) for row in values[some]]
    assert np.array_equal(together[some], np.concatenate(apart))
    values = native.dequantize(together, qtype)
    assert np.array_equal(values[[64]], native.dequantize(together[[64]], qtype))


_DIGEST = """
import hashlib, os
n = int(os.environ["N_CORES"])
os.cpu_count = lambda: n
import numpy as np
from quantkit.kquants import native
from quantkit.qtypes import QuantType
rng = np.random.default_rng(0)
values = rng.standard_normal((150, 256), np.float32)
importance = rng.random(256, np.float32)
digest = hashlib.sha256()
for name in os.environ["TYPES"].split():
    qtype = QuantType(name)
    packed = native.quantize(values, qtype, importance)
    digest.update(packed.tobytes() + native.dequantize(packed, qtype).tobytes())
assert native._pool()._max_workers == n
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_thread_count_does_not_show() -> None:
    digests = set()
    for n in (1, 7):
        types = " ".join(q.name for q in QUICK)
        environment = {**os.environ, "N_CORES": str(n), "TYPES": types}
        result = subprocess.run(
            [sys.executable, "-c", _DIGEST], env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        digests.add(result.stdout)
    assert len(digests) == 1


def test_importances_matter_and_must_fit() -> None:
    values, q4 = weights(), QuantType("Q4_K")
    plain, weighted = native.quantize(values, q4), native.quantize(values, q4, importance())
    assert not np.array_equal(plain, weighted)
    with pytest.raises(ValueError, match="columns"):
        native.quantize(values, q4, importance(256))
    with pytest.raises(ValueError, match="100"):
        native.quantize(weights(2, 100), q4)


def test_codebooks_want_importances() -> None:
    needy = {q.name for q in QUANTIZED if native.requires_imatrix(q)}
    assert needy == {"IQ1_S", "IQ2_XXS", "IQ2_XS"}
    with pytest.raises(QuantkitError, match="importance matrix"):
        native.quantize(weights(), QuantType("IQ2_XXS"))


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("Q4_0", np.nan),
        ("Q4_0", np.inf),
        ("F32", np.nan),
        ("F16", np.nan),
        ("BF16", np.inf),
        ("Q8_0", np.inf),
        ("Q4_K", np.inf),
        ("Q8_0", np.nan),
        ("Q4_K", np.nan),
        ("Q6_K", np.nan),
        ("Q6_K", np.inf),
        ("IQ4_XS", np.nan),
        ("IQ4_XS", np.inf),
    ],
)
def test_weights_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    values = weights()
    values[5, 300] = bad
    with pytest.raises(QuantkitError, match="invalid"):
        native.quantize(values, QuantType(name), importance() if name[0] in "QI" else None)


def test_weights_that_are_too_large_are_refused() -> None:
    values = weights()
    values[5, 300] = 1e9
    with pytest.raises(QuantkitError, match="F16 gave invalid"):
        native.quantize(values, QuantType("F16"))


def test_empty_and_strided_rows() -> None:
    q4 = QuantType("Q4_K")
    assert native.quantize(np.zeros((0, 256), np.float32), q4).shape == (0, 144)
    values = weights(8)
    assert np.array_equal(native.quantize(values[::2], q4), native.quantize(values, q4)[::2])
    packed = native.quantize(values, q4)
    assert np.array_equal(native.dequantize(packed[::2], q4), native.dequantize(packed, q4)[::2])
