"""A run whose files are tuned: killed on the way, cleaned, and made again from the recipe."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import pytest
from commands import Answer, Run, kill, packed_tensors, quantkit, start

from quantkit import pipeline
from quantkit.config import RunConfig
from quantkit.files import sha256_file, write_json
from quantkit.ggml.types import FILE_TYPES
from quantkit.gguf_file.read import GgufFile
from quantkit.model.blockwise import BlockwiseModel
from quantkit.rebuild import rebuild
from quantkit.run.events import read_events
from quantkit.run.folder import read_json
from quantkit.stages.search import Search
from quantkit.tuning import distributed
from quantkit.tuning.tuner import Tuner

pytestmark = pytest.mark.slow

TARGETS = [{"kind": "like", "value": "Q6_K"}, {"kind": "like", "value": "Q4_K_M"}]
STEPS = 40


@pytest.fixture(scope="module")
def forked(whole_run: tuple[Run, Answer], tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("tuned") / "run"
    return whole_run[0].fork(folder, "search", targets=TARGETS, tuning=STEPS)


@pytest.fixture(scope="module")
def tuned(forked: Run, offline: dict[str, str]) -> Run:
    answer = quantkit("resume", forked.folder, env=offline)
    assert answer.code == 0, answer.err
    return forked


def searched(run: Run) -> list[Path]:
    """The folders of the budgets, smallest first."""
    folder = run.dir.stage_dir("search")
    return [folder / str(budget["limit_bytes"]) for budget in run.budgets]


def files(run: Run) -> dict[str, str]:
    """sha256 of the finished files and the tuned level files."""
    found = [path for s in ("stitch", "tune") for path in run.dir.stage_dir(s).rglob("*.gguf")]
    return {path.name: sha256_file(path) for path in found}


def test_one_model_at_a_time(
    whole_run: tuple[Run, Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is gigabytes on a GPU, and the search's refers to itself."""
    run = whole_run[0].fork(tmp_path / "run", "search", targets=TARGETS, tuning=1)
    config = RunConfig.from_json(read_json(run.dir.config_path))
    load, alive = distributed.load_tuner, []

    def counted(model: BlockwiseModel, *others: Any, **named: Any) -> Tuner:
        alive.append(sum(type(found) is BlockwiseModel for found in gc.get_objects()))
        return load(model, *others, **named)

    monkeypatch.setattr(distributed, "load_tuner", counted)
    gc.collect()
    gc.disable()
    try:
        pipeline.run(config, run.folder, until="tune")
    finally:
        gc.enable()
    assert alive == [1, 1]


def test_files_are_nearer_to_the_model(tuned: Run) -> None:
    """Of the same size and types; what changed is named in budget, recipe and report."""
    for folder, row in zip(searched(tuned), tuned.report["outputs"], strict=True):
        said = read_json(tuned.dir.artifacts.tuning)["budgets"][folder.name]
        assert said == row["search"]["tuning"]
        assert said["steps"] == STEPS
        # Six steps on random weights: a thousandth either way is the rounding of the machine.
        assert 0 < said["kl_after"] < 1.01 * said["kl_before"]
        outcome = read_json(tuned.dir.artifacts.tuned(int(folder.name)).with_name("outcome.json"))
        assert len(outcome["errors"]) == 2  # blocks
        chosen = read_json(folder / "allocation.json")
        stored = packed_tensors(next(tuned.dir.stage_dir("stitch").glob(Path(row["name"]).name)))
        levels = {p.name: packed_tensors(p) for p in tuned.levels.glob("*.gguf")}
        for name, choice in chosen.items():
            is_tuned = name in outcome["tensors"]
            method = choice["method"] + ("+tuned" if is_tuned else "")
            assert row["tensors"][name]["method"] == method
            known = [own[name] for own in levels.values() if own[name][0] == choice["qtype"]]
            assert (stored[name] in known) != is_tuned
    assert all("tuned" in row for row in _card(tuned) if row.startswith("Quantized tensors"))


def _card(run: Run) -> list[str]:
    path = run.dir.stage_dir("publish") / "upload" / "README.md"
    return path.read_text("utf-8").splitlines()


def test_a_tuned_file_lies_on_the_disk_once(tuned: Run) -> None:
    """Tuned, stitched and ready for the upload: three names of one file."""
    upload = tuned.dir.stage_dir("publish") / "upload"
    for folder, row in zip(searched(tuned), tuned.report["outputs"], strict=True):
        file = tuned.dir.artifacts.tuned(int(folder.name))
        output = tuned.dir.stage_dir("stitch") / row["name"]
        assert file.samefile(output) and file.samefile(upload / output.name)
        assert GgufFile(file).metadata["general.file_type"] == FILE_TYPES[row["label"]]


def test_killed_while_it_tunes(
    whole_run: tuple[Run, Answer], tuned: Run, offline: dict[str, str], tmp_path: Path
) -> None:
    """The same bytes, tuned level files included."""
    run = whole_run[0].fork(tmp_path / "killed", "search", targets=TARGETS, tuning=STEPS)
    process = start("resume", run.folder, env=offline)
    while process.poll() is None:
        events = read_events(run.dir.events_path)[0] if run.dir.events_path.exists() else []
        if any(event.stage == "tune" and "block 1" in event.message for event in events):
            break
        time.sleep(0.001)
    assert process.poll() is None, "it ended before it could be killed"
    kill(process)
    assert "tune" not in run.dir.records()
    n_events = len(read_events(run.dir.events_path)[0])
    answer = quantkit("resume", run.folder, env=offline)
    assert answer.code == 0, answer.err
    assert files(run) == files(tuned)
    said = [event.message for event in read_events(run.dir.events_path)[0][n_events:]]
    assert not any("generation" in message for message in said), "it searched again"


def test_from_the_kept_levels(tuned: Run, offline: dict[str, str], tmp_path: Path) -> None:
    upload = tuned.dir.stage_dir("publish") / "upload"
    for path in sorted((upload / "recipes").glob("*.json")):
        out = tmp_path / f"{path.stem}.gguf"
        options = ("--base", tuned.base, "--levels", tuned.folder, "--out", out, "--json")
        answer = quantkit("rebuild", path, *options, env=offline)
        assert answer.code == 0, answer.err
        assert answer.json["equal"] and sha256_file(out) == sha256_file(upload / out.name)


def test_from_the_base_alone(tuned: Run, offline: dict[str, str], tmp_path: Path) -> None:
    """Calibration, levels and tuning all over again."""
    path = next((tuned.dir.stage_dir("stitch") / "recipes").glob("*Q4_K_M*.json"))
    out = tmp_path / "again.gguf"
    answer = quantkit("rebuild", path, "--base", tuned.base, "--out", out, "--json", env=offline)
    assert answer.code == 0, answer.err
    assert answer.json["equal"]


def test_from_the_base_alone_nothing_is_searched(
    tuned: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def searched_again(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(Search, "execute", searched_again)
    for path in sorted((tuned.dir.stage_dir("stitch") / "recipes").glob("*.json")):
        assert rebuild(path, tuned.base, None, tmp_path / f"{path.stem}.gguf").equal


def test_clean_drops_tuned_levels(
    tuned: Run, whole_run: tuple[Run, Answer], offline: dict[str, str], tmp_path: Path
) -> None:
    run = whole_run[0].fork(tmp_path / "cleaned", "search", tuning=2)
    assert quantkit("resume", run.folder, env=offline).code == 0
    output = sha256_file(run.output)
    levels = sum(path.stat().st_size for path in run.levels.glob("*.gguf"))
    answer = quantkit("clean", run.folder, "--json", env=offline)
    assert answer.code == 0, answer.err
    # The tuned file is the output, and stays under that name.
    assert levels <= answer.json["freed_bytes"] < levels + run.output.stat().st_size
    assert not list(run.dir.stage_dir("tune").rglob("*.gguf"))
    assert sha256_file(run.output) == output
    assert GgufFile(run.output).tensors
    answer = quantkit("resume", run.folder, env=offline)
    assert answer.code == 0, answer.err
    assert sha256_file(run.output) == output


def test_too_little_memory_to_tune(
    whole_run: tuple[Run, Answer], offline: dict[str, str], tmp_path: Path
) -> None:
    """The run goes on, and run, report and card say why nothing was tuned."""
    run = whole_run[0].fork(tmp_path / "little", "search", tuning=STEPS)
    # What an attempt with more memory left behind when it was killed.
    left = run.dir.artifacts.tuned(whole_run[0].budgets[0]["limit_bytes"]).parent
    outcome = {"n_steps": STEPS, "kl_before": 1.0, "kl_after": 0.5, "errors": []}
    left.mkdir(parents=True)
    write_json(left / "outcome.json", {**outcome, "tensors": ["token_embd.weight"]})
    answer = quantkit("resume", run.folder, env={**offline, "QUANTKIT_MEMORY": "1MB"})
    assert answer.code == 0, answer.err
    assert "the files will not be tuned: tuning takes" in answer.err
    assert "are free" in run.report["outputs"][0]["search"]["tuning"]["reason"]
    assert any("Not tuned: tuning takes" in line for line in _card(run))
    assert run.hashes == whole_run[0].hashes
