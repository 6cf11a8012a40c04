"""ggml's own quantizers and decoders as we call them, against gguf-py, to the bit."""

from __future__ import annotations

import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
from blocks import (
    ALL_TYPES,
    CAN_QUANTIZE_IN_GGUF,
    N_COLUMNS,
    QUANTIZED_SLOWLY_LAST,
    QUICK,
    gguf_values,
    half_lists,
    importance,
    random_blocks,
    same_bits,
    weights,
)
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import QuantkitError
from quantkit.ggml import native
from quantkit.ggml.types import BF16, F16, F32, QUANTIZED, QuantType


def kind(qtype: QuantType) -> gguf.GGMLQuantizationType:
    """gguf-py's own number; ValueError for what it does not have."""
    return gguf.GGMLQuantizationType(qtype.ggml)


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
    wanted = gguf.quants.quantize(values, kind(qtype))
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
    ours, wanted = native.quantize(values, qtype), gguf.quants.quantize(values, kind(qtype))
    wrong = np.argwhere((ours != wanted).reshape(-1, qtype.block_bytes).any(1))
    assert len(wrong) == 0, f"{len(wrong)} blocks differ, the first is {wrong[:1]}"


def test_gguf_quantizes_what_is_listed_and_nothing_else() -> None:
    for qtype in QUANTIZED:
        try:
            gguf.quants.quantize(np.zeros((1, 256), np.float32), kind(qtype))
            able = True
        except (NotImplementedError, ValueError):
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
from quantkit.ggml import native
from quantkit.ggml.types import QuantType
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
