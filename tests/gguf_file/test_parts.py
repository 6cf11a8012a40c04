"""Files in parts, as llama.cpp's gguf-split writes them and its loader opens them."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from eval_fixtures import TinySpec, write_tiny
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from tiny_gguf import Shape, write_llama

from evaluators.errors import EvaluationError
from evaluators.llama_runtime import Context, Model
from quantkit.errors import QuantkitError
from quantkit.files import sha256_file
from quantkit.gguf_file import cut
from quantkit.gguf_file.parts import part_name, part_names, stem_of
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.sound import check_sound

MOST = 100_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("whole") / "Tiny-Q4_K_M.gguf", TinySpec())


def parts_of(whole: Path, folder: Path, most: int = MOST) -> list[Path]:
    """The parts of a file, written."""
    found = []
    for part in cut.cut(whole, most):
        cut.write(whole, part, folder / part.name)
        assert (folder / part.name).stat().st_size == part.n_bytes
        assert sha256_file(folder / part.name) == cut.sha256(whole, part)
        found.append(folder / part.name)
    return found


def test_names_of_parts() -> None:
    assert part_name("a/b-Q4_K_M", 1, 12) == "a/b-Q4_K_M-00002-of-00012.gguf"
    names = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
    assert part_names(names[0]) == names
    assert part_names(names[1]) == (names[1],) and part_names("m.gguf") == ("m.gguf",)
    assert stem_of(names[1]) == "m" and stem_of("m.gguf") is None


def test_a_file_that_is_small_enough_stays(whole: Path) -> None:
    assert cut.cut(whole, whole.stat().st_size) == ()
    assert len(cut.cut(whole, whole.stat().st_size - 1)) == 2


def test_llama_cpp_opens_them_with_the_same_logits(whole: Path, tmp_path: Path) -> None:
    parts = parts_of(whole, tmp_path)
    assert len(parts) > 3 and max(p.stat().st_size for p in parts) <= MOST

    def logits(path: Path) -> np.ndarray:
        ids = np.arange(3, 63, dtype=np.int32)
        with Model(path) as model, Context(model, 64, 64, n_outputs=60) as context:
            wanted = np.ones(60, np.int8)
            return context.decode(ids, np.arange(60, dtype=np.int32), wanted).copy()

    assert np.array_equal(logits(whole), logits(parts[0]))
    with pytest.raises(EvaluationError):
        with Model(parts[1]):
            pass
    parts[2].unlink()
    with pytest.raises(EvaluationError, match=parts[2].name):
        with Model(parts[0]):
            pass


def test_the_rules_of_gguf_split(whole: Path, tmp_path: Path) -> None:
    """By gguf-py's reader: metadata in the first part alone, the three keys in the order that
    gguf-split writes them in, tensors in order and none twice.
    """
    original = gguf.GGUFReader(whole)
    names: list[str] = []
    parts = parts_of(whole, tmp_path)
    for i, path in enumerate(parts):
        reader = gguf.GGUFReader(path)
        keys = [name for name in reader.fields if not name.startswith("GGUF.")]
        split = ["split.no", "split.tensors.count", "split.count"]
        assert keys[-3:] == split
        known = [name for name in original.fields if not name.startswith("GGUF.")]
        assert keys[:-3] == (known if i == 0 else [])
        values = [reader.fields[key] for key in split]
        assert [field.contents() for field in values] == [i, len(original.tensors), len(parts)]
        kinds = gguf.GGUFValueType.UINT16, gguf.GGUFValueType.INT32, gguf.GGUFValueType.UINT16
        assert tuple(field.types[0] for field in values) == kinds
        for tensor in reader.tensors:
            (there,) = (t for t in original.tensors if t.name == tensor.name)
            assert np.array_equal(tensor.data, there.data)
            names.append(tensor.name)
    assert names == [tensor.name for tensor in original.tensors]


@given(st.integers(0, 400_000), st.sampled_from((None, 64)), st.booleans())
@examples(30)
def test_parts_are_the_file_again(most: int, alignment: int | None, tied: bool) -> None:
    """Whatever the limit: one tensor a part is the least."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        shape = Shape(tied=tied, n_layer=1)
        path = write_llama(Path(folder) / "Tiny.gguf", shape, alignment)
        parts = parts_of(path, Path(folder) / "parts", most)
        file, one = GgufFile(parts[0]), GgufFile(path)
        assert len(parts) <= len(one.tensors)
        assert list(file.tensors) == list(one.tensors) and dict(file.metadata) == dict(one.metadata)
        for name in one.tensors:
            assert np.array_equal(file.packed(name), one.packed(name))
        assert file.n_bytes == sum(p.stat().st_size for p in parts)
        assert cut.whole_sha256(file) == sha256_file(path)
        check_sound(file)


def test_a_part_is_written_whole_or_not_at_all(whole: Path, tmp_path: Path) -> None:
    part, *_ = cut.cut(whole, MOST)
    target = tmp_path / part.name
    target.with_name(f"{target.name}.partial").write_bytes(b"cut short by a kill")
    cut.write(whole, part, target)
    digest = hashlib.sha256(part.header + whole.read_bytes()[part.begin : part.end])
    assert sha256_file(target) == digest.hexdigest()
    assert list(tmp_path.iterdir()) == [target]


def test_parts_that_do_not_belong_together(whole: Path, tmp_path: Path) -> None:
    parts = parts_of(whole, tmp_path)
    kept = {path: path.read_bytes() for path in parts}

    def refused(path: Path, why: str) -> None:
        with pytest.raises(QuantkitError, match=why):
            GgufFile(path)
        for other, data in kept.items():
            other.write_bytes(data)

    refused(parts[1], "part 2 of .*the first is what to open")
    parts[1].unlink()
    refused(parts[0], f"its part {parts[1].name} is missing")
    parts[1].write_bytes(kept[parts[2]])
    refused(parts[0], "another part than its name says")
    parts[1].write_bytes(kept[parts[1]][:-40_000])
    refused(parts[0], f"its part {parts[1].name} is broken")
    parts[0].rename(tmp_path / "renamed.gguf")
    refused(tmp_path / "renamed.gguf", "not called NAME-00001-of")
    count = b"split.tensors.count" + struct.pack("<I", 5)
    at = kept[parts[0]].index(count) + len(count)
    parts[0].write_bytes(kept[parts[0]][:at] + struct.pack("<i", 7) + kept[parts[0]][at + 4 :])
    refused(parts[0], "says another number")
    assert GgufFile(parts[0]).paths == tuple(parts)
