"""Tell how far quantize is: the units that are done, and how far the one at work is.

A block's text is run before its tensors are solved. Which part of its time that takes, the blocks
before it say; of the first it is a guess.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from quantkit.run.events import EventLog

_PARTS = 1000  # of a unit
_RUNNING = 0.4  # of a block's time, until one was measured


class Bar:
    """Counts units of a stage, and parts of the one at work. It never goes back."""

    def __init__(self, events: EventLog, stage: str) -> None:
        self._events, self._stage = events, stage
        self._running = _RUNNING
        self._seconds = {"running": 0.0, "solving": 0.0}
        self._clock = time.monotonic()
        self.n_units = 0
        self._n_done = 0
        self._name = ""
        self._weights: Mapping[str, int] = {}
        self._part = self._ran = self._solved = 0.0

    def begin(self, name: str, n_done: int, weights: Mapping[str, int], runs_text: bool) -> None:
        """Begin a unit after `n_done` others: what it will solve, in weights by tensor, and whether
        text is run for it first.
        """
        self._name, self._n_done, self._weights = name, n_done, weights
        self._part = self._running if runs_text else 0.0
        self._ran = self._solved = 0.0
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        self._clock = time.monotonic()

    def ran(self, share: float) -> None:
        """Tell that so much of the text was run."""
        self._spent("running")
        self._ran = max(self._ran, min(1.0, share))
        self._tell("running the text")

    def solved(self, tensor: str, share: float = 1.0) -> None:
        """Tell that so much more of a tensor is solved."""
        self._spent("solving")
        whole = sum(self._weights.values())
        self._solved = min(1.0, self._solved + share * self._weights.get(tensor, 0) / max(whole, 1))
        self._tell(tensor)

    def end(self, n_done: int, text: str) -> None:
        """Tell that the unit is done, and `n_done` of them in all."""
        spent = sum(self._seconds.values())
        if self._ran == 1.0 and self._solved and spent:
            self._running = self._seconds["running"] / spent
        total = max(n_done, self.n_units)
        self._events.progress(self._stage, _PARTS * n_done, _PARTS * total, f"{self._name}: {text}")

    def _spent(self, on: str) -> None:
        now = time.monotonic()
        self._seconds[on] += now - self._clock
        self._clock = now

    def _tell(self, text: str) -> None:
        share = self._part * self._ran + (1 - self._part) * self._solved
        # The unit is not done before its end says so.
        done = _PARTS * self._n_done + min(_PARTS - 1, int(_PARTS * share))
        total = _PARTS * max(self._n_done + 1, self.n_units)
        self._events.progress(self._stage, done, total, f"{self._name}: {text}")
