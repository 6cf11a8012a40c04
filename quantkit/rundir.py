"""A run's folder: config, manifest, events, lock, and one folder per stage.

    runs/<id>/{config.json, manifest.json, events.jsonl, lock, 1-fetch/ ... 9-publish/}

Every file is written under a `.partial` name and moved into place; the manifest is written last and
is the only truth about what is finished. A stage is skipped when its inputs are those of its record
and its outputs are whole. Inputs that differ fail closed: a run folder holds one run.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from quantkit import untrusted
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
KINDS = ("started", "progress", "note", "finished", "skipped", "failed")  # of events
_MOST_LINE_BYTES = 2**20
_MOST_MESSAGE = 4000  # characters
_MOST_MANIFEST_BYTES, _MOST_MANIFEST_ITEMS = 64_000_000, 250_000
_CHUNK_BYTES, _SOME_BYTES = 2**22, 2**16
_MOST_EVENT_ITEMS = 10_000


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
        partial.write_bytes(_encoded(value, indent=1))
    return path


def _encoded(value: Any, indent: int | None = None) -> bytes:
    """A line of JSON. A name that is no UTF-8 on the disk is escaped, and read back as it was."""
    try:
        return f"{json.dumps(to_json(value), indent=indent, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:
        return f"{json.dumps(to_json(value), indent=indent)}\n".encode()


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 text, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


class Damaged(QuantkitError, ValueError):
    """A file of a run that is not what was written: its name, and what to do about it."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged: {reason}.", _mending(path))


def _mending(path: Path) -> str:
    if path.name == "config.json":
        return "Delete it, and give the whole `quantkit run` command again: what is done stays."
    if path.name == "manifest.json":
        return "Delete it and resume: the stages run again."
    if any(re.match(r"\d-", part) for part in path.parts[:-1]):
        return "Delete it and resume: what it held is made again."
    return "Put it back from a copy, or delete it."


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises Damaged for what is none, OSError where it is missing."""
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Damaged(path, f"it is not JSON ({error})") from None


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
        line = _encoded(event)
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


@dataclass(frozen=True)
class ReadEvents:
    """What was found behind a place of an events file: `end` is the byte after the last line that
    was looked at, `n_dropped` counts the lines that are no events.
    """

    events: list[Event]
    end: int
    n_dropped: int = 0


def read_events(path: Path, start: int = 0) -> tuple[list[Event], int]:
    """Events from byte `start` of an events file, and the byte after the last whole line.

    A line that was cut and ended later is no event: what it was to tell is lost.
    """
    events: list[Event] = []
    while True:
        found = read_some_events(path, start)
        events += found.events
        if found.end == start:
            return events, start
        start = found.end


def read_some_events(path: Path, start: int = 0) -> ReadEvents:
    """The events of the next 64 kB of lines, at least one line. What a Job or a damaged disk wrote
    there is checked here: a line that is no event, or longer than any event, is dropped and
    counted.
    """
    try:
        if not path.is_file():  # not there yet; a pipe or a folder never says anything
            return ReadEvents([], start)
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(_CHUNK_BYTES)
    except OSError:
        return ReadEvents([], start)
    end = data.rfind(b"\n") + 1
    if not end and len(data) == _CHUNK_BYTES:
        return ReadEvents([], start + len(data), 1)
    end = data.rfind(b"\n", 0, _SOME_BYTES) + 1 or data.find(b"\n") + 1
    lines = [line for line in data[:end].split(b"\n") if line.strip()]
    events = [event for event in map(_event, lines) if event is not None]
    return ReadEvents(events, start + end, len(lines) - len(events))


_EVENT_NAMES = {field.name for field in dataclasses.fields(Event)}


def _event(line: bytes) -> Event | None:
    """The event of a line; None where the line is cut, or is no event."""
    if len(line) > _MOST_LINE_BYTES:
        return None
    try:
        value = untrusted.parse(line, _MOST_EVENT_ITEMS)
        # Whoever writes here leaves out what no event has: such a line is something else.
        is_one = isinstance(value, dict) and value.keys() <= _EVENT_NAMES
        return checked_event(value) if is_one else None
    except untrusted.Damaged:
        return None


def checked_event(value: Any) -> Event:
    """An event of its JSON. Raises untrusted.Damaged for what no run of any version says."""
    event = untrusted.build(Event, value)
    if event.kind not in KINDS or (event.stage is not None and event.stage not in STAGES):
        raise untrusted.Damaged("it is an event of an unknown kind")
    untrusted.moment(event.time)
    return dataclasses.replace(event, message=untrusted.shortened(event.message, _MOST_MESSAGE))


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


_SCHEMA = 1


def _record(stage: str, value: dict[str, Any]) -> StageRecord:
    """A record of the manifest. Raises what a value of another shape raises."""
    record = untrusted.build(StageRecord, value)
    if stage not in STAGES:
        raise ValueError(f"{stage} is no stage")
    for o in record.outputs:
        if Path(o.path).is_absolute() or ".." in Path(o.path).parts:
            raise ValueError(f"{stage} with {o.path}")
    return record


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
        """Records of the finished stages, by name. Raises Damaged for a manifest that is not as it
        was written.
        """
        path = self._manifest_path
        if not os.path.lexists(path):
            return {}
        try:
            value = untrusted.read_json(path, _MOST_MANIFEST_BYTES, _MOST_MANIFEST_ITEMS)
            schema, stages = value["schema"], value["stages"]
            if isinstance(schema, int) and schema > _SCHEMA:
                raise QuantkitError(
                    f"{path} is of a newer quantkit (schema {schema}).",
                    "Resume with that one, or choose another --out.",
                )
            if value.get("sha256", fingerprint(stages)) != fingerprint(stages):
                raise Damaged(path, "its sum is another")
            return {stage: _record(stage, record) for stage, record in stages.items()}
        except Damaged:
            raise
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"it is no manifest ({type(error).__name__}: {error})"
            raise Damaged(path, reason) from None

    def save_record(self, record: StageRecord) -> None:
        self._save({**self.records(), record.stage: record})

    def forget(self, stage: str) -> None:
        """Drop the records of a stage and of all after it, and what they would take up again.
        Finished results stay until better ones take their place.
        """
        begins = STAGES.index(stage)
        self._save({name: r for name, r in self.records().items() if STAGES.index(name) < begins})
        for name in STAGES[begins : STAGES.index("stitch")]:
            if self.stage_dir(name).exists():
                shutil.rmtree(self.stage_dir(name))

    def _save(self, records: dict[str, StageRecord]) -> None:
        ordered = to_json({stage: records[stage] for stage in STAGES if stage in records})
        value = {"schema": _SCHEMA, "sha256": fingerprint(ordered), "stages": ordered}
        write_json(self._manifest_path, value)

    def describe(self, path: Path) -> OutputFile:
        """The manifest's entry for a finished file."""
        stat = path.stat()
        return OutputFile(
            str(path.relative_to(self.path)), stat.st_size, stat.st_mtime_ns, sha256_file(path)
        )

    def is_whole(self, output: OutputFile, hashing: bool = False) -> bool:
        """Whether the file is there with the recorded bytes. Contents are hashed when the file was
        touched since, and always with `hashing`: a bad disk changes bytes and no time.
        """
        path = self.path / output.path
        if not path.is_file():
            return False
        stat = path.stat()
        if stat.st_size != output.n_bytes:
            return False
        is_trusted = stat.st_mtime_ns == output.mtime_ns and not hashing
        return is_trusted or sha256_file(path) == output.sha256

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
