"""Limit how often a visitor can do what costs this machine or the Hub something."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from quantkit.errors import QuantkitError

# What may be done how often: (times, seconds).
ALLOWED = {
    "start": (12, 3600.0),
    "preview": (40, 600.0),
    "search": (120, 60.0),
    "publish": (12, 3600.0),
    "compare": (30, 600.0),
    "talk": (30, 600.0),
    "act": (60, 60.0),
}
_MOST_VISITORS = 20_000


class RateLimit:
    """Counts per visitor and action: a bucket that refills evenly. Safe in several threads."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        allowed: Mapping[str, tuple[int, float]] = ALLOWED,
    ) -> None:
        self._clock = clock
        self._allowed = allowed
        self._lock = threading.Lock()
        self._left: dict[tuple[str, str], tuple[float, float]] = {}  # tokens left, as of when

    def take(self, action: str, who: str) -> None:
        """Raise QuantkitError when `who` has done this too often lately."""
        times, seconds = self._allowed[action]
        now = self._clock()
        with self._lock:
            left, then = self._left.get((action, who), (float(times), now))
            left = min(float(times), left + (now - then) * times / seconds)
            if left < 1.0:
                wait = (1.0 - left) * seconds / times
                raise QuantkitError(
                    "Too many requests.",
                    f"Try again in {max(1, round(wait))} seconds.",
                )
            while len(self._left) >= _MOST_VISITORS:
                self._left.pop(next(iter(self._left)))
            self._left.pop((action, who), None)
            self._left[action, who] = (left - 1.0, now)
