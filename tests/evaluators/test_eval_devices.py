"""What llama.cpp computes on: asked for, said, and compared with the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_fixtures import SPEC, TEXT, TinyFiles, byte_ids, reference_logits, run_json, tiny

from evaluators import compare, generation, kl, perplexity, speed, zeroshot
from evaluators.devices import described, gpus
from evaluators.errors import EvaluationError
from evaluators.llama_runtime import CPU, Context, Model, Runtime

GPU = Runtime(n_threads=1, n_gpu_layers=-1)
ON_GPU = pytest.mark.skipif(not gpus(), reason="needs a llama-cpp-python that finds a GPU")
WITHOUT = pytest.mark.skipif(bool(gpus()), reason="this llama-cpp-python finds a GPU")

__all__ = ["run_json", "tiny"]  # fixtures: used by name


def _logits(file: Path, runtime: Runtime) -> np.ndarray:
    ids = byte_ids("xyz: 42, qq; 17!" * 5)
    positions, wanted = np.arange(len(ids), dtype=np.int32), np.ones(len(ids), np.int8)
    with Model(file, runtime) as model, Context(model, 256, 256, len(ids)) as context:
        return context.decode(ids, positions, wanted).copy()


def test_the_cpu_is_named() -> None:
    assert described(CPU) == "CPU"


@WITHOUT
def test_a_gpu_that_is_not_there_is_refused_wherever_it_is_asked_for(tiny: TinyFiles) -> None:
    for ask in (
        lambda: Model(tiny.base, GPU),
        lambda: described(GPU),
        lambda: speed.measure(tiny.base, 128, 32, 8, 1, GPU),
        lambda: kl.between_devices(tiny.base, TEXT, GPU, n_ctx=64),
    ):
        with pytest.raises(EvaluationError, match="llama.cpp finds no GPU") as caught:
            ask()
        assert "build" in caught.value.remedy


@WITHOUT
@pytest.mark.parametrize(
    ("main", "options"),
    [
        (perplexity.main, ["{base}", "--text", "{text}"]),
        (kl.main, ["{base}", "{base}", "--text", "{text}"]),
        (compare.main, ["--base", "{base}", "{base}", "--text", "{text}"]),
        (zeroshot.main, ["{base}", "--task", "everyday"]),
        (generation.main, ["{base}", "{base}"]),
        (speed.main, ["{base}", "--ctx", "128", "--prompt", "32", "--generate", "8"]),
    ],
)
def test_no_command_measures_elsewhere(
    main: Callable[[Sequence[str]], int],
    options: list[str],
    tiny: TinyFiles,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    given = [option.format(base=tiny.base, text=tmp_path / "text.txt") for option in options]
    assert main([*given, "--device", "cuda"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "llama.cpp finds no GPU" in err


def test_layers_without_a_gpu_are_a_contradiction(
    tiny: TinyFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generation.main([str(tiny.base), str(tiny.base), "--gpu-layers", "2"]) == 1
    assert "Add --device cuda" in capsys.readouterr().err


def test_a_cpu_is_not_compared_with_itself(tiny: TinyFiles) -> None:
    with pytest.raises(ValueError, match="a GPU is compared with a CPU"):
        kl.between_devices(tiny.base, TEXT, CPU)


@ON_GPU
def test_the_gpu_gives_the_logits_of_an_independent_forward_pass(tiny: TinyFiles) -> None:
    expected = reference_logits(SPEC, byte_ids("xyz: 42, qq; 17!" * 5))
    for runtime in (GPU, Runtime(n_threads=1, n_gpu_layers=1)):
        assert np.abs(_logits(tiny.base, runtime) - expected).max() < 0.05


@ON_GPU
def test_the_cpu_means_the_cpu(tiny: TinyFiles) -> None:
    """The bits of a process that sees no GPU."""
    program = (
        "import sys, numpy as np\n"
        "from test_eval_devices import _logits\n"
        "from evaluators.llama_runtime import Runtime\n"
        "np.save(sys.argv[2], _logits(sys.argv[1], Runtime(n_threads=1)))"
    )
    saved = tiny.base.with_suffix(".npy")
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run(
        [sys.executable, "-c", program, str(tiny.base), str(saved)],
        env={**os.environ, **hidden},
        check=True,
    )
    assert np.array_equal(np.load(saved), _logits(tiny.base, Runtime(n_threads=1)))


@ON_GPU
def test_both_devices_agree_and_the_report_says_so(
    tiny: TinyFiles, tmp_path: Path, run_json: Callable[..., dict[str, Any]]
) -> None:
    found = kl.between_devices(tiny.noisy, TEXT, GPU, n_ctx=64, max_windows=4)
    assert 0 < found.mean < 1e-3 and found.n == 4 * 31
    text = tmp_path / "cats.txt"
    text.write_text(TEXT)
    options = ("--text", text, "--ctx", 64, "--chunks", 2, "--device", "cuda")
    result = run_json(compare.main, "--base", tiny.base, tiny.noisy, *options)
    assert result["settings"]["device"] == described(GPU) != "CPU"
    for row in (result["base"], result["files"][0]):
        assert 0 < row["device_kl"]["mean"] < 1e-3
