"""Which of llama.cpp's own files the output is compared with, and what stands in for those that
cannot be made.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_gguf import Shape, write_llama

from evaluators import kl
from quantkit.config import RunConfig, Target
from quantkit.ggufio.imatrix import write_imatrix
from quantkit.ggufio.read import GgufFile
from quantkit.kquants.stock import StockRecipe, stock_bytes
from quantkit.pipeline import Run
from quantkit.rundir import EventLog, RunDir, read_events
from quantkit.stages import validate


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    shape = Shape(n_embd=256, n_ff=512, n_layer=1)
    return GgufFile(write_llama(tmp_path_factory.mktemp("base") / "base.gguf", shape))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were really made and given to the evaluator."""
    seen: list[str] = []

    def measure(_logits: Any, path: Path, progress: Any) -> SimpleNamespace:
        assert GgufFile(path).tensors
        seen.append(path.name)
        n_bytes = path.stat().st_size
        return SimpleNamespace(n_bytes=n_bytes, to_json=lambda: {"domains": {}})

    monkeypatch.setattr(kl, "measure", measure)
    monkeypatch.setattr(validate, "_row", lambda result, _: {"n_bytes": result.n_bytes})
    return seen


def run_in(folder: Path, target: Target | None = None) -> Run:
    directory = RunDir(folder)
    imatrix = directory.stage_dir("calibrate") / "imatrix.gguf"
    imatrix.parent.mkdir(parents=True)
    write_imatrix(imatrix, {}, ["x"], 1, 512)
    return Run(RunConfig("m", target=target), directory, EventLog(directory.events_path))


def compare(run: Run, base: GgufFile, n_bytes: int) -> tuple[list[dict], list[dict]]:
    recipes = validate._baselines(run, base, n_bytes)
    return validate._measure_baselines(run, base, None, recipes, lambda _: lambda *_: None)


def test_the_nearest_files_on_both_sides(
    base: GgufFile, measured: list[str], tmp_path: Path
) -> None:
    n_bytes = stock_bytes(base, StockRecipe("Q4_K_M")) + 100
    rows, left_out = compare(run_in(tmp_path), base, n_bytes)
    below = [row for row in rows if row["n_bytes"] <= n_bytes]
    assert len(below) == 3 and len(rows) == 4 and not left_out
    assert "Q4_K_M" in [row["name"] for row in below]
    assert len(measured) == 4
    assert not list(run_in(tmp_path / "2").dir.path.glob("**/stock-*"))


def test_the_one_that_was_asked_for(base: GgufFile, measured: list[str], tmp_path: Path) -> None:
    run = run_in(tmp_path, Target("like", "Q8_0"))
    rows, _ = compare(run, base, stock_bytes(base, StockRecipe("Q4_0")))
    assert rows[-1]["name"] == "Q8_0" and len(rows) == 5


def test_files_that_cannot_be_made_are_passed_over_and_named(
    base: GgufFile, measured: list[str], tmp_path: Path
) -> None:
    """Without importances no file of codebooks: the next smaller or larger one stands in."""
    run = run_in(tmp_path)
    n_bytes = stock_bytes(base, StockRecipe("Q3_K_S"))
    rows, left_out = compare(run, base, n_bytes)
    assert {"Q3_K_S", "Q2_K"} <= {row["name"] for row in rows}
    assert left_out and not {row["name"] for row in left_out} & {row["name"] for row in rows}
    assert any(row["name"].startswith("IQ") for row in left_out)
    assert all("mportance" in row["reason"] for row in left_out)
    notes = [e.message for e in read_events(run.dir.events_path)[0]]
    assert len(notes) == len(left_out)
