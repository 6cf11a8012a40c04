"""The run's folder: files whole or not at all, one run at a time, events that can be followed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit import pipeline
from quantkit.config import RunConfig
from quantkit.config.targets import LikeMix
from quantkit.errors import QuantkitError, UsageError
from quantkit.files import link, replacing, sha256_file, write_json
from quantkit.run.artifacts import NAMES
from quantkit.run.events import EventLog, read_events
from quantkit.run.folder import OutputFile, RunDir, StageRecord, fingerprint, read_json


def test_nine_stages_in_order(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert [run.stage_dir(s).name for s in NAMES] == [f"{i}-{s}" for i, s in enumerate(NAMES, 1)]
    assert len(NAMES) == 9


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with replacing(path) as partial:
        partial.write_text("one")
        assert not path.exists() and partial.parent == path.parent
    assert path.read_text() == "one" and os.listdir(path.parent) == ["file"]
    with pytest.raises(ZeroDivisionError), replacing(path) as partial:
        partial.write_text("half of tw")
        raise ZeroDivisionError
    assert path.read_text() == "one"
    with replacing(path) as partial:  # what the failure left behind does not matter
        partial.write_text("three")
    assert path.read_text() == "three"


def test_a_link_is_a_second_name(tmp_path: Path) -> None:
    source, target = tmp_path / "tuned.gguf", tmp_path / "out" / "model.gguf"
    source.write_text("weights")
    target.parent.mkdir()
    target.write_text("of an earlier attempt")
    for _ in range(2):  # once more, as after a kill
        link(source, target)
        assert target.samefile(source) and os.listdir(target.parent) == ["model.gguf"]
    source.unlink()
    assert target.read_text() == "weights"


def test_a_link_without_hard_links_is_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    source, target = tmp_path / "tuned.gguf", tmp_path / "model.gguf"
    source.write_text("weights")
    link(source, target)
    assert target.read_text() == "weights" and not target.samefile(source)


def test_a_reader_never_sees_a_half_written_file(tmp_path: Path) -> None:
    path, stop = tmp_path / "state.json", threading.Event()
    write_json(path, [0] * 1000)

    def write() -> None:
        for i in range(60):
            write_json(path, [i] * 1000)
        stop.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not stop.is_set():
        assert len(set(read_json(path))) == 1
    thread.join()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(json_values)
def test_json_round_trips(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    assert read_json(write_json(path, value)) == value


@given(st.dictionaries(st.text(), json_values), st.randoms())
def test_fingerprints(inputs: dict, random: object) -> None:
    """Of the values, not of their order; another value, another print."""
    keys = list(inputs)
    random.shuffle(keys)  # type: ignore[attr-defined]
    assert fingerprint({k: inputs[k] for k in keys}) == fingerprint(inputs)
    assert fingerprint({**inputs, "one more": 1}) != fingerprint(inputs)


def record(stage: str = "fetch", **changes: object) -> StageRecord:
    values = {
        "stage": stage,
        "inputs": {"a": 1},
        "outputs": (),
        "seconds": 1.5,
        "summary": {"n": 2},
    }
    return StageRecord(**{**values, **changes})  # type: ignore[arg-type]


def test_records_round_trip_in_the_order_of_stages(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.records() == {}
    output = OutputFile("1-fetch/x", 3, 123456789012345678, "ab")
    for stage in ("stitch", "fetch", "quantize"):
        run.save_record(record(stage, outputs=(output,)))
    assert list(run.records()) == ["fetch", "quantize", "stitch"]
    assert run.records()["stitch"] == record("stitch", outputs=(output,))
    run.save_record(record("fetch", cleaned=True))
    assert run.records()["fetch"].cleaned and len(run.records()) == 3


def test_a_file_is_whole_until_its_bytes_change(tmp_path: Path) -> None:
    run, path = RunDir(tmp_path), tmp_path / "1-fetch" / "file"
    path.parent.mkdir()
    path.write_bytes(b"0123456789")
    output = run.describe(path)
    assert output.path == "1-fetch/file" and output.sha256 == sha256_file(path)
    assert run.is_whole(output)
    os.utime(path, ns=(1, 1))  # touched, same bytes: hashed and found equal
    assert run.is_whole(output)
    path.write_bytes(b"012345678x")  # same size
    assert not run.is_whole(output)
    path.write_bytes(b"012345678")
    assert not run.is_whole(output)
    path.write_bytes(b"0123456789")
    assert run.is_whole(output)
    path.unlink()
    assert not run.is_whole(output)
    path.mkdir()
    assert not run.is_whole(output)


def test_contents_are_trusted_when_size_and_time_are_the_same(tmp_path: Path) -> None:
    """By design: a status of a hundred-gigabyte run must not read it all."""
    run, path = RunDir(tmp_path), tmp_path / "file"
    path.write_bytes(b"0123456789")
    output = run.describe(path)
    path.write_bytes(b"abcdefghij")
    os.utime(path, ns=(output.mtime_ns, output.mtime_ns))
    assert run.is_whole(output)


_HOLD = """
import sys, time
from pathlib import Path
from quantkit.run.folder import RunDir
with RunDir(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds the folder's lock."""
    command = [sys.executable, "-c", _HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert not run.is_locked()
    with holder(run.path) as other:
        assert run.is_locked()
        with pytest.raises(QuantkitError, match=f"process {other.pid}") as error, run.lock():
            pass
        assert "status" in error.value.remedy
        assert run.is_locked(), "looking does not take it away"
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert not run.is_locked()
        with run.lock():
            assert run.is_locked()
            assert (run.path / "lock").read_text() == f"{os.getpid()}\n"
    assert not run.is_locked()


def test_the_lock_holds_within_a_process_too(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with run.lock():
        with pytest.raises(QuantkitError), RunDir(tmp_path).lock():
            pass
        assert run.is_locked()


def test_the_lock_is_let_go_when_the_run_fails(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(ZeroDivisionError), run.lock():
        raise ZeroDivisionError
    assert not run.is_locked()


def test_whoever_looks_does_not_stop_a_run(tmp_path: Path) -> None:
    """`is_locked` takes the lock for an instant; a run that begins then must not be refused."""
    run, stop = RunDir(tmp_path), threading.Event()

    def look() -> None:
        while not stop.is_set():
            RunDir(tmp_path).is_locked()
            time.sleep(0.001)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(50):
            with run.lock():
                pass
    finally:
        stop.set()
        thread.join()


def test_looking_creates_nothing(tmp_path: Path) -> None:
    assert not RunDir(tmp_path / "no").is_locked() and not (tmp_path / "no").exists()
    assert not RunDir(tmp_path).is_locked() and os.listdir(tmp_path) == []


def test_events_can_be_followed(tmp_path: Path) -> None:
    path, echoed = tmp_path / "events.jsonl", []
    log = EventLog(path, echoed.append)
    assert read_events(path) == ([], 0)
    log.emit(None, "started", "größer\n\u2028 \r", path=tmp_path.name, n=3)
    first, at = read_events(path)
    assert first == echoed and first[0].message == "größer\n\u2028 \r"
    assert first[0].data == {"path": tmp_path.name, "n": 3} and first[0].stage is None
    log.emit("fetch", "note", "two")
    log.emit("fetch", "note", "three")
    more, end = read_events(path, at)
    assert [e.message for e in more] == ["two", "three"] and end == path.stat().st_size
    assert read_events(path, end) == ([], end)
    assert read_events(path)[0] == echoed


@given(cut=st.integers(1, 60))
def test_half_a_line_at_the_end_is_left_for_later(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("events") / "events.jsonl"
    log = EventLog(path)
    log.emit("fetch", "note", "first")
    whole = path.read_bytes()
    log.emit("fetch", "note", "second")
    data = path.read_bytes()
    path.write_bytes(data[:-cut] if cut < len(data) - len(whole) else whole)
    events, at = read_events(path)
    assert [e.message for e in events] == ["first"] and at == len(whole)
    path.write_bytes(data)
    assert [e.message for e in read_events(path, at)[0]] == ["second"]


def test_events_go_on_after_half_a_line(tmp_path: Path) -> None:
    """A full disk or a lost machine leaves one; the next run appends to the same file."""
    path = tmp_path / "events.jsonl"
    EventLog(path).emit("fetch", "note", "first")
    with path.open("ab") as file:
        file.write(b'{"time": 17000')
    EventLog(path).emit("fetch", "note", "third")
    assert [e.message for e in read_events(path)[0]] == ["first", "third"]


def test_progress_is_throttled_but_for_the_last(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for done in range(1, 1001):
        log.progress("fetch", done, 1000, "bytes", extra=1)
    events, _ = read_events(tmp_path / "events.jsonl")
    assert 2 <= len(events) < 50
    assert events[-1].data == {"done": 1000, "total": 1000, "extra": 1}


def test_two_writers_do_not_mix_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    def write(name: str) -> None:
        log = EventLog(path)
        for _ in range(100):
            log.emit("fetch", "note", name * 300)

    threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(e.message[0] for e in read_events(path)[0]) == ["a"] * 100 + ["b"] * 100


def settle(folder: Path, **changes: object) -> None:
    run = RunDir(folder)
    with run.lock():
        pipeline._settle_config(run, RunConfig("m", **changes))  # type: ignore[arg-type]


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    settle(tmp_path)
    settle(tmp_path)
    settle(tmp_path, publish="me/it", private=True)
    assert json.loads((tmp_path / "config.json").read_text())["publish"] == "me/it"
    settle(tmp_path, compare=("other.gguf",), eval_text="e.txt")
    assert json.loads((tmp_path / "config.json").read_text())["compare"] == ["other.gguf"]
    with pytest.raises(UsageError, match="seed = 0, not 3") as error:
        settle(tmp_path, seed=3)
    assert "--out" in error.value.remedy
    with pytest.raises(UsageError, match="like Q6_K"):
        settle(tmp_path, targets=(LikeMix("Q6_K"),))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        settle(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "x"
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("left", ["events.jsonl", "log.txt", "lock"])
def test_what_a_launcher_wrote_first_does_not_matter(left: str, tmp_path: Path) -> None:
    (tmp_path / left).write_text("")
    settle(tmp_path)


def test_killed_while_the_config_was_written(tmp_path: Path) -> None:
    (tmp_path / "config.json.partial").write_text('{"model": "m"')
    settle(tmp_path)
