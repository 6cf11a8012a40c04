"""GGUF in and out: layouts against files that gguf-py wrote, sizes to the byte, broken files."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from blocks import gguf_values
from examples import examples
from gguf import GGUFValueType
from hypothesis import given
from hypothesis import strategies as st
from tiny_gguf import Shape, write_llama

from quantkit.errors import QuantkitError
from quantkit.ggml import native
from quantkit.ggml.types import BF16, F16, F32, QUANTIZED, READERS, STOCK_MIXES, QuantType
from quantkit.gguf_file.fields import Field
from quantkit.gguf_file.imatrix import read_imatrix, write_imatrix
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.write import SlotFile, data_bytes, lay_out, slot_bytes
from quantkit.llamacpp.stock import StockRecipe, stock_types

# ggml builds tables for the others first, which takes seconds.
QUICK = [q for q in QUANTIZED if q.name not in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S")]


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("base") / "base.gguf", Shape(n_ff=288, n_vocab=301))


@pytest.fixture(scope="module")
def base(base_path: Path) -> GgufFile:
    return GgufFile(base_path)


def fill(path: Path, base: GgufFile, types: dict[str, QuantType], *key_values: Field) -> Path:
    """A whole file of these types through SlotFile; what is not named is copied."""
    layout = lay_out(base, types, key_values)
    file = SlotFile(path, layout)
    for name, tensor in base.tensors.items():
        qtype = types.get(name, tensor.qtype)
        same = qtype == tensor.qtype
        file.write(name, base.packed(name) if same else native.quantize(base.values(name), qtype))
    file.finish()
    return path


def metadata_bytes(path: Path) -> dict[str, tuple[int, ...]]:
    """Every metadata pair as its raw bytes: type and value exactly as stored."""
    fields = gguf.GGUFReader(path).fields
    return {
        name: tuple(b"".join(p.tobytes() for p in field.parts))
        for name, field in fields.items()
        if not name.startswith("GGUF.")
    }


@pytest.mark.parametrize("alignment", [None, 64, 256])
@pytest.mark.parametrize("stored", ["BF16", "F16", "F32", "Q8_0"])
def test_its_own_layout_is_the_file_itself(
    stored: str, alignment: int | None, tmp_path: Path
) -> None:
    """The header byte for byte, and a copy through SlotFile the whole file byte for byte."""
    path = write_llama(tmp_path / "base.gguf", Shape(stored=stored, n_ff=96), alignment)
    base = GgufFile(path)
    layout = lay_out(base, {})
    data = path.read_bytes()
    assert layout.n_bytes == len(data)
    assert data[: len(layout.header)] == layout.header
    assert layout.offsets == {t.name: t.offset for t in base.tensors.values()}
    assert fill(tmp_path / "copy.gguf", base, {}).read_bytes() == data


def test_sizes_are_plain_integers(tmp_path: Path) -> None:
    """With numpy's 32-bit integers in them, sizes above 4 GB wrap around."""
    base = GgufFile(write_llama(tmp_path / "base.gguf", alignment=64))
    layout = lay_out(base, {})
    assert type(layout.n_bytes) is int and type(data_bytes(base, {})) is int
    assert all(type(at) is int for at in layout.offsets.values())
    assert slot_bytes(base, 5 * 10**9) == 5 * 10**9


@examples(25)
@given(data=st.data())
def test_the_computed_size_is_the_files(
    data: st.DataObject, base: GgufFile, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any types on any tensors: size, offsets and types as laid out, and gguf-py reads it back, as
    far as it knows them.
    """
    known = [q for q in (*QUICK, F16, F32, BF16) if q not in READERS]
    matrices = [t for t in base.tensors.values() if len(t.shape) == 2]
    types = {}
    for tensor in matrices:
        fitting = [q for q in known if q.fits(tensor.shape[-1])]
        if data.draw(st.booleans(), tensor.name):
            types[tensor.name] = data.draw(st.sampled_from(fitting), tensor.name)
    path = fill(tmp_path_factory.mktemp("out") / "out.gguf", base, types)
    layout = lay_out(base, types)
    assert path.stat().st_size == layout.n_bytes
    assert layout.n_bytes == min(layout.offsets.values()) + data_bytes(base, types)
    made = GgufFile(path)
    assert list(made.tensors) == list(base.tensors)
    for name, tensor in base.tensors.items():
        assert made.tensors[name].shape == tensor.shape
        assert made.tensors[name].qtype == types.get(name, tensor.qtype)
        assert made.tensors[name].offset == layout.offsets[name]
    assert metadata_bytes(path) == metadata_bytes(base.path)


def test_every_size_of_a_slot_is_padded(base: GgufFile) -> None:
    assert [slot_bytes(base, n) for n in (0, 1, 31, 32, 33, 64)] == [0, 32, 32, 32, 64, 64]


@pytest.mark.parametrize("label", ["Q4_K_M", "IQ3_M", "Q8_0"])
def test_llama_cpp_reads_the_stitched_file(label: str, base: GgufFile, tmp_path: Path) -> None:
    """A mix of types: a dry run that keeps every tensor sees the very types."""
    types = stock_types(base.path, StockRecipe(label))
    path = fill(tmp_path / "mix.gguf", base, {n: t for n, t in types.items() if t in QUICK})
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert found == {name: qtype.name for name, qtype in types.items()}


def test_metadata_is_carried_whole(base: GgufFile, tmp_path: Path) -> None:
    """Every type of value that GGUF knows, arrays of strings, numbers and booleans among them."""
    added = (
        Field.uint32("general.file_type", 15),
        Field.string("quantkit.note", "zwei Wörter"),
        Field("quantkit.large", GGUFValueType.UINT64, struct.pack("<Q", 2**40)),
        Field.strings("quantkit.list", ["a", "b"]),
    )
    path = fill(tmp_path / "out.gguf", base, {}, *added)
    before, after = metadata_bytes(base.path), metadata_bytes(path)
    names = {field.name for field in added}
    assert {k: v for k, v in after.items() if k not in names} == {
        k: v for k, v in before.items() if k not in names
    }
    assert list(after)[: len(before)] == list(before), "replaced in place, the rest follows"
    values = GgufFile(path).metadata
    assert {f.name: values[f.name] for f in added} == {f.name: f.value for f in added}
    assert base.metadata["general.file_type"] == 32


def test_packed_rows_and_values(base: GgufFile) -> None:
    reader = {t.name: t for t in gguf.GGUFReader(base.path).tensors}
    for name, tensor in base.tensors.items():
        packed = base.packed(name)
        n_rows = int(np.prod(tensor.shape)) // tensor.shape[-1]
        assert packed.shape == (n_rows, tensor.qtype.row_bytes(tensor.shape[-1]))
        assert packed.tobytes() == reader[name].data.tobytes()
        wanted = gguf_values(reader[name].data, tensor.qtype).reshape(n_rows, -1)
        assert np.array_equal(base.values(name), wanted)
    assert base.n_elements == sum(int(t.n_elements) for t in reader.values())
    with pytest.raises((ValueError, TypeError)):
        base.packed("token_embd.weight")[0, 0] = 1  # the mapped file is read-only


def test_an_interrupted_file_is_gone_on_with(base: GgufFile, tmp_path: Path) -> None:
    q4 = QuantType("Q4_0")
    types = {n: q4 for n, t in base.tensors.items() if len(t.shape) == 2}
    layout = lay_out(base, types)
    path = tmp_path / "out.gguf"
    first = SlotFile(path, layout)
    assert not first.resumed and not path.exists()
    names = list(base.tensors)
    rows = {n: native.quantize(base.values(n), q4) if n in types else base.packed(n) for n in names}
    for name in names[: len(names) // 2]:
        first.write(name, rows[name])
    first.flush()
    first.close()
    second = SlotFile(path, layout)
    assert second.resumed
    for name in names[len(names) // 2 - 1 :]:  # one of them a second time
        second.write(name, rows[name])
    second.finish()
    assert not path.with_name("out.gguf.partial").exists()
    assert path.read_bytes() == fill(tmp_path / "whole.gguf", base, types).read_bytes()
    third = SlotFile(path, layout)  # a finished file is not a begun one
    assert not third.resumed
    third.close()


@pytest.mark.parametrize("damage", ["shorter", "longer", "other types", "other metadata", "zeros"])
def test_a_partial_file_of_another_layout_is_not_gone_on_with(
    damage: str, base: GgufFile, tmp_path: Path
) -> None:
    layout = lay_out(base, {})
    path, partial = tmp_path / "out.gguf", tmp_path / "out.gguf.partial"
    if damage == "shorter":
        partial.write_bytes(layout.header)
    elif damage == "longer":
        partial.write_bytes(layout.header + bytes(layout.n_bytes))
    elif damage == "zeros":
        partial.write_bytes(bytes(layout.n_bytes))
    elif damage == "other types":
        SlotFile(path, lay_out(base, {"token_embd.weight": F16})).close()  # of the same size
    else:
        SlotFile(path, lay_out(base, {}, [Field.uint32("general.file_type", 7)])).close()
    file = SlotFile(path, layout)
    assert not file.resumed
    for name in base.tensors:
        file.write(name, base.packed(name))
    file.finish()
    assert path.read_bytes() == base.path.read_bytes()


def test_what_goes_wrong_while_a_slot_is_written_is_raised(base: GgufFile, tmp_path: Path) -> None:
    file = SlotFile(tmp_path / "out.gguf", lay_out(base, {}))
    name = next(iter(base.tensors))
    file.write(name, base.packed(name))
    assert np.array_equal(file.read(name), base.packed(name).reshape(-1))
    file._file.close()
    file._file = (tmp_path / "out.gguf.partial").open("rb", buffering=0)  # not for writing
    file.write(name, base.packed(name))
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.flush()
    file.close()


def test_padding_is_zero(base: GgufFile, tmp_path: Path) -> None:
    types = {"token_embd.weight": QuantType("Q4_0")}
    path = fill(tmp_path / "out.gguf", base, types)
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    made = GgufFile(path)
    for tensor in made.tensors.values():
        data[tensor.offset : tensor.offset + tensor.n_bytes] = 0
    assert not data[min(t.offset for t in made.tensors.values()) :].any()


def test_rows_of_the_wrong_size_are_refused(base: GgufFile, tmp_path: Path) -> None:
    """They would run into the next tensor."""
    file = SlotFile(tmp_path / "out.gguf", lay_out(base, {}))
    with pytest.raises(ValueError, match="token_embd"):
        file.write("token_embd.weight", np.zeros((302, 512), np.uint8))


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def one_tensor(dims: tuple[int, ...], kind: int = 0, offset: int = 0, n_bytes: int = 4096) -> bytes:
    """A GGUF of one tensor `t` and nothing else."""
    data = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + text(b"t")
    data += struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return data + bytes(n_bytes)


BROKEN = {
    "empty": b"",
    "short": b"GG",
    "magic": b"GGML" + bytes(100),
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "version": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    "count": b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0),
    "pairs": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60),
    "string": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 62) + b"abc",
    "huge": one_tensor((1 << 40, 1 << 20)),
    "wraps": one_tensor((1 << 32, 1 << 32)),
    "n_dims": b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + text(b"t") + struct.pack("<I", 0xFFFFFFFF),
    "type": one_tensor((32,), kind=99),
    "beyond": one_tensor((32,), offset=1 << 40),
    "last": one_tensor((1025,)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(case: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(BROKEN[case])
    with pytest.raises(QuantkitError, match="broken.gguf") as error:
        GgufFile(path)
    assert error.value.remedy


@pytest.mark.parametrize(
    "data",
    [one_tensor((32,), offset=(1 << 64) - 64), one_tensor((0,)), one_tensor((64, 0))],
    ids=["offset wraps to the header", "no elements", "no rows"],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_tensors_that_cannot_be(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    with pytest.raises(QuantkitError):
        GgufFile(path)


def test_an_array_longer_than_the_file(tmp_path: Path) -> None:
    """Walked item by item it would fill all memory."""
    path = tmp_path / "endless.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"a")
    path.write_bytes(head + struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.UINT8, 1 << 40))
    with pytest.raises(QuantkitError):
        GgufFile(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "no.gguf", tmp_path):
        with pytest.raises(QuantkitError):
            GgufFile(path)


@examples(40)
@given(share=st.floats(0, 0.999))
def test_truncated_anywhere(
    share: float, base_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = base_path.read_bytes()
    path = tmp_path_factory.mktemp("cut") / "cut.gguf"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(QuantkitError, match="cut.gguf"):
        GgufFile(path)


ODD = st.sampled_from(
    [b"", b"\0", bytes(8), b"x" * 255, b"x" * 256, b"y" * 70_000, "ä".encode(), b"\1\0\0\0\0\0\0\0"]
)
SOME_TEXT = st.one_of(ODD, st.text(max_size=12).map(str.encode))


def with_texts(texts: list[bytes], n: int | None = None) -> bytes:
    """A GGUF of an array of texts, which it says are `n`, and a number behind them."""
    array = struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, n or len(texts))
    array = text(b"texts") + array + b"".join(map(text, texts))
    number = text(b"number") + struct.pack("<II", GGUFValueType.UINT32, 7)
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + array + number


@examples(20)
@given(odd=st.dictionaries(st.integers(0, 3000), SOME_TEXT, max_size=40), n=st.integers(1, 3000))
def test_texts_of_any_kind_among_many(
    odd: dict[int, bytes], n: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """However they are gone past, the array is all of them, and what follows is found."""
    texts = [odd.get(i, b"token %d" % (i * i)) for i in range(n)]
    path = tmp_path_factory.mktemp("texts") / "texts.gguf"
    path.write_bytes(with_texts(texts))
    file = GgufFile(path)
    assert dict(file.metadata) == {"texts": [t.decode() for t in texts], "number": 7}
    assert file.fields["texts"].stored == b"".join(map(text, texts))
    assert lay_out(file, {}).header.rstrip(b"\0") == path.read_bytes().rstrip(b"\0")


@pytest.mark.parametrize("at", [0, 1, 2000, 39_998, 39_999])
@pytest.mark.parametrize("wrong", [b"\xff", b"a\xc3", b"\xa9b", b"\xed\xa0\x80", b"\xc3" * 300])
def test_texts_are_utf_8(wrong: bytes, at: int, tmp_path: Path) -> None:
    """A letter that ends in the next text is none."""
    path = tmp_path / "broken.gguf"
    texts = [b"token %d" % i for i in range(40_000)]
    path.write_bytes(with_texts([*texts[:at], wrong, *texts[at + 1 :]]))
    with pytest.raises(QuantkitError, match="UTF-8"):
        GgufFile(path)


@pytest.mark.parametrize("n_more", [1, 2**20])
def test_fewer_texts_than_an_array_says(n_more: int, tmp_path: Path) -> None:
    texts = [b"token %d" % i for i in range(40_000)]
    path = tmp_path / "broken.gguf"
    path.write_bytes(with_texts(texts, len(texts) + n_more) + bytes(9 * n_more))
    with pytest.raises(QuantkitError, match="not a whole GGUF"):
        GgufFile(path)


def importances() -> dict[str, tuple[np.ndarray, int]]:
    rng = np.random.default_rng(0)
    return {
        "blk.1.ffn_up.weight": (rng.random(64, np.float32), 1000),
        "blk.0.ffn_up.weight": (rng.random(96, np.float32) * 1e-6, 131072),
        "blk.0.ffn_down_exps.weight": (rng.random((4, 32), np.float32), 77),
    }


def test_an_imatrix_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, importances(), ["docs (x)", "code"], 256, 512)
    found = read_imatrix(path)
    assert list(found) == sorted(importances())
    for name, (means, _) in importances().items():
        assert found[name].dtype == np.float32 and found[name].shape == (means.size,)
        np.testing.assert_allclose(found[name], means.reshape(-1), rtol=2e-7)


def test_an_imatrix_has_llama_cpps_keys(tmp_path: Path) -> None:
    """Those that tools/imatrix and common/imatrix-loader read: sums of squares, counts per row."""
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, importances(), ["docs", "code"], 256, 512)
    file = GgufFile(path)
    assert file.metadata == {
        "general.type": "imatrix",
        "imatrix.datasets": ["docs", "code"],
        "imatrix.chunk_count": 256,
        "imatrix.chunk_size": 512,
    }
    for name, (means, n) in importances().items():
        sums, counts = file.tensors[f"{name}.in_sum2"], file.tensors[f"{name}.counts"]
        assert sums.qtype == counts.qtype == F32
        n_experts = len(np.atleast_2d(means))
        assert counts.shape == (n_experts, 1) and sums.shape == (n_experts, means.shape[-1])
        assert (file.values(f"{name}.counts") == n).all()
        np.testing.assert_array_equal(
            file.values(f"{name}.in_sum2"), np.atleast_2d(means) * np.float32(n)
        )


def test_an_imatrix_of_experts_that_met_no_token(tmp_path: Path) -> None:
    """llama-imatrix writes a count of 0 then; the mean of nothing is 0, not NaN."""
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, {"t": (np.zeros((2, 8), np.float32), 0)}, ["x"], 1, 512)
    assert np.array_equal(read_imatrix(path)["t"], np.zeros(16, np.float32))


def test_other_files_are_no_imatrix(base: GgufFile) -> None:
    with pytest.raises(QuantkitError, match="not an importance matrix"):
        read_imatrix(base.path)


def test_an_imatrix_without_counts(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "i.gguf", "x")
    writer.add_string("general.type", "imatrix")
    writer.add_tensor("t.in_sum2", np.ones((1, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(QuantkitError):
        read_imatrix(tmp_path / "i.gguf")


def test_the_mixes_cover_what_the_layout_can_hold(base: GgufFile) -> None:
    """data_bytes of every stock mix, tensor by tensor: nothing is counted twice or left out."""
    for label in STOCK_MIXES:
        types = stock_types(base.path, StockRecipe(label))
        assert set(types) == set(base.tensors)
        one_by_one = sum(
            slot_bytes(base, q.n_bytes(base.tensors[n].shape)) for n, q in types.items()
        )
        assert data_bytes(base, types) == one_by_one
