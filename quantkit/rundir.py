"""A run's folder: config, manifest, events, lock, and one folder per stage.

    runs/<id>/{config.json, manifest.json, events.jsonl, lock, 1-fetch/ ... 9-publish/}

Every file is written under a `.partial` name and moved into place; the manifest is written last and
is the only truth about what is finished. A stage is skipped when its inputs are those of its record
and its outputs are whole. Inputs that differ fail closed: a run folder holds one run.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from quantkit.errors import QuantkitError
from quantkit.tensors import to_json

STAGES = (
    "fetch",
    "convert",
    "calibrate",
    "quantize",
    "database",
    "search",
    "stitch",
    "validate",
    "publish",
)

PARTIAL = ".partial"


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a `.partial` name to write to; on a clean exit its bytes are flushed and it takes
    `path`'s place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    yield partial
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> Path:
    """Write `value` as indented JSON, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(
            json.dumps(to_json(value), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 text, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Event:
    """One line of `events.jsonl`. Events of the whole run have no stage.

    `kind` is started, progress, note, finished, skipped or failed.
    """

    time: float
    stage: str | None
    kind: str
    message: str = ""
    data: dict[str, Any] = field(default_factory=dict)


class EventLog:
    """Appends events to a file, one JSON object a line. Progress is throttled to two lines a
    second.
    """

    def __init__(self, path: Path, echo: Any = None) -> None:
        self._path = path
        self._echo = echo  # called with each Event that is written: the command line prints it
        self._last_progress = 0.0

    def emit(self, stage: str | None, kind: str, message: str = "", **data: Any) -> None:
        event = Event(round(time.time(), 3), stage, kind, message, data)
        line = (json.dumps(to_json(event), ensure_ascii=False) + "\n").encode()
        with self._path.open("a+b") as file:
            # One write: a reader never sees half an event but at the very end. Half a line that a
            # full disk or a lost machine left there is ended first.
            file.write(line if _ends_whole(file) else b"\n" + line)
        if self._echo is not None:
            self._echo(event)

    def progress(self, stage: str, done: int, total: int, message: str = "", **data: Any) -> None:
        """`done` of `total` units of this stage; dropped when the last one is fresh, never when it
        completes the stage.
        """
        now = time.monotonic()
        if done < total and now - self._last_progress < 0.5:
            return
        self._last_progress = now
        self.emit(stage, "progress", message, done=done, total=total, **data)


def _ends_whole(file: IO[bytes]) -> bool:
    """Whether the last line of a file has its end."""
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def read_events(path: Path, start: int = 0) -> tuple[list[Event], int]:
    """Events from byte `start` of an events file, and the byte after the last whole line.

    A line that was cut and ended later is no event: what it was to tell is lost.
    """
    if not path.exists():
        return [], start
    with path.open("rb") as file:
        file.seek(start)
        data = file.read()
    end = data.rfind(b"\n") + 1
    events = [_event(line) for line in data[:end].split(b"\n")]
    return [event for event in events if event is not None], start + end


def _event(line: bytes) -> Event | None:
    """The event of a line, None where the line is cut or empty: no part of an object is JSON."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return Event(**value)


@dataclass(frozen=True)
class OutputFile:
    """A finished file of a stage, relative to the run's folder."""

    path: str
    n_bytes: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class StageRecord:
    """What the manifest knows of a finished stage."""

    stage: str
    inputs: dict[str, Any]
    outputs: tuple[OutputFile, ...]
    seconds: float
    summary: dict[str, Any]
    cleaned: bool = False  # `quantkit clean` dropped its files on purpose

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.inputs)


def fingerprint(inputs: dict[str, Any]) -> str:
    """sha256 of the canonical JSON of a stage's inputs."""
    return hashlib.sha256(json.dumps(to_json(inputs), sort_keys=True).encode()).hexdigest()


def _try_lock(file: IO[str]) -> bool:
    """Take the lock, for up to half a second: whoever asks `is_locked` holds it for an instant."""
    for _ in range(5):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(0.1)
    return False


class RunDir:
    """Names and records inside one run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def stage_dir(self, stage: str) -> Path:
        return self.path / f"{STAGES.index(stage) + 1}-{stage}"

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def _manifest_path(self) -> Path:
        return self.path / "manifest.json"

    def records(self) -> dict[str, StageRecord]:
        """Records of the finished stages, by name."""
        if not self._manifest_path.exists():
            return {}
        return {
            stage: StageRecord(
                **{**record, "outputs": tuple(OutputFile(**o) for o in record["outputs"])}
            )
            for stage, record in read_json(self._manifest_path)["stages"].items()
        }

    def save_record(self, record: StageRecord) -> None:
        records = {**self.records(), record.stage: record}
        ordered = {stage: records[stage] for stage in STAGES if stage in records}
        write_json(self._manifest_path, {"schema": 1, "stages": ordered})

    def describe(self, path: Path) -> OutputFile:
        """The manifest's entry for a finished file."""
        stat = path.stat()
        return OutputFile(
            str(path.relative_to(self.path)), stat.st_size, stat.st_mtime_ns, sha256_file(path)
        )

    def is_whole(self, output: OutputFile) -> bool:
        """Whether the file is there with the recorded bytes. Contents are hashed only when the file
        was touched since.
        """
        path = self.path / output.path
        if not path.is_file():
            return False
        stat = path.stat()
        if stat.st_size != output.n_bytes:
            return False
        return stat.st_mtime_ns == output.mtime_ns or sha256_file(path) == output.sha256

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; the kernel lets go of it however the process ends.

        Raises QuantkitError when another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("a+") as file:
            if not _try_lock(file):
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise QuantkitError(
                    f"Another run (process {holder}) is at work in {self.path}.",
                    "Wait for it, follow it with `quantkit status`, or choose another --out.",
                )
            file.seek(0)
            file.truncate()
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def is_locked(self) -> bool:
        """Whether a process is at work in the folder."""
        lock = self.path / "lock"
        if not lock.exists():
            return False
        with lock.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
        return False
