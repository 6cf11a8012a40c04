"""Faults of the machine under the real command: one sentence, nothing lost, then the same bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Answer, Run, disk_of, quantkit, quantkit_under

from quantkit.run.artifacts import NAMES

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB."""
    with disk_of(tmp_path / "small", "size=16m") as folder:
        yield folder


def sentence(err: str) -> str:
    """The last line, with nothing above it that is no event."""
    assert "Traceback" not in err and "bug" not in err, err
    last = err.splitlines()[-1]
    assert last.startswith("quantkit: ")
    return last


@pytest.mark.parametrize(
    ("stage", "left"), [("convert", 100_000), ("calibrate", 300_000), ("stitch", 0)]
)
def test_a_disk_that_fills(
    whole_run: tuple[Run, Answer],
    small_disk: Path,
    offline: dict[str, str],
    stage: str,
    left: int,
) -> None:
    """In llama.cpp's converter, in safetensors' writer, and where not even an event has room."""
    expected = whole_run[0]
    run = expected.fork(small_disk / "run", stage)
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "others").write_bytes(b"x" * (free - left))
    failed = quantkit("resume", run.folder, env=offline)
    assert failed.code == 1
    assert f"The disk of {run.folder} is full. Free some" in sentence(failed.err)
    assert tuple(run.dir.records()) == NAMES[: NAMES.index(stage)]
    (small_disk / "others").unlink()
    answer = quantkit("resume", run.folder, env=offline)
    assert answer.code == 0, answer.err
    assert run.hashes == expected.hashes


def test_a_ulimit_that_is_too_low(
    whole_run: tuple[Run, Answer], tmp_path: Path, offline: dict[str, str]
) -> None:
    """Before a segmentation fault could be all that is said: what is there and what is needed."""
    run = whole_run[0].fork(tmp_path / "run", "calibrate")
    done = quantkit_under("-v 1150000", "resume", run.folder, env=offline)
    assert done.code == 1 and "by `ulimit -v`" in sentence(done.err)
    notes = [e.message for e in run.events if e.kind == "note"]
    assert any("there is little memory: calibrate takes about" in note for note in notes)
    answer = quantkit("resume", run.folder, env=offline)
    assert answer.code == 0 and run.hashes == whole_run[0].hashes


def test_a_full_temporary_folder(
    tiny_checkpoint: Path, small_disk: Path, offline: dict[str, str]
) -> None:
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "others").write_bytes(b"x" * (free - 60_000))
    env = {**offline, "TMPDIR": str(small_disk)}
    answer = quantkit("plan", tiny_checkpoint, "--profile", "demo", env=env)
    assert answer.code == 1
    assert f"The disk of {small_disk} is full" in sentence(answer.err) and "TMPDIR" in answer.err


def test_too_few_files_may_be_open(
    whole_run: tuple[Run, Answer], tmp_path: Path, offline: dict[str, str]
) -> None:
    run = whole_run[0].fork(tmp_path / "run", "quantize")
    done = quantkit_under("-n 10", "resume", run.folder, env=offline)
    assert done.code == 1 and "ulimit -n" in sentence(done.err)
