"""What is done at once in the converter, against gguf-py, which does it one by one."""

from __future__ import annotations

import enum
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType

from quantkit.llamacpp.converter import faster


class Kind(enum.IntEnum):
    NORMAL = 1
    UNUSED = 5


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The functions as they were; those of gguf are the faster ones until the test ends."""
    pack, apply = gguf.GGUFWriter._pack_val, gguf.quants._apply_over_grouped_rows
    monkeypatch.setattr(gguf.GGUFWriter, "_pack_val", pack)
    monkeypatch.setattr(gguf.quants, "_apply_over_grouped_rows", apply)
    faster.install()
    assert gguf.GGUFWriter._pack_val != pack and gguf.quants._apply_over_grouped_rows != apply
    return pack, apply


ARRAYS: dict[str, list[Any]] = {
    "texts": ["a", "", "grüß", "\0", "日本" * 100],
    "texts as bytes": [b"a", "b", b"\xff\xfe"],
    "numbers": [0, 1, -1, 2**31 - 1, -(2**31)],
    "enums": [Kind.NORMAL, 3, Kind.UNUSED],
    "floats": [0.0, -0.0, 1e-46, 1 / 3, -1000.0, float("inf")],
    "booleans": [True, False],
    "lists": [[1, 2], [3]],
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("with_kind", [True, False])
def test_arrays_are_packed_alike(
    name: str, with_kind: bool, installed: Any, tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    arguments = (writer, ARRAYS[name], GGUFValueType.ARRAY, with_kind)
    assert gguf.GGUFWriter._pack_val(*arguments) == installed[0](*arguments)


@pytest.mark.parametrize("values", [[], [1, "a"], [1.0, 2], [2**31], [2.0**200], [None]], ids=repr)
def test_arrays_that_cannot_be_packed(values: list[Any], installed: Any, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    errors = (ValueError, struct.error, OverflowError)
    for pack in (installed[0], gguf.GGUFWriter._pack_val):
        with pytest.raises(errors):
            pack(writer, values, GGUFValueType.ARRAY, True)


@pytest.mark.parametrize("shape", [(4096, 3), (3, 4096), (12288,), (2, 3, 2048)], ids=str)
def test_bf16_is_rounded_alike(shape: tuple[int, ...], installed: Any) -> None:
    """Every exponent, ties to even on both sides, what is tiny, and what rounds to infinity."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 12288, np.uint32)
    bits[:6000] = (bits[:6000] & 0xFFFF0000) | rng.choice([0, 0x7FFF, 0x8000, 0x8001], 6000)
    bits[:4] = (0, 0x80000000, 0x7F7FFFFF, 1)
    bits[bits & 0x7F800000 == 0x7F800000] &= 0x80FFFFFF  # finite alone
    values = bits.view(np.float32).reshape(shape)
    found = gguf.quants.quantize(values, GGMLQuantizationType.BF16)
    gguf.quants._apply_over_grouped_rows = installed[1]
    assert np.array_equal(found, gguf.quants.quantize(values, GGMLQuantizationType.BF16))
    assert found.shape == (*shape[:-1], 2 * shape[-1]) and found.dtype == np.uint8
