"""ggml's codebook types: bytes against libggml, every number that they store back and forth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.ggml import native
from quantkit.ggml.codebooks import CODEBOOKS, Codes
from quantkit.ggml.types import CODEBOOK_TYPES, QuantType
from tests.support.blocks import same_bits

EACH = pytest.mark.parametrize("qtype", CODEBOOKS, ids=str)


def random_codes(qtype: QuantType, n_rows: int = 6, n_blocks: int = 2, seed: int = 0) -> Codes:
    """Numbers that rows of this type can store, every entry, integer and kind of d among them."""
    book, rng = CODEBOOKS[qtype], np.random.default_rng(seed)
    n_columns = 256 * n_blocks
    n_entries = len(book.entries)
    entry = rng.integers(0, n_entries, (n_rows, n_columns // book.width))
    if book.halves:
        per_group = book.group // book.width
        half = rng.integers(0, 2, (n_rows, n_columns // book.group)).repeat(per_group, 1)
        entry = entry % (n_entries // 2) + half * (n_entries // 2)
    signs = rng.integers(0, 256 if book.has_signs else 1, (n_rows, n_columns // 8))
    if book.signs_are_even:
        odd = np.unpackbits(signs.astype(np.uint8)[..., None], -1).sum(-1) % 2
        signs = signs ^ (odd.astype(np.int64) << 7)
    integer = rng.integers(0, len(book.multipliers), (n_rows, n_columns // book.group))
    d = rng.standard_normal((n_rows, n_blocks)).astype(np.float16)
    d.flat[:6] = np.array([0, 1, -2, 6e-8, 65504, 1e-5], np.float16)
    return Codes(
        torch.from_numpy(entry.astype(np.int16)),
        torch.from_numpy(signs.astype(np.uint8)),
        torch.from_numpy(integer.astype(np.int16)),
        torch.from_numpy(d.astype(np.float32)),
    )


@EACH
def test_values_are_libggmls_and_numbers_come_back(qtype: QuantType) -> None:
    book = CODEBOOKS[qtype]
    codes = random_codes(qtype, n_rows=40)
    packed = book.pack(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (40, qtype.row_bytes(512))
    back = book.codes(packed)
    for name in ("entry", "signs", "integer", "d"):
        assert torch.equal(getattr(back, name), getattr(codes, name)), name
    assert same_bits(book.values(packed).numpy(), native.dequantize(packed.numpy(), qtype))


@EACH
def test_any_bits_are_read_as_libggml_reads_them_and_written_back(qtype: QuantType) -> None:
    packed = np.random.default_rng(1).integers(0, 256, (8, 2, qtype.block_bytes), dtype=np.uint8)
    packed[..., 55 if qtype.name == "IQ1_M" else 1] &= 0x3F  # the exponent of a finite d
    rows = torch.from_numpy(packed.reshape(8, -1))
    book = CODEBOOKS[qtype]
    assert same_bits(book.values(rows).numpy(), native.dequantize(rows.numpy(), qtype))
    assert torch.equal(book.pack(book.codes(rows)), rows)


@EACH
def test_every_entry_and_multiplier_is_libggmls(qtype: QuantType) -> None:
    """The whole table under every integer, in turn."""
    book = CODEBOOKS[qtype]
    per_row = 256 // book.width
    entry = torch.arange(len(book.entries), dtype=torch.int16).view(-1, per_row)
    n_rows, n_groups = len(entry), 256 // book.group
    integer = torch.arange(n_rows * n_groups).view(n_rows, n_groups) % len(book.multipliers)
    signs = torch.zeros((n_rows, 32), dtype=torch.uint8)
    codes = Codes(entry, signs, integer.to(torch.int16), torch.ones((n_rows, 1)))
    theirs = native.dequantize(book.pack(codes).numpy(), qtype)
    assert same_bits(book.decoded(codes).numpy(), theirs)
    levels = np.repeat(np.array(book.multipliers, np.float32)[integer], book.group, 1)
    assert np.array_equal(theirs / levels, book.entries.reshape(n_rows, -1))


def test_every_type_of_a_codebook_has_one() -> None:
    assert set(CODEBOOKS) == set(CODEBOOK_TYPES)
