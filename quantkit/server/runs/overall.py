"""How far a whole run is and when it ends: the planned time of every stage, corrected by what the
stages took that are done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"

_BELIEVED = 0.15  # share of the plan that it counts for beside what was measured
_MOST = 10.0  # times that a machine may be slower or faster than planned
_LEAST_LEFT = 0.05  # share of a stage that is taken to be left when it should have ended
_UNPLANNED = "fetch"  # a download says nothing about the machine


@dataclass(frozen=True)
class StageView:
    """One of the nine stages as the page shows it."""

    name: str
    state: str = WAITING  # waiting, running, done or failed
    percent: int | None = None
    message: str = ""
    seconds: float | None = None  # how long it took
    started: float | None = None


@dataclass(frozen=True)
class Overall:
    """Of a run at work."""

    percent: int  # of its time; at most 99
    seconds_left: float


def overall(
    stages: Iterable[StageView],
    planned: Mapping[str, float] | None,
    stage_left: float | None,
    now: float,
) -> Overall | None:
    """Return the same; None where nothing was planned. `stage_left` are the seconds that the stage
    at work says it has left, if it does.
    """
    if not planned:
        return None
    stages = list(stages)
    believed = _BELIEVED * sum(planned.values())
    took, expected, spent = believed, believed, 0.0
    for stage in stages:
        if stage.state == DONE and stage.seconds is not None:
            spent += stage.seconds
            if stage.name != _UNPLANNED:
                took += stage.seconds
                expected += planned.get(stage.name, 0.0)
    factor = min(_MOST, max(1 / _MOST, took / expected)) if expected else 1.0
    left = 0.0
    for stage in stages:
        asked = factor * planned.get(stage.name, 0.0)
        if stage.state == WAITING:
            left += asked
        elif stage.state == RUNNING:
            worked = max(0.0, now - (now if stage.started is None else stage.started))
            spent += worked
            left += max(_LEAST_LEFT * asked, asked - worked) if stage_left is None else stage_left
    whole = spent + left
    return Overall(min(99, int(100 * spent / whole)) if whole else 0, left)
