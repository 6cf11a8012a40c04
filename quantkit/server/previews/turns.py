"""Share expensive work of this machine among visitors, who take turns."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from quantkit.errors import QuantkitError


@dataclass(frozen=True)
class Share:
    """The capacity, and one visitor's share of it."""

    places: int = 2  # at once
    waiting: int = 12  # of all; each keeps a thread of the server
    waiting_each: int = 2
    seconds_each: float = 600.0  # in an hour
    patience: float = 60.0  # seconds in the line


@dataclass(eq=False)
class _Waiter:
    who: str
    since: float
    state: str = "waiting"  # then called, or sent away
    changed: threading.Event = field(default_factory=threading.Event)


_HOUR = 3600.0
_BUSY = QuantkitError("Too many previews are being made.", "Try again in a minute.")


class Turns:
    """A queue in which those who had least come first. One visitor has one place at a time, however
    many are free, a few places in the line, and so much time in an hour. Safe in several threads.
    """

    def __init__(
        self, share: Share | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._share = share or Share()
        self._clock = clock
        self._lock = threading.Lock()
        self._line: list[_Waiter] = []
        self._at_work: dict[str, float] = {}  # who, and since when
        self._used: dict[str, list[tuple[float, float]]] = {}  # until when, how long

    @contextmanager
    def turn(self, who: str) -> Iterator[None]:
        """Wait for a place and hold it. Raises QuantkitError at once where there is none to wait
        for, and after a while where none became free.
        """
        waiter = self._join(who)
        waiter.changed.wait(self._share.patience)
        with self._lock:
            if waiter.state != "called":
                if waiter in self._line:
                    self._line.remove(waiter)
                raise _BUSY
        try:
            yield
        finally:
            self._leave(who)

    def _join(self, who: str) -> _Waiter:
        with self._lock:
            now = self._clock()
            if self._seconds(who, now) >= self._share.seconds_each:
                minutes = round(self._share.seconds_each / 60)
                raise QuantkitError(
                    f"Your previews have used {minutes} minutes of this machine in an hour.",
                    "Try again later, or start the run without one.",
                )
            mine = sum(waiter.who == who for waiter in self._line)
            if mine >= self._share.waiting_each:
                raise QuantkitError(
                    "Your last previews are still being made.", "Wait until one of them is done."
                )
            if len(self._line) >= self._share.waiting:
                self._send_away(who, now)
            waiter = _Waiter(who, now)
            self._line.append(waiter)
            self._call(now)
            return waiter

    def _send_away(self, newcomer: str, now: float) -> None:
        """Make room in a full line for somebody who had less than another. Raises QuantkitError."""
        most = max(self._line, key=lambda w: (self._seconds(w.who, now), w.since))
        if self._seconds(most.who, now) <= self._seconds(newcomer, now):
            raise _BUSY
        self._line.remove(most)
        most.state = "sent away"
        most.changed.set()

    def _call(self, now: float) -> None:
        """Give free places to those who had least, the first of them first."""
        while len(self._at_work) < self._share.places:
            ready = [waiter for waiter in self._line if waiter.who not in self._at_work]
            if not ready:
                return
            waiter = min(ready, key=lambda w: (self._seconds(w.who, now), w.since))
            self._line.remove(waiter)
            self._at_work[waiter.who] = now
            waiter.state = "called"
            waiter.changed.set()

    def _leave(self, who: str) -> None:
        with self._lock:
            now = self._clock()
            began = self._at_work.pop(who)
            self._used.setdefault(who, []).append((now, now - began))
            self._forget(now)
            self._call(now)

    def _forget(self, now: float) -> None:
        for who, spans in list(self._used.items()):
            kept = [span for span in spans if span[0] > now - _HOUR]
            self._used[who] = kept
            if not kept:
                del self._used[who]

    def _seconds(self, who: str, now: float) -> float:
        """What somebody had in the last hour."""
        return sum(seconds for end, seconds in self._used.get(who, ()) if end > now - _HOUR)
