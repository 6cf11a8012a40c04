"""How far a run is, read from its events: time left, attempts, what is odd."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from quantkit.calibration.prepare import Bar
from quantkit.run.events import Event, EventLog
from quantkit.server.runs.progress import Progress


class TestProgress:
    """Events to what is shown."""

    def feed(self, progress: Progress, times: list[tuple[float, int]], total: int = 100) -> None:
        for moment, done in times:
            data = {"done": done, "total": total}
            progress.feed(Event(moment, "search", "progress", "", data))

    def test_time_left_falls_and_follows_the_rate(self) -> None:
        progress = Progress()
        progress.feed(Event(0, "search", "started"))
        self.feed(progress, [(0, 0), (1, 1)])
        assert progress.eta_seconds(1) is None  # too early to tell
        self.feed(progress, [(10, 10)])
        assert progress.eta_seconds(10) == pytest.approx(90)
        shown = []
        for moment, done in [(20, 12), (30, 30), (40, 35), (60, 70), (80, 90)]:
            self.feed(progress, [(moment, done)])
            shown.append(progress.eta_seconds(moment))
        assert all(a is not None and b is not None and b < a for a, b in itertools.pairwise(shown))

    def test_an_estimate_that_has_run_out_is_replaced(self) -> None:
        progress = Progress()
        self.feed(progress, [(0, 0), (10, 50)])
        assert progress.eta_seconds(15) == pytest.approx(5)
        assert progress.eta_seconds(25) is None
        self.feed(progress, [(40, 60)])
        assert progress.eta_seconds(40) == pytest.approx(40 * 40 / 60)

    def test_another_total_is_another_phase(self) -> None:
        progress = Progress()
        self.feed(progress, [(0, 0), (10, 100)])
        self.feed(progress, [(11, 1)], total=7)
        assert progress.eta_seconds(11) is None
        assert progress.stages["search"].percent == 14

    def test_a_second_attempt_forgets_the_failure_of_the_first(self, tmp_path: Path) -> None:
        progress = Progress()
        progress.feed(Event(0, None, "started"))
        progress.feed(Event(1, "fetch", "started"))
        progress.feed(Event(2, "fetch", "failed", "No.", {"remedy": "Yes."}))
        assert (progress.outcome, progress.error, progress.remedy) == ("failed", "No.", "Yes.")
        progress.feed(Event(3, None, "started"))
        assert (progress.outcome, progress.error) == (None, "")
        assert progress.stages["fetch"].state == "waiting"

    def test_a_search_that_begins_anew_replaces_its_curve(self) -> None:
        progress = Progress()
        for generation in (0, 1, 2, 3, 0, 1):
            data = {"done": generation, "total": 9, "kl": 0.1, "generation": generation}
            progress.feed(Event(1, "search", "progress", "", data))
        assert [point.generation for point in progress.curve] == [0, 1]

    @pytest.mark.parametrize("expects", [True, False])
    def test_an_expected_kl_is_known_as_one(self, expects: bool) -> None:
        progress = Progress()
        data = {"done": 1, "total": 9, "kl": 0.1, "generation": 0, "expects_tuning": expects}
        progress.feed(Event(1, "search", "progress", "", data))
        assert progress.curve[0].is_expected == expects

    def test_odd_events_are_survived(self) -> None:
        progress = Progress()
        for event in (
            Event(1, "search", "progress", "", {"done": "x", "total": None, "kl": "nan"}),
            Event(1, "search", "progress", "", {"done": 5, "total": 0, "kl": float("nan")}),
            Event(1, "nowhere", "finished"),
            Event(1, None, "what"),
            Event(1, "publish", "finished", "", {"url": ["x"]}),
        ):
            progress.feed(event)
        assert progress.curve == [] and progress.published_url is None


PLANNED = {"convert": 10.0, "calibrate": 20.0, "quantize": 40.0, "search": 30.0}


def test_the_time_of_the_whole_run_follows_what_was_measured() -> None:
    """A machine half as fast as planned needs about twice as long, and a download says nothing."""
    progress = Progress()
    assert progress.overall(None, 0) is None

    def told(moment: float, stage: str, kind: str, **data: float) -> None:
        progress.feed(Event(moment, stage, kind, "", data))

    def left(now: float) -> float:
        found = progress.overall(PLANNED, now)
        assert found is not None
        return found.seconds_left

    assert left(0) == pytest.approx(100)
    told(0, "fetch", "started")
    told(500, "fetch", "finished", seconds=500)
    assert left(500) == pytest.approx(100)
    told(500, "convert", "started")
    told(520, "convert", "finished", seconds=20)
    told(520, "calibrate", "started")
    told(560, "calibrate", "finished", seconds=40)
    assert 70 * 1.6 < left(560) < 70 * 2
    told(560, "quantize", "started")
    # What the stage itself says counts before the plan.
    told(560, "quantize", "progress", done=0, total=100)
    told(570, "quantize", "progress", done=50, total=100)
    assert 10 + 30 * 1.6 < left(570) < 10 + 30 * 2
    percent = [progress.overall(PLANNED, 570 + i).percent for i in range(3)]  # type: ignore[union-attr]
    assert percent == sorted(percent) and 0 < percent[0] < 100


def test_the_percent_of_a_run_never_falls() -> None:
    progress = Progress()
    progress.feed(Event(0, "search", "started"))
    shown = []
    for moment, done in [(0, 0), (10, 50), (60, 60), (200, 70)]:
        progress.feed(Event(moment, "search", "progress", "", {"done": done, "total": 100}))
        found = progress.overall({"search": 20, "validate": 30}, moment)
        assert found is not None
        shown.append(found.percent)
    assert shown == sorted(shown)
    progress.feed(Event(300, None, "started"))
    found = progress.overall({"search": 20, "validate": 30}, 300)
    assert found is not None and found.percent == 0


def test_calibrate_has_one_bar_for_its_parts(tmp_path: Path) -> None:
    """Text, dialogues and gradients: it ends once."""
    events: list[Event] = []
    bar = Bar(EventLog(tmp_path / "events.jsonl", events.append))
    for done in (0, 500, 1000):
        bar.written(done, 1000, "the model writes")
    bar.gradients(1, 2)
    bar.gradients(2, 2)
    shares = [event.data["done"] / event.data["total"] for event in events]
    assert shares == sorted(shares) and shares[-1] == 1
    assert [share for share in shares if share == 1] == [1]
