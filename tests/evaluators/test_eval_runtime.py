"""Loading, tokenizing and decoding, and every way a file can be unfit."""

from __future__ import annotations

import ast
import ctypes
import gc
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import llama_cpp
import llama_cpp.llama_cpp as lib
import numpy as np
import pytest
from eval_fixtures import (
    NOISY,
    ONE,
    SPEC,
    TEXT,
    TinyFiles,
    byte_ids,
    reference_logits,
    tiny,
    weights,
    write_tiny,
)

import evaluators
from evaluators import llama_runtime, perplexity
from evaluators.errors import EvaluationError
from evaluators.llama_runtime import Context, Model, shard_paths
from evaluators.windows import scored_logits, window_context

measure = partial(perplexity.measure, runtime=ONE)

__all__ = ["tiny"]  # a fixture: used by name


def test_struct_layouts_are_those_this_code_was_written_for() -> None:
    assert llama_cpp.__version__ == "0.3.36"
    assert ctypes.sizeof(lib.llama_batch) == 56
    assert ctypes.sizeof(lib.llama_context_params) == 160
    defaults = lib.llama_context_default_params()
    # values in the middle and at the end: a shifted layout would show here
    assert (defaults.n_batch, defaults.n_ubatch, defaults.type_k) == (2048, 512, 1)
    assert (defaults.offload_kqv, defaults.op_offload, defaults.kv_unified) == (True, True, False)


def test_package_imports_nothing_of_quantkit() -> None:
    files = list(Path(evaluators.__file__).parent.rglob("*.py"))
    assert len(files) > 15
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"relative import in {file}"
                names = [node.module or ""]
            assert not [name for name in names if name.split(".")[0] == "quantkit"], file


def test_logits_are_those_of_an_independent_forward_pass(tiny: TinyFiles) -> None:
    ids = byte_ids("xyz: 42, qq; 17!" * 5)
    n = len(ids)
    with Model(tiny.base, ONE) as model, Context(model, n, n, n) as context:
        positions = np.arange(n, dtype=np.int32)
        logits = context.decode(ids, positions, np.ones(n, dtype=np.int8)).copy()
    expected = reference_logits(SPEC, ids)
    assert expected.std() > 1
    assert np.abs(logits - expected).max() < 0.01  # keys and values are cached as 16-bit floats


def test_only_wanted_rows_come_back_in_order(tiny: TinyFiles) -> None:
    ids = byte_ids("qwertz uiop!")
    wanted = np.zeros(len(ids), dtype=np.int8)
    wanted[[3, 7, 11]] = 1
    positions = np.arange(len(ids), dtype=np.int32)
    with Model(tiny.base, ONE) as model, Context(model, 64, 64, 3) as context:
        some = context.decode(ids, positions, wanted).copy()
    assert some.shape == (3, SPEC.n_vocab)
    assert np.abs(some - reference_logits(SPEC, ids)[[3, 7, 11]]).max() < 0.01


def test_a_window_in_steps_gives_the_logits_of_one_pass(tiny: TinyFiles) -> None:
    with Model(tiny.base, ONE) as model:
        window = model.tokenize(TEXT)[:100]
        with window_context(model, 100, 50) as context:
            [(_, whole, targets)] = scored_logits(context, window, 50)
            whole = whole.copy()
        assert np.array_equal(targets, window[51:100])
        with Context(model, 100, 32, 32) as context:
            steps = [
                (row, part.copy(), next_ids)
                for row, part, next_ids in scored_logits(context, window, 50)
            ]
    assert [row for row, _, _ in steps] == [0, 14, 46]  # tokens 50..63, 64..95, 96..98
    assert np.array_equal(np.concatenate([ids for _, _, ids in steps]), targets)
    assert np.abs(np.concatenate([part for _, part, _ in steps]) - whole).max() < 0.01


def test_tokenize_adds_bos_as_the_vocabulary_says(tiny: TinyFiles) -> None:
    with Model(tiny.base, ONE) as model:
        assert model.tokenize("qq\r\nq").tolist() == [1, *byte_ids("qq\r\nq")]
        assert model.tokenize("qq", add_special=False).tolist() == list(byte_ids("qq"))
        # "<s>" in a text is three characters, not a BOS
        assert model.tokenize("<s>", add_special=False).tolist() == list(byte_ids("<s>"))
    with Model(tiny.no_bos, ONE) as model:
        assert model.tokenize("qq").tolist() == list(byte_ids("qq"))


def test_no_eos_ends_a_text_that_goes_on(tmp_path: Path) -> None:
    with Model(write_tiny(tmp_path / "eos.gguf", replace(SPEC, add_eos=True)), ONE) as model:
        assert model.tokenize("qq").tolist() == [1, *byte_ids("qq")]
        assert model.tokenize("").tolist() == [1]


def test_a_batch_larger_than_its_context_is_a_bug_not_an_abort(tiny: TinyFiles) -> None:
    ids = byte_ids("qqqqqqq")
    positions, all_rows = np.arange(len(ids), dtype=np.int32), np.ones(len(ids), dtype=np.int8)
    with Model(tiny.base, ONE) as model:
        with Context(model, 64, 4, 4) as context, pytest.raises(ValueError, match="made for 4"):
            context.decode(ids, positions, all_rows)
        with Context(model, 64, 64, 2) as context, pytest.raises(ValueError, match="10 rows"):
            context.decode(ids, positions, all_rows)


def test_missing_file() -> None:
    with pytest.raises(EvaluationError, match="no file"):
        Model("nowhere.gguf")


def test_a_file_that_is_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "page.gguf"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(EvaluationError, match="not a GGUF file") as caught:
        Model(path)
    assert caught.value.remedy


@pytest.mark.parametrize("keep", [6, 100, 3000, -100_000, -1])
def test_truncated_files_are_refused_with_a_reason(
    tiny: TinyFiles, tmp_path: Path, keep: int
) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny.base.read_bytes()[:keep])
    with pytest.raises(EvaluationError, match="cannot load") as caught:
        measure(path, TEXT, n_ctx=64)
    assert "(" in caught.value.message  # llama.cpp's own words are in it
    assert caught.value.remedy


def test_a_missing_part_of_a_split_model(tiny: TinyFiles, tmp_path: Path) -> None:
    first = tmp_path / "m-00001-of-00002.gguf"
    first.write_bytes(tiny.base.read_bytes())
    assert [path.name for path in shard_paths(first)] == [first.name, "m-00002-of-00002.gguf"]
    with pytest.raises(EvaluationError, match="m-00002-of-00002"):
        Model(first)


def test_nan_weights_are_reported_not_averaged(tmp_path: Path) -> None:
    tensors = weights(SPEC)
    tensors["blk.1.ffn_down.weight"][5, 5] = np.nan
    path = write_tiny(tmp_path / "nan.gguf", SPEC, tensors)
    with pytest.raises(EvaluationError, match="not finite"):
        measure(path, TEXT, n_ctx=64, max_windows=2)


def test_token_outside_the_vocabulary(tiny: TinyFiles) -> None:
    ids = np.array([5, SPEC.n_vocab], dtype=np.int32)
    with Model(tiny.base, ONE) as model, Context(model, 64, 64, 64) as context:
        with pytest.raises(EvaluationError, match="outside"):
            context.decode(ids, np.arange(2, dtype=np.int32), np.ones(2, dtype=np.int8))


def test_nothing_reaches_stderr(tiny: TinyFiles, capfd: pytest.CaptureFixture[str]) -> None:
    measure(tiny.base, TEXT, n_ctx=64, max_windows=1)
    with pytest.raises(EvaluationError):
        measure(__file__, TEXT)
    assert capfd.readouterr() == ("", "")


def _held() -> tuple[int, list[str]]:
    """Open descriptors of this process, and the processes that it has started."""
    gc.collect()  # what earlier tests held
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return len(os.listdir("/proc/self/fd")), children


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_is_left_of_a_model(tiny: TinyFiles, tmp_path: Path) -> None:
    before = _held()
    measure(tiny.base, TEXT, n_ctx=64, max_windows=1)
    with pytest.raises(EvaluationError):
        measure(tiny.base, TEXT, n_ctx=64, max_windows=-1)  # after loading: the model is freed, too
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny.base.read_bytes()[:3000])
    with pytest.raises(EvaluationError):
        Model(broken, ONE)
    assert _held() == before


def test_a_process_that_dies_is_a_sentence(tiny: TinyFiles) -> None:
    ids, ones = byte_ids("qwertz"), np.ones(6, dtype=np.int8)
    with Model(tiny.base, ONE) as model, Context(model, 64, 64, 64) as context:
        pid = int(_held()[1][-1])
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EvaluationError, match="signal 9") as caught:
            context.decode(ids, np.arange(6, dtype=np.int32), ones)
        assert str(tiny.base) in caught.value.message and caught.value.remedy
        with pytest.raises(EvaluationError, match="no longer open"):
            model.tokenize("qwertz")


def test_without_a_process_of_its_own(tiny: TinyFiles) -> None:
    """In a process that was made for it the same can be done by a thread."""
    before = _held()
    there = measure(tiny.base, TEXT, n_ctx=64, max_windows=2)
    inside = perplexity.measure(tiny.base, TEXT, 64, 2, runtime=replace(ONE, launch=None))
    assert inside.perplexity == there.perplexity
    assert _held() == before


def test_a_process_that_does_not_answer_is_ended(
    tiny: TinyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Model(tiny.base, ONE) as model:
        pid = int(_held()[1][-1])
        os.kill(pid, signal.SIGSTOP)
        monkeypatch.setattr(llama_runtime, "_SECONDS", 0.1)
        with pytest.raises(EvaluationError, match="did not answer"):
            model.ends()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_context_longer_than_the_models(tiny: TinyFiles) -> None:
    with pytest.raises(EvaluationError, match="longer than the 256") as caught:
        measure(tiny.base, TEXT, n_ctx=512)
    assert "--ctx 256" in caught.value.remedy


def test_the_noisy_file_is_another_model() -> None:
    ids = byte_ids("qwertz")
    assert np.abs(reference_logits(SPEC, ids) - reference_logits(NOISY, ids)).max() > 0.1
    assert replace(NOISY, noise=0.0) == SPEC
