"""Speed runs in a process of its own and says what went wrong there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_fixtures import ONE, TinyFiles, run_json, tiny

from evaluators import speed
from evaluators.errors import EvaluationError

measure = partial(speed.measure, runtime=ONE, n_prompt=32, n_generate=8, n_repeats=2)

__all__ = ["run_json", "tiny"]  # fixtures: used by name


def test_figures(tiny: TinyFiles) -> None:
    result = measure(tiny.base, n_ctx=128)
    assert result.n_bytes == tiny.base.stat().st_size
    for rates in (result.prompt, result.generation):
        assert len(rates.repeats) == 2
        assert rates.tokens_per_second == max(rates.repeats) > 0
    assert result.prompt.tokens == 32 and result.generation.tokens == 8
    assert 0 < result.load_seconds < 60
    assert 20e6 < result.peak_rss_bytes < 2e9
    # two layers of 64 wide keys and values, 16 bit, in llama.cpp's padded context of 256
    assert result.buffers["kv_bytes"] == pytest.approx(2 * 2 * 64 * 2 * 256, rel=0.05)
    assert result.buffers["model_bytes"] > 300_000
    assert result.buffers["compute_bytes"] > 0
    assert (result.n_threads, result.n_gpu_layers) == (1, 0)


def test_memory_is_not_the_parents(tiny: TinyFiles) -> None:
    ballast = np.ones(60_000_000, np.float64)  # 480 MB, more than the child itself takes
    assert measure(tiny.base, n_ctx=128).peak_rss_bytes < ballast.nbytes and ballast.sum() > 0


@pytest.mark.slow
def test_failures_of_the_child_are_the_callers(tiny: TinyFiles, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="do not fit a context of 16"):
        measure(tiny.base, n_ctx=16)
    with pytest.raises(EvaluationError, match="longer than the 256"):
        measure(tiny.base, n_ctx=512)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.base.read_bytes()[:-1000])
    with pytest.raises(EvaluationError, match="not within the file bounds"):
        measure(cut, n_ctx=128)


def test_a_child_that_is_killed(
    tiny: TinyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(EvaluationError, match="signal 9"):
        measure(tiny.base, n_ctx=128)


def test_command(tiny: TinyFiles, run_json: Callable[..., dict[str, Any]]) -> None:
    options = ["--ctx", 64, "--prompt", 16, "--generate", 4, "--repeats", 1]
    result = run_json(speed.main, tiny.base, tiny.noisy, *options)
    assert [Path(row["file"]).name for row in result["files"]] == ["base.gguf", "noisy.gguf"]
    assert speed.main([str(tiny.base), *map(str, options), "--threads", "1", "--table"]) == 0
