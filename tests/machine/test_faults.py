"""What is said when the system fails: a full disk, a limit, a closed stream, too little memory. The
faults are real ones wherever a process can have them.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from commands import ROOT, disk_of

from quantkit import cli, pipeline
from quantkit.config import RunConfig
from quantkit.config.targets import LikeMix
from quantkit.errors import QuantkitError, UsageError
from quantkit.files import write_json
from quantkit.machine import faults, room
from quantkit.ranks.group import ALONE
from quantkit.run import terminal
from quantkit.run.events import Event, EventLog, read_events
from quantkit.run.folder import Damaged, RunDir, StageRecord, read_json


def explained(error: BaseException, folder: Path | None = None) -> str:
    told = faults.explain(error, folder)
    assert told is not None, repr(error)
    assert told.message.endswith(".") and told.remedy.endswith(".")
    assert "bug" not in f"{told}"
    return str(told)


# ---- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB with a few inodes."""
    with disk_of(tmp_path / "small", "size=256k,nr_inodes=24") as folder:
        yield folder


def append(folder: Path) -> None:
    log = EventLog(folder / "events.jsonl")
    for _ in range(10_000):
        log.emit("fetch", "note", "x" * 100)


WRITERS: dict[str, Callable[[Path], object]] = {
    "safetensors of numpy": lambda f: safetensors.numpy.save_file(
        {"a": np.zeros(1 << 20, np.uint8)}, f / "a.safetensors"
    ),
    "safetensors of torch": lambda f: safetensors.torch.save_file(
        {"a": torch.zeros(1 << 20, dtype=torch.uint8)}, f / "a.safetensors"
    ),
    "json": lambda f: write_json(f / "a.json", ["x" * 1000] * 1000),
    "events": append,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_fills(small_disk: Path, writer: str) -> None:
    """Whoever writes: the folder is named, and what was done stays."""
    with pytest.raises(Exception) as error:
        WRITERS[writer](small_disk)
    (small_disk / "rest").write_bytes(b"")  # inodes are left
    said = explained(error.value, small_disk)
    assert said.startswith(f"The disk of {small_disk} is full.") and "finished work is kept" in said


def test_no_inodes(tmp_path: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    with pytest.raises(OSError) as error:
        for i in range(100):
            (small_disk / f"{i}").touch()
    assert "cannot hold more files" in explained(error.value, small_disk)


def test_the_temporary_folder_is_named(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the error names no file and the run's own disk has room."""
    monkeypatch.setenv("TMPDIR", str(small_disk))
    monkeypatch.setattr("tempfile.tempdir", None)
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        QuantkitError("The disk is full."),
    ):
        said = explained(error, tmp_path)
        assert str(small_disk) in said and "TMPDIR" in said and "--out" not in said


def test_a_read_only_disk(tmp_path: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError) as error:
        write_json(small_disk / "run" / "config.json", {})
    assert "read-only disk. Choose another --out." in explained(error.value, small_disk / "run")


def test_a_full_log_does_not_hide_why(tmp_path: Path, small_disk: Path) -> None:
    """The last event has no room: the error that is raised says the same."""
    (small_disk / "fill").write_bytes(b"x" * 200_000)
    log = EventLog(small_disk / "events.jsonl")
    with (
        pytest.raises(QuantkitError, match="is full"),
        pipeline._failures_told(log, small_disk, ALONE),
    ):
        WRITERS["events"](small_disk)
    with pytest.raises(ZeroDivisionError), pipeline._failures_told(log, small_disk, ALONE):
        raise ZeroDivisionError
    (small_disk / "fill").unlink()
    EventLog(small_disk / "events.jsonl").emit(None, "note", "again")
    assert read_events(small_disk / "events.jsonl")[0][-1].message == "again"


PATHS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a file": (lambda f: f / "file", "is a file, but a folder is needed"),
    "below a file": (lambda f: f / "file" / "run", "is a file, but a folder is needed"),
    "long": (lambda f: f / ("x" * 300), "longer than this disk allows"),
    "loop": (lambda f: f / "loop", "is a link"),
    "proc": (lambda f: Path("/proc/run"), "cannot be created"),
}


@pytest.mark.parametrize("case", PATHS)
def test_out_that_cannot_be(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    where, words = PATHS[case]
    assert cli.main(["run", "model", "--out", str(where(tmp_path))]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert words in said and said.endswith("Choose another --out.")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", "is full"),
        ("cannot cache function 'x': no locator available for file 'y'", "QUANTKIT_HOME"),
        ("Could not determine home directory.", "no home folder"),
        ("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory", "little"),
        ("std::bad_alloc", "too little memory"),
        ("Too many open files (os error 24)", "ulimit -n"),
    ],
)
def test_what_libraries_say(tmp_path: Path, text: str, words: str) -> None:
    """In their own kinds of error, and as the cause of another."""
    assert words in explained(RuntimeError(text), tmp_path)
    try:
        raise KeyError("weights") from RuntimeError(text)
    except KeyError as error:
        assert words in explained(error, tmp_path)


def test_what_is_not_known_is_not_explained(tmp_path: Path) -> None:
    for error in (ZeroDivisionError("x"), RuntimeError("shape mismatch"), PermissionError(1, "x")):
        assert faults.explain(error, tmp_path) is None
    known = QuantkitError("The model is odd.", "Use another.")
    assert faults.explain(known, tmp_path) is known


@pytest.mark.parametrize("n_left", [0, 8])
def test_safetensors_that_may_not_be_opened(tmp_path: Path, n_left: int) -> None:
    """Its library says of whatever fails that there is no such file; a file may be closed by the
    time when that is explained.
    """
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    n_open = max(map(int, os.listdir("/proc/self/fd"))) + 1
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open(path, os.O_RDONLY) for _ in range(n_open + n_left)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 1, limits[1]))
    try:
        with pytest.raises(FileNotFoundError) as error:
            safetensors.torch.load_file(path)
        while n_left and taken:
            os.close(taken.pop())
        said = explained(error.value, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for number in taken:
            os.close(number)
    assert "Too many files are open" in said
    path.unlink()
    assert "is gone" in explained(error.value, tmp_path)


# ---- memory


def limited(code: str, kilobytes: int) -> str:
    """What Python prints under `ulimit -v`."""
    done = subprocess.run(
        ["bash", "-c", f'ulimit -v {kilobytes} && exec "$0" -c "$1"', sys.executable, code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_EXPLAINED = """
import sys
sys.path.insert(0, "tests/support")
from quantkit.machine import faults
def tell(work):
    try:
        work()
    except BaseException as error:
        print(faults.explain(error, None, 5_000_000_000, "search"))
import numpy as np, torch
kept = []
tell(lambda: kept.append(bytearray(1 << 40)))
tell(lambda: np.ones(1 << 36))
tell(lambda: torch.ones(1 << 36))
from quantkit.errors import QuantkitError
def vague(): raise QuantkitError("llama.cpp cannot load x.gguf.", "Download it again.")
tell(vague)
def system(): raise SystemError("error return without exception set")
tell(system)
"""


def test_too_little_memory() -> None:
    """Numbers are given: what is free by which limit, and what the stage takes."""
    said = limited(_EXPLAINED, 2_000_000)
    lines = said.splitlines()
    assert len(lines) == 5, said
    for line in lines:
        assert "by `ulimit -v`" in line and "Raise that limit" in line and "bug" not in line
    for line in lines[:3]:
        assert "the search stage takes about 5.00 GB" in line
    assert lines[3].startswith("llama.cpp cannot load x.gguf. A lack of memory is the likely cause")


def test_with_memory_to_spare_nothing_is_blamed_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free", lambda: room.Free(1 << 36, "on this machine"))
    known = QuantkitError("llama.cpp cannot load x.gguf.", "Download it again.")
    assert faults.explain(known) is known
    assert faults.explain(SystemError("error return without exception set")) is None


_THREAD = """
import threading
from quantkit.run import terminal
def end(): raise MemoryError
with terminal.ending_with_threads(None):
    thread = threading.Thread(target=end)
    thread.start()
    thread.join()
    threading.Event().wait(60)  # for work that nobody does any more
"""


def test_a_thread_that_dies_for_want_of_memory_ends_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _THREAD], capture_output=True, text=True, cwd=ROOT, timeout=50
    )
    assert done.returncode == 1
    assert done.stderr.startswith("quantkit: There is too little memory")


def test_a_process_that_the_kernel_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It left no word: the counts in its first event say what has happened since."""
    directory = RunDir(tmp_path)
    log = EventLog(directory.events_path)
    monkeypatch.setattr(room, "kills", lambda: {"group": 3, "machine": 5})
    log.emit(None, "started", "model", kills=room.kills())
    log.emit("search", "progress", done=1, total=2)
    assert pipeline.last_end(directory) == ""
    monkeypatch.setattr(room, "kills", lambda: {"group": 4, "machine": 6})
    assert "lack of memory in this container" in pipeline.last_end(directory)
    log.emit("search", "failed", "The model is odd.")
    assert pipeline.last_end(directory) == ""


# ---- the command line's own streams and words


def test_an_error_that_nobody_foresaw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence on the terminal; the traceback lies in the run's folder."""

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(pipeline, "clean", fail)
    assert cli.main(["clean", str(tmp_path)]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    path = tmp_path / "traceback.txt"
    assert (
        said
        == (
            "quantkit: ZeroDivisionError: division by zero This is a bug: please report it with"
            f" {path}."
        )
        and "line" in path.read_text()
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(tmp_path: Path, closed: str) -> None:
    """No file that is opened later gets their numbers, and with them what a library prints."""
    code = (
        "from quantkit.run import terminal; terminal.settle_streams(); import os, sys;"
        f"file = open({str(tmp_path / 'file')!r}, 'w'); print('lost', file=sys.stderr);"
        "os.write(2, b'lost'); os.write(1, b'lost'); file.write(str(file.fileno() > 2))"
    )
    command = ["bash", "-c", f'"$0" -c "$1" {closed}', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "True"


def test_whoever_listened_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work goes on."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        printer = terminal.Printer()
        for _ in range(3):
            printer(Event(1.0, "fetch", "note", "x" * 100_000))
        assert terminal.failed(UsageError("Wrong.")) == 2
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            stream.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)


def test_names_that_are_no_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"gr\xfcn")
    assert cli.main(["run", str(tmp_path / name), "--out", str(tmp_path / "run")]) == 2
    assert r"gr\xfcn is not UTF-8. Rename it" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(UnicodeEncodeError) as error:  # of a file in the model's folder
        name.encode()
    assert "is not UTF-8. Rename the file." in explained(error.value)
    assert read_json(write_json(tmp_path / "a.json", {name: name})) == {name: name}
    EventLog(tmp_path / "events.jsonl").emit("fetch", "note", name)
    assert read_events(tmp_path / "events.jsonl")[0][0].message == name


# ---- a run's own files


def a_run(folder: Path) -> RunDir:
    directory = RunDir(folder)
    write_json(directory.config_path, RunConfig("m", targets=(LikeMix("Q4_K_M"),)))
    directory.save_record(StageRecord("fetch", {"a": 1}, (), 1.0, {}))
    return directory


@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"stages": []}', b"null"]
)
def test_a_broken_file_of_a_run_is_named(
    tmp_path: Path, name: str, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = a_run(tmp_path)
    (tmp_path / name).write_bytes(damage)
    commands = ["status", "resume"] if name == "manifest.json" else ["resume"]
    for command in commands:
        assert cli.main([command, str(tmp_path)]) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"{tmp_path / name} is damaged" in said and "Delete it" in said, said
    assert not (tmp_path / "traceback.txt").exists()
    assert directory.path.is_dir()


def test_one_changed_byte_of_the_manifest(tmp_path: Path) -> None:
    """Wherever it is: no record is read out of it that was not written."""
    directory = a_run(tmp_path)
    path, records = tmp_path / "manifest.json", directory.records()
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        try:
            assert directory.records() == records
        except Damaged:
            continue
        except QuantkitError as error:
            assert "newer quantkit" in error.message


def test_a_manifest_of_a_newer_quantkit(tmp_path: Path) -> None:
    directory = a_run(tmp_path)
    write_json(tmp_path / "manifest.json", {"schema": 3, "stages": {"later": 3}})
    with pytest.raises(QuantkitError, match="newer quantkit"):
        directory.records()


def test_a_config_that_was_damaged_may_be_given_again(tmp_path: Path) -> None:
    directory = a_run(tmp_path)
    config = pipeline.load_config(directory)
    directory.config_path.unlink()
    pipeline._settle_config(directory, config)
    assert pipeline.load_config(directory) == config


_GOOD = {"time": 1.0, "stage": "fetch", "kind": "note", "message": "x", "data": {}}


@pytest.mark.parametrize(
    "value",
    [
        *([], 3, "x", None, {}, {**_GOOD, "more": 1}, {**_GOOD, "time": "x"}),
        *({**_GOOD, "time": True}, {**_GOOD, "stage": 3}, {**_GOOD, "kind": None}),
        *({**_GOOD, "message": []}, {**_GOOD, "data": []}, {**_GOOD, "time": 10**400}),
        {**_GOOD, "time": float("nan")},
    ],
)
def test_what_is_no_event_is_passed_over(tmp_path: Path, value: object) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("".join(f"{json.dumps(v)}\n" for v in (_GOOD, value, _GOOD)))
    assert read_events(path)[0] == [Event(**_GOOD)] * 2  # type: ignore[arg-type]


def test_hooks_are_put_back(tmp_path: Path) -> None:
    before = threading.excepthook
    with pipeline._failures_told(EventLog(tmp_path / "events.jsonl"), tmp_path, ALONE):
        assert threading.excepthook is not before
    assert threading.excepthook is before
