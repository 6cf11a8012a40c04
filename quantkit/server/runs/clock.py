"""The clock for cleaning up: no single reading of the machine's clock deletes anybody's run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from quantkit.files import write_text
from quantkit.sandbox.untrusted import LATEST, Damaged, read_bytes

FILE = ".clock"  # the time as it was trusted last
_CATCH_UP = 2.0  # seconds that may be believed of one that has really passed
_MOST_AWAY = 86_400.0  # that are believed of a server that was not there


class Clock:
    """The machine's clock where it goes as fast as time does. One that jumps ahead is followed at
    double speed, so a run that has ended lives at least half as long as it may, whatever the clock
    says, and a restart counts as a day at most. One that goes back is believed: nothing gets older.
    """

    def __init__(
        self,
        root: Path,
        wall: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root
        self._wall, self._steady = wall, steady
        self._seen: tuple[float, float] | None = None  # trusted time, steady time

    def now(self) -> float:
        """Return the seconds since 1970, as far as they can be trusted."""
        wall, steady = self._wall(), self._steady()
        if self._seen is None:
            most = self._last_known(wall) + _MOST_AWAY
        else:
            then, at = self._seen
            most = then + _CATCH_UP * (steady - at)
        self._seen = (min(wall, most), steady)
        return self._seen[0]

    def keep(self) -> None:
        """Write the time down for the next server."""
        write_text(self._root / FILE, f"{self.now():.0f}\n")

    def _last_known(self, wall: float) -> float:
        """When a server was here for the last time: what it wrote down, else the newest file of a
        run, else the clock is believed.
        """
        try:
            text = read_bytes(self._root / FILE, 100).decode("ascii").strip()
            if text.isdecimal() and len(text) <= 12 and 0 < int(text) <= LATEST:
                return float(text)
        except (OSError, Damaged, UnicodeDecodeError):
            pass
        times = [_changed(path) for path in self._root.glob("*/*.json*")]
        return max((t for t in times if 0 < t <= wall), default=wall)


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0
