"""Quantization types: sizes against gguf's own table, fallbacks against llama.cpp's own dry run."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_gguf import Shape, write_llama

from quantkit.errors import UsageError
from quantkit.ggml.types import (
    BF16,
    F16,
    F32,
    FILE_TYPES,
    QUANTIZED,
    STOCK_MIXES,
    QuantType,
    fallback,
    file_label,
)
from quantkit.llamacpp.stock import StockRecipe, stock_types

LABELS = (*STOCK_MIXES, "TQ1_0", "TQ2_0", "MXFP4_MOE", "Q2_0")
SIZES = {qtype.name: sizes for qtype, sizes in gguf.GGML_QUANT_SIZES.items()}
MATRIX = "blk.0.ffn_up.weight"


@pytest.mark.parametrize("qtype", (*QUANTIZED, F32, F16, BF16), ids=str)
def test_sizes_are_those_of_ggufs_table(qtype: QuantType) -> None:
    block_size, block_bytes = SIZES.get(qtype.name, (64, 18))  # of Q2_0 by block_q2_0
    assert (qtype.block_size, qtype.block_bytes) == (block_size, block_bytes)
    assert qtype.bpw == 8 * block_bytes / block_size
    assert qtype.is_quantized == (block_size > 1)
    columns = 3 * block_size
    assert qtype.row_bytes(columns) == 3 * block_bytes
    assert qtype.n_bytes((5, 7, columns)) == 5 * 7 * 3 * block_bytes
    assert qtype.n_bytes((columns,)) == 3 * block_bytes
    assert QuantType.of(int(qtype.ggml)) == qtype


def test_known_bits_per_weight() -> None:
    """Figures known from llama.cpp's documentation; a table read at the wrong index would
    differ.
    """
    wanted = {"Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625}
    wanted |= {"Q4_0": 4.5, "Q4_1": 5.0, "Q5_0": 5.5, "Q5_1": 6.0, "Q8_0": 8.5, "IQ4_XS": 4.25}
    wanted |= {"IQ4_NL": 4.5, "IQ2_S": 2.5625, "IQ3_S": 3.4375, "F16": 16.0, "F32": 32.0}
    wanted |= {"Q2_0": 2.25, "MXFP4": 4.25}
    assert {name: QuantType(name).bpw for name in wanted} == wanted


@given(st.integers(1, 5000), st.sampled_from(QUANTIZED))
def test_rows_that_do_not_divide_are_refused(n_columns: int, qtype: QuantType) -> None:
    if n_columns % qtype.block_size:
        assert not qtype.fits(n_columns)
        with pytest.raises(ValueError, match=str(n_columns)):
            qtype.row_bytes(n_columns)
    else:
        assert qtype.fits(n_columns) and qtype.row_bytes(n_columns) > 0


def test_unknown_types_are_a_users_error() -> None:
    for name in ("Q4_K_M", "q4_k", "4.5", ""):
        with pytest.raises(UsageError, match="Q4_K"):
            QuantType(name)


def test_order_is_by_bytes_then_name() -> None:
    ordered = sorted((*QUANTIZED, F32, F16, BF16))
    assert [q.bpw for q in ordered] == sorted(q.bpw for q in ordered)
    position = {q.name: i for i, q in enumerate(ordered)}
    assert position["IQ4_NL"] < position["Q4_0"] < position["Q4_K"]  # all of 4.5 bits
    assert position["BF16"] < position["F16"]
    assert max(ordered) == F32


def test_file_types_have_llama_cpps_numbers() -> None:
    """llama.h: LLAMA_FTYPE_ALL_F32 = 0, ..._Q8_0 = 7, ..._Q4_K_M = 15, ..._BF16 = 32."""
    wanted = {"F32": 0, "F16": 1, "Q8_0": 7, "Q4_K_M": 15, "Q6_K": 18, "IQ4_XS": 30, "BF16": 32}
    wanted |= {"Q2_0": 41}
    assert {label: FILE_TYPES[label] for label in wanted} == wanted
    assert set(STOCK_MIXES) <= set(FILE_TYPES)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, QuantType]:
    """The one type of every label's pure file, asked of llama.cpp where every type fits."""
    base = write_llama(tmp_path_factory.mktemp("wide") / "base.gguf")
    return {label: stock_types(base, StockRecipe(label, pure=True))[MATRIX] for label in LABELS}


def test_the_dry_runs_name_every_type(asked: dict[str, QuantType]) -> None:
    assert set(asked.values()) == set(QUANTIZED)


def test_a_file_of_one_type_has_the_label_of_that_type(asked: dict[str, QuantType]) -> None:
    for qtype in QUANTIZED:
        assert asked[file_label(qtype)] == qtype


@pytest.mark.parametrize("stored", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("width", [64, 80, 96, 256, 288])
def test_fallback_is_llama_cpps(
    width: int, stored: str, asked: dict[str, QuantType], tmp_path: Path
) -> None:
    base = write_llama(tmp_path / "base.gguf", Shape(n_embd=width, n_ff=width, stored=stored))
    for label, qtype in asked.items():
        types = stock_types(base, StockRecipe(label, pure=True))
        matrices = {t for name, t in types.items() if "norm" not in name}
        assert matrices == {fallback(qtype, width)}, label
        assert {t for name, t in types.items() if "norm" in name} == {F32}


def test_fallback_goes_by_each_tensors_own_width(
    asked: dict[str, QuantType], tmp_path: Path
) -> None:
    base = write_llama(tmp_path / "base.gguf", Shape(n_embd=256, n_ff=96))
    for label, qtype in asked.items():
        types = stock_types(base, StockRecipe(label, pure=True))
        assert types[MATRIX] == qtype
        assert types["blk.0.ffn_down.weight"] == fallback(qtype, 96)
