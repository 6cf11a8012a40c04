"""Blocks of every quantized type, random or made by ggml, for tests of formats. Holds no tests."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from quantkit.ggml.formats import FORMATS, Format
from quantkit.ggml.types import QUANTIZED, QuantType

N_COLUMNS = 512
WITH_HALVES = pytest.mark.parametrize("qtype", [q for q in FORMATS if q.name != "MXFP4"], ids=str)
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
    "Q2_0": (0,),
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
    """Values as gguf-py reads them, or as is written here for what it cannot."""
    if qtype.name == "Q2_0":
        blocks = packed.reshape(-1, 18)
        d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        codes = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").reshape(-1, 64, 2)
        levels = (codes[..., 0] + 2 * codes[..., 1]).astype(np.float32) - 1
        return (levels * d).reshape(len(packed), -1)
    return gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(qtype.ggml))


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
