"""Moments between two files: what a kill there leaves is taken up, what no longer fits is not."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from commands import Answer, Run

from quantkit import pipeline
from quantkit.config import RunConfig
from quantkit.errors import QuantkitError
from quantkit.files import write_json
from quantkit.gguf_file.read import GgufFile
from quantkit.rebuild import rebuild
from quantkit.run.events import EventLog
from quantkit.run.folder import RunDir, StageRecord, read_json
from quantkit.run.outputs import load_budgets, load_outputs
from quantkit.run.recipe import Recipe
from quantkit.search.answers import load_allocation
from quantkit.sizes import size
from quantkit.sources.snapshot import load_snapshot
from quantkit.statistics import collect
from quantkit.statistics.inputs import BlockStatistics
from quantkit.tensors import UNCHANGED

pytestmark = pytest.mark.slow


def go_on(run: Run, until: str) -> None:
    config = RunConfig.from_json(read_json(run.dir.config_path))
    pipeline.run(config, run.folder, until=until)


def sizes(*sizes: int) -> list[dict[str, str]]:
    return [{"kind": "size", "value": str(n)} for n in sizes]


def test_levels_that_are_finished_but_not_recorded(
    whole_run: tuple[Run, Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashing gigabytes takes a while; a kill then costs no work."""
    expected = whole_run[0]
    run = expected.fork(tmp_path / "run", "quantize")

    def killed(self: RunDir, record: StageRecord) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunDir, "save_record", killed)
        go_on(run, "quantize")
    levels = sorted(path.name for path in run.levels.glob("*.gguf"))
    assert levels and "quantize" not in run.dir.records()
    os.replace(run.levels / levels[0], run.levels / f"{levels[0]}.partial")  # between two finishes

    def solved(*_: Any) -> None:
        raise AssertionError("it was solved again")

    monkeypatch.setattr("quantkit.gptq.units.Unit.solve", solved)
    go_on(run, "quantize")
    assert not list(run.levels.glob("*.partial"))
    record, wanted = run.dir.records()["quantize"], expected.dir.records()["quantize"]
    assert [o.sha256 for o in record.outputs] == [o.sha256 for o in wanted.outputs]


def test_levels_go_before_measuring_where_the_disk_is_short(
    whole_run: tuple[Run, Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = whole_run[0].fork(tmp_path / "run", "validate")
    n_bytes = sum(path.stat().st_size for path in run.levels.glob("*.gguf"))
    with monkeypatch.context() as patch:
        patch.setattr("quantkit.evidence.room.disk_usage", lambda _: SimpleNamespace(free=1000))
        go_on(run, "validate")
    assert not list(run.levels.glob("*.gguf")) and run.dir.records()["quantize"].cleaned
    (said,) = (e.message for e in run.events if "nothing reads them any more" in e.message)
    assert size(n_bytes) in said
    kl = run.report["outputs"][0]["weight_kl"]["mean"]
    assert kl == whole_run[0].report["outputs"][0]["weight_kl"]["mean"]
    n_events = len(run.events)
    go_on(run, "publish")
    done = [e.stage for e in run.events[n_events:] if e.kind == "finished" and e.stage]
    assert done == ["publish"], "nothing needs the levels"


def test_a_size_above_all_levels_leaves_tensors_as_they_are(
    whole_run: tuple[Run, Answer], tmp_path: Path
) -> None:
    largest = max(path.stat().st_size for path in whole_run[0].levels.glob("*.gguf"))
    n_bytes = (whole_run[0].base.stat().st_size + largest) // 2
    run = whole_run[0].fork(tmp_path / "run", "search", targets=sizes(n_bytes))
    go_on(run, "stitch")
    recipe, file, base = Recipe.load(run.recipe_path), GgufFile(run.output), GgufFile(run.base)
    kept = [name for name, t in recipe.tensors.items() if t.method == UNCHANGED]
    assert kept and largest < run.output.stat().st_size <= n_bytes
    for name in kept:
        assert recipe.tensors[name].file == "base.gguf"
        assert np.array_equal(file.packed(name), base.packed(name))
    assert rebuild(run.recipe_path, run.base, run.levels, tmp_path / "again.gguf").equal


def test_a_turn_is_forgotten_before_the_next(
    whole_run: tuple[Run, Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two turns' Hessians would be in memory, of which one has just room."""
    expected = whole_run[0]
    run = expected.fork(tmp_path / "run", "quantize")
    in_turns = collect._in_turns
    n_turns = []

    def watched(*arguments: Any) -> Iterator[BlockStatistics]:
        n_turns.append(0)
        for turn in in_turns(*arguments):
            hessians = [weakref.ref(s.train) for s in turn.inputs]
            box = [turn]
            del turn
            yield box.pop()
            assert not [hessian for hessian in hessians if hessian() is not None]
            n_turns[-1] += 1

    monkeypatch.setattr(collect, "_in_turns", watched)
    monkeypatch.setenv("QUANTKIT_MEMORY", "100kB")
    go_on(run, "quantize")
    assert min(n_turns) > 1
    record, wanted = run.dir.records()["quantize"], expected.dir.records()["quantize"]
    assert [o.sha256 for o in record.outputs] == [o.sha256 for o in wanted.outputs]


def test_text_that_changed_while_calibrate_was_at_work(
    whole_run: tuple[Run, Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage ends with the text that it began with, and says so."""
    text = tmp_path / "own.txt"
    documents = whole_run[0].dir.stage_dir("calibrate") / "eval"
    text.write_text("\n\n".join(path.read_text("utf-8") for path in documents.glob("*.txt")) * 3)
    run = whole_run[0].fork(tmp_path / "run", "calibrate", calibration=str(text))

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("quantkit.statistics.fisher.output_fisher", killed)
        go_on(run, "calibrate")
    tokens = run.dir.artifacts.tokens
    before = tokens.read_bytes()
    text.unlink()
    go_on(run, "calibrate")
    assert tokens.read_bytes() == before
    assert any("continuing with the text" in event.message for event in run.events)
    report = read_json(run.dir.stage_dir("calibrate") / "calibration.json")
    assert [domain["name"] for domain in report["domains"]] == ["own.txt"]


def test_answers_to_other_choices_are_forgotten(
    whole_run: tuple[Run, Answer], tmp_path: Path
) -> None:
    """A search's numbers stand for levels: when those were made anew, old ones mean nothing."""
    run = whole_run[0].fork(tmp_path / "run", "search")
    go_on(run, "search")
    (budget,) = load_budgets(run.dir)
    wanted = load_allocation(run.dir.artifacts, budget.limit_bytes)
    folder = run.dir.artifacts.answer(budget.limit_bytes)
    state = read_json(folder / "state.json")
    state["best"]["choices"] = [0 for _ in state["best"]["choices"]]
    write_json(folder / "state.json", state)
    table = read_json(folder.parent / "budgets.json")
    write_json(folder.parent / "budgets.json", {**table, "choices": "other"})
    manifest = read_json(run.folder / "manifest.json")
    del manifest["stages"]["search"]
    del manifest["sha256"]  # of what it held
    write_json(run.folder / "manifest.json", manifest)
    go_on(run, "search")
    assert load_allocation(run.dir.artifacts, budget.limit_bytes) == wanted
    assert read_json(folder / "state.json")["best"]["choices"] != state["best"]["choices"]


def test_files_of_nearly_one_size(whole_run: tuple[Run, Answer], tmp_path: Path) -> None:
    """Two names, however many decimals that takes."""
    (budget,) = load_budgets(whole_run[0].dir)
    run = whole_run[0].fork(
        tmp_path / "run", "search", targets=sizes(*(budget.limit_bytes - 300 * i for i in range(6)))
    )
    go_on(run, "stitch")
    outputs = load_outputs(run.dir).outputs
    names = [output.file for output in outputs]
    assert len(outputs) > 1 and len(set(names)) == len(names)
    for output in outputs:
        n_bytes = (run.dir.stage_dir("stitch") / output.file).stat().st_size
        assert n_bytes == output.n_bytes <= output.budget.limit_bytes


def test_a_folder_that_was_moved(
    whole_run: tuple[Run, Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run made itself is looked for in its folder, however that is spelled."""
    run = whole_run[0].fork(tmp_path / "run", "convert")
    path = run.dir.stage_dir("fetch") / "snapshot.json"
    made = run.dir.stage_dir("fetch") / "model"
    made.mkdir()
    write_json(path, {**read_json(path), "folder": "1-fetch/model"})
    assert load_snapshot(run.dir).folder == made
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert load_snapshot(RunDir(Path("moved"))).folder == Path("moved/1-fetch/model")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(28, "No space left on device"), "The disk of .* is full"),
        (MemoryError(), "too little memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), "The GPU has too"),
    ],
)
def test_want_of_room_is_no_bug(
    whole_run: tuple[Run, Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    sentence: str,
) -> None:
    run = whole_run[0].fork(tmp_path / "run", "stitch")

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("quantkit.stages.stitch.Stitch.execute", fail)
    with pytest.raises(QuantkitError, match=sentence):
        go_on(run, "stitch")
    last = run.events[-1]
    assert last.kind == "failed" and "bug" not in last.data["remedy"]
    assert EventLog(run.dir.events_path)  # the run can be taken up
