"""How far a run is, read from its events: time left, attempts, what is odd."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from quantkit.run.events import Event
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
