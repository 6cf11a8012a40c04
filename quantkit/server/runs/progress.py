"""Derive a run's progress from its events: nine stages, log lines, and the remaining time.

`Progress` is fed events in order, a few at a time as they appear; everything it offers is derived
from them, so a restarted server knows as much as one that has watched from the start.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantkit.run.artifacts import NAMES
from quantkit.run.events import Event
from quantkit.sandbox.untrusted import shortened
from quantkit.server.runs.overall import DONE, FAILED, RUNNING, Overall, StageView, overall

_LOG_LINES = 400
_CURVE_POINTS = 4000
_LARGEST = 1e18
_MOST_NATS = 1e6  # of a KL divergence
_LONGEST_SECONDS, _LONGEST_URL = 1e9, 2000
# Too early an estimate is worse than none.
_MIN_SHARE, _MIN_SECONDS = 0.04, 3.0


@dataclass(frozen=True)
class LogLine:
    """One line of the plain-language log."""

    time: float
    stage: str | None
    kind: str
    text: str


@dataclass(frozen=True)
class KlPoint:
    """The best KL divergence that the search knew after `tokens` evaluated tokens; `is_expected`:
    what it expects tuning to leave of it.
    """

    generation: int
    tokens: int
    kl: float
    stderr: float
    is_expected: bool = False


class _Eta:
    """Seconds left of one phase of one stage, from the rate of its progress.

    While an estimate holds it only ever falls; one that has run out is replaced.
    """

    def __init__(self, time: float, done: float, total: float) -> None:
        self.total = total
        self._first_time, self._first_done = time, done
        self._last_done = done
        self._end: float | None = None

    def starts_over(self, done: float, total: float) -> bool:
        return total != self.total or done < self._last_done

    def feed(self, time: float, done: float) -> None:
        self._last_done = done
        advanced, seconds = done - self._first_done, time - self._first_time
        if self.total <= 0 or advanced / self.total < _MIN_SHARE or seconds < _MIN_SECONDS:
            return
        end = time + seconds * (self.total - done) / advanced
        still_holds = self._end is not None and self._end > time
        self._end = min(end, self._end) if still_holds and self._end is not None else end

    def left(self, now: float) -> float | None:
        return None if self._end is None or self._end <= now else self._end - now


class Progress:
    """Folds events into what is shown. Not thread-safe: its owner holds a lock."""

    def __init__(self) -> None:
        self.stages = {name: StageView(name) for name in NAMES}
        self.log: deque[LogLine] = deque(maxlen=_LOG_LINES)
        self.curve: list[KlPoint] = []
        self.outcome: str | None = None  # finished, failed; None: under way or cut off
        self.error, self.remedy = "", ""
        self.token_step: str | None = None  # where only a token helps: what to do before
        self.published_url: str | None = None
        self.repo_is_private: bool | None = None
        self.started: float | None = None  # of this attempt
        self.last_time: float | None = None
        self._eta: _Eta | None = None
        self._shown = 0  # percent of the run, so far

    @property
    def current(self) -> StageView | None:
        """The stage at work, or the one that failed."""
        return next((s for s in self.stages.values() if s.state in (RUNNING, FAILED)), None)

    def eta_seconds(self, now: float) -> float | None:
        """Return the seconds left of the current stage; None when unknown."""
        return None if self._eta is None else self._eta.left(now)

    def overall(self, planned: Mapping[str, float] | None, now: float) -> Overall | None:
        """Return how far the run is, by the planned seconds of its stages; never less than before.
        None where nothing was planned.
        """
        found = overall(self.stages.values(), planned, self.eta_seconds(now), now)
        if found is not None:
            self._shown = max(self._shown, found.percent)
            found = replace(found, percent=self._shown)
        return found

    def feed(self, event: Event) -> None:
        self.last_time = event.time
        if event.stage is None:
            self._feed_run(event)
        elif event.stage in self.stages:
            self._feed_stage(event.stage, event)

    def _feed_run(self, event: Event) -> None:
        if event.kind == "started":
            self.outcome, self.error, self.remedy, self.token_step = None, "", "", None
            self.started = event.time
            self._eta, self._shown = None, 0
            self.stages = {
                name: StageView(name, seconds=stage.seconds) for name, stage in self.stages.items()
            }
        elif event.kind in ("finished", "failed"):
            self._end(event)
        if event.kind != "progress":
            self.log.append(LogLine(event.time, None, event.kind, event.message))

    def _feed_stage(self, name: str, event: Event) -> None:
        stage = self.stages[name]
        if event.kind == "progress":
            self._feed_progress(stage, event)
            return
        if event.kind == "started":
            self._eta = None
            self.stages[name] = StageView(name, RUNNING, started=event.time)
        elif event.kind in ("finished", "skipped"):
            self._eta = None
            seconds = _number(event.data.get("seconds"))
            if seconds is None or not 0 <= seconds <= _LONGEST_SECONDS:
                seconds = stage.seconds
            self.stages[name] = replace(stage, state=DONE, percent=100, message="", seconds=seconds)
            url = event.data.get("url")
            if name == "publish" and isinstance(url, str) and len(url) <= _LONGEST_URL:
                private = event.data.get("private")
                self.published_url = url
                self.repo_is_private = private if isinstance(private, bool) else None
        elif event.kind == "failed":
            self._end(event)
        self.log.append(LogLine(event.time, name, event.kind, event.message))

    def _feed_progress(self, stage: StageView, event: Event) -> None:
        done, total = _number(event.data.get("done")), _number(event.data.get("total"))
        percent = None
        if done is not None and total is not None and total > 0:
            percent = max(0, min(100, int(100 * done / total)))
            if self._eta is None or self._eta.starts_over(done, total):
                self._eta = _Eta(event.time, done, total)
            self._eta.feed(event.time, done)
        now = replace(stage, state=RUNNING, percent=percent, message=event.message)
        self.stages[stage.name] = now
        kl = _number(event.data.get("kl"))
        fits = kl is not None and 0 <= kl <= _MOST_NATS and len(self.curve) < _CURVE_POINTS
        if stage.name == "search" and kl is not None and fits:
            generation = int(_number(event.data.get("generation")) or 0)
            # A search that begins anew replaces what it had; one that goes on adds to it.
            while self.curve and self.curve[-1].generation >= generation:
                self.curve.pop()
            stderr = min(kl, max(0.0, _number(event.data.get("stderr")) or 0.0))
            tokens = _number(event.data.get("n_tokens")) or done or 0
            expected = bool(event.data.get("expects_tuning"))
            self.curve.append(KlPoint(generation, int(tokens), kl, stderr, expected))

    def _end(self, event: Event) -> None:
        self._eta = None
        self.outcome = event.kind
        if event.kind != "failed":
            return
        remedy = event.data.get("remedy", "")
        self.error = event.message
        self.remedy = shortened(remedy, _LONGEST_URL) if isinstance(remedy, str) else ""
        step = event.data.get("token_step")
        self.token_step = shortened(step, _LONGEST_URL) if isinstance(step, str) else None
        if event.stage in self.stages:
            self.stages[event.stage] = replace(self.stages[event.stage], state=FAILED)


def _number(value: Any) -> float | None:
    """A number that can be reckoned with; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= _LARGEST else None
