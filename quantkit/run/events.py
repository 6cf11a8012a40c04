"""The events of a run, a line of JSON each in `events.jsonl`: one appender, one reader."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from quantkit.errors import NeedsToken, QuantkitError
from quantkit.files import json_line
from quantkit.run.artifacts import NAMES
from quantkit.sandbox import untrusted

KINDS = ("started", "progress", "note", "finished", "skipped", "failed")  # of events
_MOST_LINE_BYTES = 2**20
_MOST_MESSAGE = 4000  # characters
_CHUNK_BYTES, _SOME_BYTES = 2**22, 2**16
_MOST_EVENT_ITEMS = 10_000
MOST_EVENT_BYTES = 64_000_000  # of a run: three days of what is told twice a second


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
        self._last_progress = ("", 0.0)  # a stage and when

    def emit(self, stage: str | None, kind: str, message: str = "", **data: Any) -> None:
        self.append(Event(round(time.time(), 3), stage, kind, message, data))

    def fail(self, stage: str | None, error: QuantkitError) -> None:
        """Tell why a run ends. `token_step`, where only a token helps, is for pages that ask for
        it: `remedy` speaks to a terminal.
        """
        more = {"token_step": error.step} if isinstance(error, NeedsToken) else {}
        self.emit(stage, "failed", error.message, remedy=error.remedy, **more)

    def append(self, event: Event, most_bytes: int | None = None) -> None:
        """Append an event as it is; nothing where the file would have more than `most_bytes`."""
        line = json_line(event)
        with self._path.open("a+b") as file:
            # One write: a reader never sees half an event but at the very end. Half a line that a
            # full disk or a lost machine left there is ended first.
            line = line if _ends_whole(file) else b"\n" + line
            if most_bytes is not None and file.seek(0, os.SEEK_END) + len(line) > most_bytes:
                return
            file.write(line)
        if self._echo is not None:
            self._echo(event)

    def progress(self, stage: str, done: int, total: int, message: str = "", **data: Any) -> None:
        """Tell `done` of `total` units of this stage; dropped when the stage's last one is fresh,
        never when it completes the stage.
        """
        now = time.monotonic()
        before, when = self._last_progress
        if done < total and stage == before and now - when < 0.5:
            return
        self._last_progress = (stage, now)
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
    """Read events from byte `start` of an events file, and the byte after the last whole line.

    A line that was cut and ended later is no event: what it was to tell is lost.
    """
    events: list[Event] = []
    while True:
        found = read_some_events(path, start)
        events += found.events
        if found.end == start:
            return events, start
        start = found.end


def outcome(events: Iterable[Event]) -> str | None:
    """Return how a run ended by its events, "finished" or "failed"; None: it is at work or was cut
    off.
    """
    found = None
    for event in events:
        if event.kind == "failed" or (event.kind == "finished" and event.stage is None):
            found = event.kind
        elif event.kind == "started" and event.stage is None:
            found = None
    return found


def read_some_events(path: Path, start: int = 0) -> ReadEvents:
    """Return the events of the next 64 kB of lines, at least one line. What a Job or a damaged disk
    wrote there is checked here: a line that is not an event, or is longer than any event, is
    dropped and counted.
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
    """Return an event from its JSON. Raises untrusted.Damaged for what no run of any version
    writes.
    """
    event = untrusted.build(Event, value)
    if event.kind not in KINDS or (event.stage is not None and event.stage not in NAMES):
        raise untrusted.Damaged("it is an event of an unknown kind")
    untrusted.moment(event.time)
    return dataclasses.replace(event, message=untrusted.shortened(event.message, _MOST_MESSAGE))
