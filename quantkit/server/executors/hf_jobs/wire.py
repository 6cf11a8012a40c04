"""Send a run's events and small results from another machine as lines of the Job's log.

Nothing else is needed to follow a Job: no port, no bucket, no second credential. Whatever is not
such a line is the worker's own output.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from quantkit.files import json_line
from quantkit.run.events import Event, checked_event
from quantkit.sandbox.untrusted import integer, parse
from quantkit.server.executors.protocol import RESULTS

EVENT, FILE = "@quantkit event ", "@quantkit file "
_PART = 6000  # characters of a line: logs cut longer ones
_MOST_BYTES = 20_000_000


@dataclass(frozen=True)
class SentEvent:
    """The `number`-th event that a Job told."""

    number: int
    event: Event


@dataclass(frozen=True)
class SentFile:
    path: str
    data: bytes


def event_line(number: int, event: Event) -> str:
    return f"{EVENT}{number} {json_line(event).decode().rstrip()}"


def file_lines(path: str, data: bytes) -> Iterator[str]:
    """Yield the lines that carry a file."""
    text = base64.b64encode(zlib.compress(data, 9)).decode("ascii")
    parts = [text[i : i + _PART] for i in range(0, len(text), _PART)] or [""]
    for number, part in enumerate(parts, 1):
        yield f"{FILE}{path} {number}/{len(parts)} {part}"


@dataclass
class Listener:
    """Takes the lines of one Job in order. Lines that are damaged or not allowed are plain text."""

    _parts: dict[str, list[str]] = field(default_factory=dict)

    def hear(self, line: str) -> SentEvent | SentFile | str | None:
        """Return what the line says; None for a part of a file that is not whole yet."""
        try:
            if line.startswith(EVENT):
                number, _, text = line.removeprefix(EVENT).partition(" ")
                return SentEvent(integer(number), checked_event(parse(text.encode("utf-8"))))
            if line.startswith(FILE):
                return self._part(line.removeprefix(FILE))
        except (ValueError, zlib.error):
            pass
        return line

    def _part(self, text: str) -> SentFile | None:
        path, place, data = text.split(" ", 2)
        number, total = (integer(n) for n in place.split("/"))
        if path not in RESULTS or not 1 <= number <= total <= _MOST_BYTES // _PART:
            raise ValueError("not a file that is sent")
        parts = self._parts.setdefault(path, [])
        if number == 1:
            parts.clear()
        if number != len(parts) + 1:
            raise ValueError("a part is missing")
        parts.append(data)
        if number < total:
            return None
        packed = base64.b64decode("".join(self._parts.pop(path)), validate=True)
        unpack = zlib.decompressobj()
        whole = unpack.decompress(packed, _MOST_BYTES)
        if unpack.unconsumed_tail:
            raise ValueError("too large")
        return SentFile(path, whole)
