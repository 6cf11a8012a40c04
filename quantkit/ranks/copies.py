"""Files of rank 0 on machines that do not have them."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.ranks.wire import Wire

if TYPE_CHECKING:
    from quantkit.ranks.group import Ranks

_PIECE = 1 << 26  # bytes
_END = 1 << 16

# Path, bytes, when it was written in ns, and a hash of its ends: no other file has all of them.
Mark = tuple[str, int, int, str]


class Copies:
    """The files that were sent to this machine, in a folder that is made for the first."""

    def __init__(self, wire: Wire, machine: int) -> None:
        self._wire, self._machine = wire, machine
        self._folder: Path | None = None
        self._known: dict[Mark, Path] = {}
        self._n_received = 0

    def folder(self) -> Path:
        """Return the folder for what this process leaves on its machine until it ends."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="quantkit-"))
        return self._folder

    def clear(self) -> None:
        """Delete the folder."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def local(self, paths: Sequence[Path], ranks: Ranks) -> list[Path]:
        """Do `Ranks.local`. One rank of every machine that lacks a file receives it."""
        marks = [
            _as_mark(*mark)
            for mark in ranks.tell([_mark(p) for p in paths] if ranks.rank == 0 else None)
        ]
        lacking = [i for i, m in enumerate(marks) if marks.index(m) == i and not self._has(m)]
        receivers = ranks.tell(_receivers(ranks.gather([self._machine, lacking])))
        received: dict[str, str] = {}
        for index, rank in receivers:
            if ranks.rank == 0:
                for piece in _pieces(Path(marks[index][0])):
                    self._wire.send(piece, rank)
                self._wire.send(b"", rank)
            elif ranks.rank == rank:
                received[str(index)] = str(self._receive(marks[index]))
        found = ranks.tell(_by_machine(ranks.gather([self._machine, received])))
        for index in lacking:
            self._known[marks[index]] = Path(found[str(self._machine)][str(index)])
        return [self._known.get(mark, Path(mark[0])) for mark in marks]

    def _has(self, mark: Mark) -> bool:
        if mark in self._known:
            return True
        try:
            return _mark(Path(mark[0])) == mark
        except OSError:
            return False

    def _receive(self, mark: Mark) -> Path:
        self._n_received += 1
        path = self.folder() / f"{self._n_received}-{Path(mark[0]).name}"
        with path.open("wb") as file:
            while piece := self._wire.receive(0):
                file.write(piece)
        os.utime(path, ns=(mark[2], mark[2]))
        return path


def _mark(path: Path) -> Mark:
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        ends = hashlib.sha256(file.read(_END))
        file.seek(max(0, stat.st_size - _END))
        ends.update(file.read(_END))
    return str(path), stat.st_size, stat.st_mtime_ns, ends.hexdigest()


def _as_mark(path: str, n_bytes: int, when: int, ends: str) -> Mark:
    return path, n_bytes, when, ends


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def _receivers(told: Sequence[Sequence[object]]) -> list[tuple[int, int]]:
    """Pairs of a file and a rank that it is sent to, from what every rank said: its machine and
    the files that it lacks.
    """
    first: dict[tuple[int, object], int] = {}
    for rank, (machine, lacking) in enumerate(told):
        for index in lacking:  # type: ignore[attr-defined]
            first.setdefault((index, machine), rank)
    return [(index, rank) for (index, _), rank in sorted(first.items(), key=lambda i: i[1])]


def _by_machine(told: Sequence[Sequence[object]]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for machine, received in told:
        found.setdefault(str(machine), {}).update(received)  # type: ignore[call-overload]
    return found
