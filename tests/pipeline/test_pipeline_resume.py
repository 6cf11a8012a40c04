"""A run that is killed, started twice, asked for something else, or cleaned."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from commands import CHEAP, Answer, Run, kill, quantkit, start, wait_for

from quantkit import pipeline
from quantkit.errors import QuantkitError
from quantkit.files import sha256_file
from quantkit.run.artifacts import NAMES
from quantkit.run.events import EventLog
from quantkit.run.folder import RunDir
from quantkit.stages import STAGES

pytestmark = pytest.mark.slow

# When each stage is killed: at its beginning, or as late as its units of work allow. Generation 1
# of the search has its parent's hidden states in memory; the process that goes on has not.
MOMENTS = {
    "fetch": "started",
    "convert": "started progress",
    "calibrate": "started progress",
    "quantize": "started progress",
    "search": "started progress progress",
    "tune": "started",
    "stitch": "started",
    "validate": "started progress",
    "publish": "started",
}
LONG = {"convert", "quantize", "search", "validate"}  # cannot end before the kill


def processes_in(folder: Path) -> list[str]:
    """Command lines of the processes that name a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:  # it has ended
            continue
        if str(folder) in words and "pytest" not in words:
            found.append(words)
    return found


def test_kill_in_every_stage(
    tiny_checkpoint: Path,
    whole_run: tuple[Run, Answer],
    tmp_path: Path,
    offline: dict[str, str],
) -> None:
    """One run, killed once in each of its stages: its files are those of an undisturbed one. Every
    other process has too little memory for the model and streams it.
    """
    run = Run(tmp_path / "killed")
    command = ("run", tiny_checkpoint, "--out", run.folder, *CHEAP)
    for i, stage in enumerate(NAMES):
        little = {"QUANTKIT_MEMORY": "100kB"} if i % 2 else {}
        process = start(*command, env={**offline, **little})
        assert wait_for(process, run.folder, stage, MOMENTS[stage]), f"{stage} never began"
        kill(process)
        assert process.returncode == -signal.SIGKILL
        done = run.dir.records()
        assert tuple(done) == NAMES[: len(done)]
        if stage in LONG:
            assert tuple(done) == NAMES[: NAMES.index(stage)]
        for _ in range(100):  # the converter's process is told of its parent's death
            if not processes_in(run.folder):
                break
            time.sleep(0.05)
        assert not processes_in(run.folder)
    status = quantkit("status", run.folder, env=offline)
    if tuple(run.dir.records()) != NAMES:
        assert f"{run.folder}: interrupted" in status.out
        assert f"quantkit resume {run.folder}" in status.out
    answer = quantkit(*command, "--json", env=offline)
    assert answer.code == 0, answer.err
    expected = whole_run[0]
    assert run.hashes == expected.hashes
    kl = [r.report["outputs"][0]["kl"] for r in (run, expected)]
    assert kl[0] == kl[1]
    mine, theirs = (
        {str(p.relative_to(r.folder)) for p in r.folder.rglob("*")} for r in (run, expected)
    )
    assert mine == theirs  # nothing is left over


def test_a_streamed_run(
    tiny_checkpoint: Path, whole_run: tuple[Run, Answer], tmp_path: Path, offline: dict[str, str]
) -> None:
    """With less memory than the model takes, all stages make the same files, and say so."""
    run = Run(tmp_path / "streamed")
    env = {**offline, "QUANTKIT_MEMORY": "100kB"}
    answer = quantkit("run", tiny_checkpoint, "--out", run.folder, *CHEAP, "--json", env=env)
    assert answer.code == 0, answer.err
    expected = whole_run[0]
    assert run.hashes == expected.hashes
    assert run.report["outputs"][0]["kl"] == expected.report["outputs"][0]["kl"]
    notes = [e for e in run.events if "blocks are read one by one" in e.message]
    assert [e.stage for e in notes] == ["convert", "calibrate", "quantize", "search"]
    assert "blocks are read one by one" not in expected.dir.events_path.read_text("utf-8")


def test_one_run_at_a_time(
    tiny_checkpoint: Path, whole_run: tuple[Run, Answer], tmp_path: Path, offline: dict[str, str]
) -> None:
    """A folder in which a process is at work refuses another, which changes nothing in it."""
    run = whole_run[0].fork(tmp_path / "busy", "convert")
    process = start("resume", run.folder, env=offline)
    try:
        assert wait_for(process, run.folder, "convert", "started")
        os.killpg(process.pid, signal.SIGSTOP)  # it holds the folder for as long as we look
        before = run.dir.events_path.read_bytes()
        refused = quantkit("run", tiny_checkpoint, "--out", run.folder, *CHEAP, env=offline)
        assert refused.code == 1 and refused.out == ""
        assert f"Another run (process {process.pid}) is running in {run.folder}." in refused.err
        assert "Traceback" not in refused.err
        for command in (("resume",), ("clean",), ("publish",)):
            extra = ("alice/x",) if command == ("publish",) else ()
            answer = quantkit(*command, run.folder, *extra, env=offline)
            assert answer.code == 1, command
        status = quantkit("status", run.folder, "--json", env=offline)
        assert status.code == 0 and status.json["state"] == "running"
        assert run.dir.events_path.read_bytes() == before
    finally:
        kill(process)
    status = quantkit("status", run.folder, "--json", env=offline)
    assert status.json["state"] == "interrupted" and status.json["done"] == ["fetch"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--seed", "7"), "seed = 0, not 7"),
        (("--like", "Q6_K"), "targets = (not given), not like Q6_K"),
        (("--methods", "rtn"), "methods"),
    ],
)
def test_another_option_in_a_used_folder(
    tiny_checkpoint: Path,
    whole_run: tuple[Run, Answer],
    offline: dict[str, str],
    options: tuple[str, str],
    words: str,
) -> None:
    folder = whole_run[0].folder
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != "lock"}
    answer = quantkit("run", tiny_checkpoint, "--out", folder, *CHEAP, *options, env=offline)
    assert answer.code == 2 and answer.out == ""
    assert words in answer.err and "Choose another --out" in answer.err
    assert len(answer.err.splitlines()) == 1
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != "lock"} == before


def test_clean(whole_run: tuple[Run, Answer], tmp_path: Path, offline: dict[str, str]) -> None:
    """Levels and Hessians go, results stay, and there is still nothing to do."""
    run = whole_run[0].fork(tmp_path / "cleaned", "publish")
    assert quantkit("resume", run.folder, env=offline).code == 0
    n_levels = sum(p.stat().st_size for p in run.levels.glob("*.gguf"))
    kept = {"output": run.output, "base": run.base, "recipe": run.recipe_path}
    answer = quantkit("clean", run.folder, "--json", env=offline)
    assert answer.code == 0 and answer.json["freed_bytes"] > n_levels
    assert not list(run.levels.glob("*.gguf")) and not list(run.folder.rglob("block-*"))
    assert all(path.exists() for path in kept.values()) and run.report
    status = quantkit("status", run.folder, "--json", env=offline)
    assert status.json["state"] == "done" and tuple(status.json["done"]) == NAMES
    n = len(run.events)
    again = quantkit("resume", run.folder, "--json", env=offline)
    assert again.code == 0, again.err
    kinds = [e.kind for e in run.events[n:]]
    assert kinds == ["started", *["skipped"] * len(NAMES), "finished"]
    assert not list(run.levels.glob("*.gguf"))
    assert quantkit("clean", run.folder, "--json", env=offline).json["freed_bytes"] == 0


def test_a_cleaned_run_makes_its_levels_again_when_it_needs_them(
    whole_run: tuple[Run, Answer], tmp_path: Path, offline: dict[str, str]
) -> None:
    """Killed before stitch, cleaned, resumed: everything from the dropped files on is made anew."""
    expected = whole_run[0]
    run = expected.fork(tmp_path / "cleaned", "stitch")
    assert quantkit("clean", run.folder, env=offline).code == 0
    answer = quantkit("resume", run.folder, env=offline)
    assert answer.code == 0, answer.err
    assert run.hashes == expected.hashes


@pytest.mark.parametrize("command", ["status", "resume", "clean"])
def test_a_folder_without_a_run(tmp_path: Path, offline: dict[str, str], command: str) -> None:
    answer = quantkit(command, tmp_path, env=offline)
    assert answer.code == 2 and "holds no run" in answer.err and not list(tmp_path.iterdir())


def flip(path: Path) -> None:
    """Change one byte of a file and not its time, as a bad disk does."""
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[-len(data) // 3] ^= 0x11
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    ("stage", "pattern", "again"),
    [
        ("stitch", "4-quantize/Q4_*.gguf", "quantize"),
        ("stitch", "5-search/*/state.json", "search"),
        ("publish", "7-stitch/*.gguf", "stitch"),
    ],
)
def test_damaged_files_are_made_again(
    whole_run: tuple[Run, Answer],
    tmp_path: Path,
    offline: dict[str, str],
    stage: str,
    pattern: str,
    again: str,
) -> None:
    """Bytes that changed behind the run's back are noticed, and everything after them redone."""
    expected = whole_run[0]
    run = expected.fork(tmp_path / "damaged", stage)
    for path in run.folder.glob(pattern):
        flip(path)
    answer = quantkit("resume", run.folder, env=offline)
    assert answer.code == 0, answer.err
    assert run.hashes == expected.hashes
    assert [e.stage for e in run.events if "changed" in e.message] == [again]
    published = run.dir.stage_dir("publish") / "upload" / run.output.name
    assert sha256_file(published) == expected.hashes[run.output.name]


class Watched(RunDir):
    """A run's folder that notes what is to be forgotten."""

    def forget(self, stage: str) -> None:
        self.forgotten = stage


@pytest.mark.parametrize("n_done", range(1, len(NAMES)))
def test_every_byte_that_is_read_again_is_looked_at(
    whole_run: tuple[Run, Answer], tmp_path: Path, n_done: int
) -> None:
    """After an interruption, before each of the stages: what is not noticed no stage reads."""
    run = whole_run[0].fork(tmp_path / "run", NAMES[n_done])
    directory, log = Watched(run.folder), EventLog(tmp_path / "events.jsonl")
    done = list(directory.records().values())
    assert pipeline._n_whole(done, STAGES, directory, log) == n_done
    for record in done:
        reader = next(s for s in STAGES if s.name == record.stage).last_reader
        for output in record.outputs:
            directory.forgotten = ""
            path = run.folder / output.path
            flip(path)
            n = pipeline._n_whole(done, STAGES, directory, log)
            flip(path)
            if n == n_done:
                assert NAMES.index(reader(output.path)) < n_done, output.path
            else:
                assert (NAMES[n], directory.forgotten) == (record.stage, record.stage)


def test_a_file_that_changes_while_it_is_validated(
    whole_run: tuple[Run, Answer], tmp_path: Path
) -> None:
    run = whole_run[0].fork(tmp_path / "run", "publish")
    flip(run.output)
    with pytest.raises(QuantkitError, match="not the file that was stitched"):
        pipeline._check_outputs(run.dir)


def test_what_is_missing_is_made_again_and_results_stay(
    whole_run: tuple[Run, Answer], tmp_path: Path, offline: dict[str, str]
) -> None:
    """Somebody made room by hand: nothing that is whole is thrown away for it."""
    expected = whole_run[0]
    run = expected.fork(tmp_path / "run", "publish")
    (run.dir.artifacts.tokens).unlink()
    log = EventLog(run.dir.events_path)
    done = list(run.dir.records().values())
    assert NAMES[pipeline._n_whole(done, STAGES, run.dir, log)] == "calibrate"
    assert run.output.exists() and run.report and list(run.levels.glob("*.gguf"))
    assert quantkit("resume", run.folder, env=offline).code == 0
    assert run.hashes == expected.hashes
