"""Damaged run folders, and Jobs that say odd things: one broken run never touches another.

pytest tests/server/test_damaged_runs.py
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import app_fixtures as fixtures
import pytest

from quantkit.run.events import EventLog, read_events
from quantkit.sandbox.untrusted import Damaged
from quantkit.server.executors import local
from quantkit.server.runs.clock import Clock
from quantkit.server.runs.limits import PUBLIC_LIMITS, Limits
from quantkit.server.runs.record import NoSuchRun, load_record
from quantkit.server.runs.store import RunStore
from quantkit.server.runs.view import RunView
from quantkit.server.web import results
from quantkit.server.web.handlers import Handlers
from quantkit.server.web.visitor import Visitors

ALICE, MALLORY = "hf:alice", "hf:mallory"
DAY = 86400.0
RECORDS = ("job.json", "config.json", "manifest.json", "events.jsonl", "machine.json", "log.txt")
RESULTS = ("8-validate/report.json", "5-search/best.json", "9-publish/upload/README.md", "lock")
VALUES: tuple[Any, ...] = (
    *([], {}, "", "x" * 100_000, 0, -1, 1e308, 2**63, True, None, [[]], {"a": {}}),
    *("javascript:alert(1)", "<script>alert(1)</script>", "\u202e\x1b[2J", "../../../etc/passwd"),
)
RAW = (
    *(b"", b"[]", b"7", b"null", b"{", b'"', b"\xff\xfe", b"\0" * 5000, b"[" * 50_000, b"NaN"),
    *(b'{"a":' * 5000 + b"1" + b"}" * 5000, b"9" * 10_000, b"\xef\xbb\xbf{}", b"1e999"),
    b'{"stages": [], "targets": {}, "time": "x", "kind": 3, "owner": []}',
)


class Site:
    """A page's handlers with the run of one visitor that is damaged, and the run of another."""

    def __init__(self, root: Path) -> None:
        self.root = root
        machine = {"machine": "cpu-basic", "hours": 1, "usd_per_hour": 0.01}
        evil = fixtures.own(fixtures.write_run(root / "evil"), MALLORY, "stopped", **machine)
        write_json(evil / "machine.json", {**MACHINE, "metrics": {"cpu_usage_pct": 3}})
        (evil / "log.txt").write_text("a\nb\n")
        fixtures.own(fixtures.write_run(root / "good"), ALICE)
        self.whole = shutil.copytree(evil, root.parent / "whole")
        self.store = RunStore(root, PUBLIC_LIMITS, public=True)
        self.handlers = Handlers(self.store, Visitors(b"x"), True, True)

    def restore(self) -> Path:
        evil = self.root / "evil"
        shutil.rmtree(evil)
        return shutil.copytree(self.whole, evil)

    def check(self) -> str:
        """Nothing is raised and nothing of the neighbor changes; the text of the broken one."""
        store = self.store
        store._next_sweep = 0.0
        store.tick()
        shown = self.handlers.shown("evil", MALLORY)
        listed = self.handlers.run_list(MALLORY)
        assert "Something went wrong" not in listed
        assert [run.id for run in store.runs(ALICE)] == ["good"]
        assert store.view("good", ALICE).state == "finished"
        assert "Something went wrong" not in self.handlers.run_list(ALICE)
        try:
            json.dumps(store.view("evil", MALLORY).model)
            store.staged("evil", MALLORY)
        except NoSuchRun:
            pass  # nobody can tell whose it was
        except Exception as error:
            assert "manifest.json" in str(error), error
        html = "".join(str(value) for value in (*shown.values(), listed))
        html.encode()
        assert "<script>alert" not in html and 'href="javascript' not in html
        return html


MACHINE = {
    **{"job": "j", "url": "https://huggingface.co/jobs/a/j", "machine": "cpu-basic"},
    **{"stage": "ERROR", "run_seconds": 3.0, "usd": 0.01},
}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    # A record may come out as one of a run that waits, and is started: nothing is to be written.
    monkeypatch.setattr(local, "COMMAND", (sys.executable, "-c", ""))
    made = Site(tmp_path / "runs")
    yield made
    made.store.close()


def damage(path: Path, rng: random.Random) -> str:
    """Damage one file in one way; returns what was done."""
    way = rng.randrange(8)
    if way in (0, 1) and path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        at = rng.randrange(len(lines))
        value = json.loads(lines[at])
        place = value
        while isinstance(place, (dict, list)) and place:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.4:
                new = rng.choice(VALUES)
                if isinstance(place, dict) and rng.random() < 0.2:
                    del place[key]
                else:
                    place[key] = new
                lines[at] = json.dumps(value)
                path.write_text("\n".join(lines) + "\n")
                return f"{path.name}: {key} = {new!r:.40}"
            place = place[key]
    data = bytearray(path.read_bytes()) if path.exists() else bytearray()
    if way == 2:
        path.unlink(missing_ok=True)
        path.mkdir()
        return f"{path.name} is a folder"
    if way == 3:
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        return f"{path.name} is a pipe"
    if way == 4:
        path.unlink(missing_ok=True)
        path.symlink_to(rng.choice(["/dev/zero", "nowhere", path.name, "/etc"]))
        return f"{path.name} is a link"
    if way == 5:
        path.write_bytes(data[: rng.randrange(len(data) + 1)])
        return f"{path.name} is cut"
    if way == 6 and data:
        for _ in range(rng.choice((1, 4, 40))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        return f"{path.name} has other bytes"
    raw = rng.choice(RAW)
    path.write_bytes(raw)
    return f"{path.name} is {raw[:20]!r}"


@pytest.mark.parametrize("block", range(10))
def test_three_hundred_damages(site: Site, block: int, caplog: pytest.LogCaptureFixture) -> None:
    """Every one foreseen: nothing falls back on the last resort, which logs a traceback."""
    for seed in range(30 * block, 30 * block + 30):
        evil, rng = site.restore(), random.Random(seed)
        names = rng.sample(RECORDS + RESULTS, rng.choice((1, 2)))
        done = [damage(evil / name, rng) for name in names]
        with caplog.at_level(logging.ERROR):
            site.check()
        assert not caplog.records, f"seed {seed}: {done}: {caplog.text[-2000:]}"


ODD_EVENTS: dict[str, dict[str, Any]] = {
    "time is text": {"time": "x", "kind": "finished"},
    "time is none": {"time": None, "stage": "search", "kind": "progress"},
    "time is infinite": {"time": float("inf"), "kind": "started"},
    "time is not a number": {"time": float("nan"), "kind": "finished"},
    "time far in the future": {"time": 1e18, "kind": "finished"},
    "stage is a list": {"stage": ["a"], "kind": "finished"},
    "message is a list": {"kind": "failed", "message": [1]},
    "infinite kl": {"stage": "search", "kind": "progress", "data": {"kl": float("inf")}},
    "large kl": {"stage": "search", "kind": "progress", "data": {"kl": 1e308, "generation": 1e308}},
    "negative kl": {"stage": "search", "kind": "progress", "data": {"kl": -1, "generation": -5}},
    "a script as address": {
        **{"stage": "publish", "kind": "finished"},
        "data": {"url": "javascript:alert(1)", "seconds": "x"},
    },
    "seconds is text": {"stage": "publish", "kind": "finished", "data": {"seconds": "x"}},
    "seconds below zero": {"stage": "fetch", "kind": "finished", "data": {"seconds": -1e300}},
    "markup": {"stage": "search", "kind": "<script>alert(1)</script>", "message": "<script>"},
    "huge done": {"stage": "search", "kind": "progress", "data": {"done": 10**400, "total": 1}},
    "large done": {"stage": "search", "kind": "progress", "data": {"done": 1e308, "total": 1}},
    "deep": {"kind": "note", "data": {"a": json.loads("[" * 90 + "]" * 90)}},
    "long": {"kind": "note", "message": "x" * 3_000_000},
    "half a character": {"kind": "note", "message": "\ud800"},
}


@pytest.mark.parametrize("name", ODD_EVENTS)
def test_odd_events_of_a_job(site: Site, name: str) -> None:
    """The attack of shared/attacks/events.py: cleaning goes on for the others."""
    site.store.close()
    old = time.time() - 20 * DAY
    evil, victim = site.root / "evil", site.root / "good"
    fixtures.own(evil, MALLORY, "stopped", machine="cpu-basic", since=old)
    with (evil / "events.jsonl").open("a") as file:
        event = {"time": 1.7e9, "stage": None, "message": "", "data": {}, **ODD_EVENTS[name]}
        file.write(json.dumps(event) + "\n")
    fixtures.own(victim, ALICE, since=old)
    age(victim, 20 * DAY)
    store = RunStore(site.root, PUBLIC_LIMITS, public=True)
    handlers = Handlers(store, Visitors(b"x"), True, True)
    html = "".join(str(value) for value in handlers.shown("evil", MALLORY).values())
    assert "<script>" not in html and 'href="javascript' not in html
    assert "Something went wrong" not in handlers.run_list(MALLORY) + handlers.run_list(ALICE)
    store.tick()
    assert not victim.exists(), "cleaning stopped"
    store.close()


def age(folder: Path, seconds: float) -> None:
    path = folder / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**e, "time": e["time"] - seconds}) + "\n" for e in events))


def test_lines_of_any_size_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventLog(path).emit(None, "started", "first")
    with path.open("ab") as file:
        file.write(b'{"time": 1, "message": "' + b"x" * 20_000_000 + b'"}\n[]\n7\n\n')
    EventLog(path).emit(None, "note", "last")
    events, end = read_events(path)
    assert [e.message for e in events] == ["first", "last"] and end == path.stat().st_size


def test_a_damaged_record_still_tells_whose_it_is(site: Site) -> None:
    path = site.root / "evil" / "job.json"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(Damaged):
        load_record(site.root / "evil")
    (run,) = site.store.runs(MALLORY)
    assert run.state == "damaged" and not site.store.runs("hf:bob")
    view = site.store.view("evil", MALLORY)
    assert view.error == "The job.json of this run cannot be read." and view.can_delete
    assert "Damaged" in site.handlers.run_list(MALLORY)
    site.store.delete("evil", MALLORY)
    assert not site.store.runs(MALLORY)


def test_what_nobody_foresaw_is_one_runs_alone(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last resort: whatever a run's folder makes the code raise, the others go on."""
    follower = site.store._scan()["evil"]
    monkeypatch.setattr(follower, "refresh", lambda: 1 / 0)
    assert site.store.runs(MALLORY)[0].state == "damaged"
    site.check()


@pytest.mark.parametrize("who", ["root", "a plain user"])
def test_files_that_may_not_be_read(site: Site, who: str) -> None:
    if (who == "root") != (os.geteuid() == 0):
        pytest.skip(f"this is not {who}")
    for name in RECORDS:
        os.chmod(site.root / "evil" / name, 0)
    os.chmod(site.root / "evil", 0)
    try:
        site.check()
    finally:
        os.chmod(site.root / "evil", 0o700)


# Nothing is cleaned before it is deleted: that is a process, which takes real time.
KEPT = Limits(seconds=6 * 3600, keep_days=14)


class FakeTime:
    """Two clocks: one that can be set, one that only goes on."""

    def __init__(self) -> None:
        self.wall, self.steady = time.time(), 1000.0

    def clock(self, root: Path) -> Clock:
        return Clock(root, lambda: self.wall, lambda: self.steady)

    def pass_by(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds


def sweeps(store: RunStore, clocks: FakeTime, seconds: float) -> None:
    """A sweep an hour, for so long."""
    for _ in range(int(seconds // 3600)):
        clocks.pass_by(3600)
        store._next_sweep = 0.0
        store.tick()


def test_a_clock_that_jumps_deletes_nothing(tmp_path: Path) -> None:
    root, clocks = tmp_path / "runs", FakeTime()
    folder = fixtures.own(fixtures.write_run(root / "new"), ALICE)
    store = RunStore(root, KEPT, public=True, clock=clocks.clock(root))
    sweeps(store, clocks, 2 * 3600)
    clocks.wall += 15 * DAY
    sweeps(store, clocks, 6 * DAY)
    assert folder.exists(), "it ended six days ago"
    clocks.wall -= 15 * DAY
    sweeps(store, clocks, 7 * DAY)
    assert folder.exists(), "it ended 13 days ago"
    sweeps(store, clocks, 2 * DAY)
    assert not folder.exists(), "it ended 15 days ago, by a clock that is right again"
    store.close()


@pytest.mark.parametrize("swept_before", [True, False])
def test_a_restart_with_a_wrong_clock_deletes_nothing(tmp_path: Path, swept_before: bool) -> None:
    root, clocks = tmp_path / "runs", FakeTime()
    folder = fixtures.own(fixtures.write_run(root / "new"), ALICE)
    if swept_before:
        first = RunStore(root, KEPT, public=True, clock=clocks.clock(root))
        sweeps(first, clocks, 3600)
        first.close()
    clocks.wall += 400 * DAY
    second = RunStore(root, KEPT, public=True, clock=clocks.clock(root))
    sweeps(second, clocks, 5 * DAY)
    assert folder.exists()
    second.close()


def test_a_run_from_the_future_is_kept_and_then_deleted(tmp_path: Path) -> None:
    root, clocks = tmp_path / "runs", FakeTime()
    folder = fixtures.own(fixtures.write_run(root / "new"), ALICE, since=time.time() + 10 * DAY)
    store = RunStore(root, KEPT, public=True, clock=clocks.clock(root))
    sweeps(store, clocks, 20 * DAY)
    assert folder.exists()
    sweeps(store, clocks, 6 * DAY)
    assert not folder.exists()
    store.close()


def test_the_limit_of_time_goes_by_the_process(tmp_path: Path) -> None:
    """A clock that jumps ends no worker, and one that goes back keeps none."""
    root, clocks = tmp_path / "runs", FakeTime()
    folder = fixtures.alive(
        fixtures.write_run(root / "now", until="search", share=0.5, outcome=None),
        ALICE,
        os.getpid(),
    )
    store = RunStore(root, KEPT, public=True, clock=clocks.clock(root))
    clocks.wall += 2 * DAY
    store.tick()
    record = load_record(folder)
    assert record is not None and record.phase == "started"
    store.close()


@pytest.mark.parametrize("seed", range(60))
def test_reports_of_strangers_are_drawn_or_refused(seed: int) -> None:
    """Numbers that no measurement gives, in any place of a report: no exception, and no waiting."""
    rng = random.Random(seed)
    report = fixtures.make_report()
    for _ in range(rng.choice((1, 3, 10))):
        place: Any = report
        while True:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], (dict, list)) or not place[key]:
                extremes = (0, -1, 1e308, 5e-324, -1e308, 2**62, "x", None, [], {}, True)
                place[key] = rng.choice(extremes)
                break
            place = place[key]
    began = time.process_time()
    run = RunView("a", "m", "t", "p", "finished", 1.0, stages=(), report=report)
    html = results.results(run) + results.report(run)
    html.encode()
    assert time.process_time() - began < 20
