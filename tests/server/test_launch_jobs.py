"""Runs in Jobs of Hugging Face: the real client against a server that speaks the Jobs endpoints and
really runs them; what is sent, told back, found again, cancelled, and what it costs.

    pytest tests/server/test_launch_jobs.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import app_fixtures as fixtures
import hub_jobs
import pytest
from hub_server import ALICE, BOB, HubServer, running_hub
from hypothesis import given
from hypothesis import strategies as st
from plans import PLAN

from quantkit.config import RunConfig
from quantkit.errors import QuantkitError
from quantkit.hub import jobs
from quantkit.planning import plan as plans
from quantkit.planning.nouns import Seconds
from quantkit.run.events import Event, EventLog, read_events
from quantkit.run.folder import RunDir
from quantkit.server.executors.hf_jobs import dispatch, executor, in_job, wheel
from quantkit.server.executors.hf_jobs.in_job import keep, restore
from quantkit.server.executors.hf_jobs.machines import offers
from quantkit.server.executors.hf_jobs.wire import (
    Listener,
    SentEvent,
    SentFile,
    event_line,
    file_lines,
)
from quantkit.server.executors.protocol import Offer, Order, choose
from quantkit.server.runs.limits import Limits
from quantkit.server.runs.record import load_record
from quantkit.server.runs.store import RunStore
from quantkit.server.web import view
from quantkit.tensors import to_json

until = fixtures.patience(300.0)

OWNER = "hf:alice"
IN_JOB = (
    "from quantkit.server.executors import local\n"
    "from quantkit.server.executors.hf_jobs import in_job\n"
    f"local.COMMAND = ({sys.executable!r}, {fixtures.__file__!r})\n"
    "in_job.SET_UP, in_job._POLL_SECONDS = (), 0.05\n"
    "raise SystemExit(in_job.main())"
)
DISPATCH = (
    "import sys; from quantkit.server.executors.hf_jobs import dispatch\n"
    "dispatch._POLL_SECONDS, dispatch._METRICS_SECONDS = 0.1, 0.3\n"
    "sys.exit(dispatch.main(sys.argv))"
)
ORDER = Order("hf_jobs", "cpu-upgrade", hours=2, usd_per_hour=0.03)
NEEDS = {
    "memory_bytes": 12 * 10**9,
    "disk_bytes": 30 * 10**9,
    "cpu": Seconds(0, 33_000),
    "gpu": Seconds(0, 20),
    "seconds": 33_000,
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    sleep = time.sleep
    with running_hub(monkeypatch, tmp_path) as server:
        monkeypatch.setattr("time.sleep", sleep)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
        monkeypatch.setenv("QUANTKIT_TEST_SECONDS", "0.05")
        monkeypatch.setenv("QUANTKIT_WHEEL", "https://example.org/quantkit-0.1.0-py3-none-any.whl")
        monkeypatch.setattr(executor, "COMMAND", (sys.executable, "-c", DISPATCH))
        server.jobs.command = [sys.executable, "-c", IN_JOB]
        yield server


@pytest.fixture
def store(tmp_path: Path, hub: HubServer) -> Iterator[RunStore]:
    made = RunStore(tmp_path / "runs", public=True)
    yield made
    made.close()
    fixtures.kill_workers(made.root)


def state(store: RunStore, run: str) -> str:
    store.tick()
    return store.view(run, OWNER).state


def test_a_run_in_a_job(store: RunStore, hub: HubServer) -> None:
    """From the order to the report, with what the Hub was sent and what it was not."""
    run = store.submit(fixtures.CONFIG, OWNER, ALICE, ORDER)
    until(lambda: state(store, run) in ("finished", "failed"))
    view = store.view(run, OWNER)
    assert (view.state, view.error) == ("finished", "")
    assert [stage.state for stage in view.stages] == ["done"] * 9
    assert view.report is not None and view.allocation is not None and "A card." in view.card
    assert view.curve and view.files and not view.files[0].is_here and not view.can_try
    assert view.remote is not None and view.remote.stage == "COMPLETED"
    assert any(line.text == "a token is there" or "Job" in line.text for line in view.log)

    (job,) = hub.jobs.all.values()
    spec = job.spec
    assert spec["flavor"] == "cpu-upgrade" and spec["timeoutSeconds"] == 7200
    assert spec["labels"]["quantkit-run"] == run and spec["labels"]["app"] == "quantkit"
    assert spec["secrets"] == {"HF_TOKEN": ALICE}
    assert json.loads(spec["environment"]["QUANTKIT_ORDER"]) == to_json(ORDER)
    assert ALICE not in json.dumps({**spec, "secrets": None})
    assert spec["volumes"][0]["source"] == "alice/quantkit-jobs"
    assert "quantkit-gguf @ https://example.org/quantkit-0.1.0-py3-none-any.whl" in spec["command"]
    for path in (store.root / run).rglob("*"):
        assert not path.is_file() or ALICE.encode() not in path.read_bytes(), path
    # What the run made lies in the bucket, for a later Job to go on from.
    kept = hub.jobs.root / "buckets" / "alice/quantkit-jobs" / run
    assert "validate" in RunDir(kept).records()


@pytest.mark.slow
def test_publishing_later_goes_on_from_the_bucket(store: RunStore, hub: HubServer) -> None:
    run = store.submit(fixtures.CONFIG, OWNER, ALICE, ORDER)
    until(lambda: state(store, run) == "finished")
    store.publish(run, OWNER, "alice/new", "private", ALICE)
    until(lambda: state(store, run) == "finished" and len(hub.jobs.all) == 2)
    second = list(hub.jobs.all.values())[1]
    config = json.loads(second.spec["environment"]["QUANTKIT_CONFIG"])
    assert (config["publish"], config["private"]) == ("alice/new", True)
    skipped = [line for line in store.view(run, OWNER).log if line.kind == "skipped"]
    assert len(skipped) == 8


@pytest.mark.slow
def test_a_killed_listener_takes_up_where_it_was(
    store: RunStore, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's machine dies; the Job does not, and is not started twice."""
    monkeypatch.setenv("QUANTKIT_TEST_SECONDS", "0.6")
    run = store.submit(fixtures.CONFIG, OWNER, ALICE, ORDER)
    until(
        lambda: state(store, run) == "running" and store.view(run, OWNER).stages[0].state == "done"
    )
    record = load_record(store.root / run)
    assert record is not None and record.pid is not None
    os.killpg(record.pid, signal.SIGKILL)
    until(lambda: state(store, run) == "interrupted")
    again = RunStore(store.root, public=True)  # another server, which knows no token
    assert again.view(run, OWNER).can_resume
    again.resume(run, OWNER, ALICE)
    store.close()
    until(lambda: state(again, run) in ("finished", "failed"))
    assert again.view(run, OWNER).state == "finished" and len(hub.jobs.all) == 1
    events, _ = read_events(store.root / run / "events.jsonl")
    told = [event.data["at"][1] for event in events if "at" in event.data]
    assert told == sorted(set(told)), "an event was heard twice or out of order"
    again.close()


@pytest.mark.slow
def test_a_job_that_finished_unheard_is_heard_later(store: RunStore, hub: HubServer) -> None:
    run = store.submit(fixtures.CONFIG, OWNER, ALICE, ORDER)
    hub.jobs.waiting_seconds = 0.5
    until(lambda: state(store, run) == "running" and len(hub.jobs.all) == 1)
    record = load_record(store.root / run)
    assert record is not None and record.pid is not None
    os.killpg(record.pid, signal.SIGKILL)
    (job,) = hub.jobs.all.values()
    until(lambda: job.stage == "COMPLETED")
    until(lambda: state(store, run) == "interrupted")
    store.resume(run, OWNER, ALICE)
    until(lambda: state(store, run) == "finished")
    assert len(hub.jobs.all) == 1


@pytest.mark.slow
def test_cancel_ends_the_job_and_a_lost_listener_does_not(
    store: RunStore, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_TEST_SECONDS", "3")
    run = store.submit(fixtures.CONFIG, OWNER, ALICE, ORDER)
    until(lambda: state(store, run) == "running" and bool(hub.jobs.all))
    (job,) = hub.jobs.all.values()
    until(lambda: job.stage == "RUNNING")
    record = load_record(store.root / run)
    assert record is not None and record.pid is not None
    os.killpg(record.pid, signal.SIGTERM)  # as when the Space is shut down
    until(lambda: state(store, run) == "interrupted")
    assert job.stage == "RUNNING"
    store.resume(run, OWNER, ALICE)
    until(lambda: state(store, run) == "running")
    until(lambda: any("again" in line.text for line in store.view(run, OWNER).log))
    store.cancel(run, OWNER)
    until(lambda: state(store, run) == "cancelled")
    assert job.stage == "CANCELED" and len(hub.jobs.all) == 1


@pytest.mark.slow
def test_a_job_out_of_time_says_so_and_goes_on_in_the_next(
    store: RunStore, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_TEST_SECONDS", "0.5")
    run = store.submit(fixtures.CONFIG, OWNER, ALICE, ORDER)
    kept = hub.jobs.root / "buckets" / "alice/quantkit-jobs" / run
    until(lambda: state(store, run) == "running" and len(RunDir(kept).records()) >= 2)
    (job,) = hub.jobs.all.values()
    hub.jobs.stop(job, "ERROR", "Job timeout")
    until(lambda: state(store, run) == "failed")
    assert "Job timeout" in store.view(run, OWNER).error
    monkeypatch.setenv("QUANTKIT_TEST_SECONDS", "0.05")
    store.resume(run, OWNER, ALICE)
    until(lambda: state(store, run) == "finished")
    assert len(hub.jobs.all) == 2
    skipped = [line.stage for line in store.view(run, OWNER).log if line.kind == "skipped"]
    assert skipped[:2] == ["fetch", "convert"]


@pytest.mark.slow
def test_faults_on_the_way(store: RunStore, hub: HubServer) -> None:
    """503, 429, a lost answer and cut streams: one Job, one whole story."""
    hub.fail_next(r"/api/jobs/alice$", 503, method="POST")
    hub.lose_next(r"/api/jobs/alice$", method="POST")
    hub.fail_next(r"/api/jobs/alice/\w+$", 429, headers={"Retry-After": "1"})
    hub.cut_next(r"/logs", after_bytes=3)
    run = store.submit(fixtures.CONFIG, OWNER, ALICE, ORDER)
    until(lambda: state(store, run) in ("finished", "failed"))
    assert store.view(run, OWNER).error == ""
    assert len(hub.jobs.all) == 1
    events, _ = read_events(store.root / run / "events.jsonl")
    told = [event.data["at"][1] for event in events if "at" in event.data]
    assert told == list(range(len(told)))


def test_the_last_word_on_a_machine_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its watcher asked before the Job ended is not written over how it ended."""
    directory = RunDir(tmp_path)
    dispatched = dispatch.Dispatch(directory, ORDER, ALICE, EventLog(directory.events_path))
    at_work = jobs.RemoteJob("1", "alice", "RUNNING", "", "cpu-upgrade", "https://x", 0.0, 5.0)
    dispatched._job = at_work

    def ends_meanwhile(job: jobs.RemoteJob, token: str) -> None:
        dispatched._ended.set()
        dispatched._tell_machine(dataclasses.replace(job, stage="COMPLETED"))

    monkeypatch.setattr(dispatch, "_METRICS_SECONDS", 0.0)
    monkeypatch.setattr(jobs, "look", lambda job, token: at_work)
    monkeypatch.setattr(jobs, "load", ends_meanwhile)
    dispatched._watch_machine()
    assert json.loads((tmp_path / "machine.json").read_text())["stage"] == "COMPLETED"


def test_a_job_that_did_not_say_its_limit_is_planned_again(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of before they said it, found again and resumed after it had ended."""
    monkeypatch.setattr(plans, "make_plan", lambda config: PLAN)
    hub.jobs.command = [sys.executable, "-c", "pass"]
    directory = RunDir(fixtures.write_run(tmp_path / "found", until="fetch", outcome=None))
    lost = Order("hf_jobs", "cpu-upgrade")
    dispatched = dispatch.Dispatch(directory, lost, ALICE, EventLog(directory.events_path))
    dispatched._tell_machine(dispatched._start())
    (job,) = hub.jobs.all.values()
    offer = choose(offers(PLAN, jobs.machines(), "hf_jobs"), "cpu-upgrade")
    assert job.spec["timeoutSeconds"] == 3600 * offer.hours
    assert json.loads(job.spec["environment"]["QUANTKIT_ORDER"]) == to_json(offer.order)
    assert "None h" not in directory.events_path.read_text()


def test_a_cost_of_no_known_price_is_not_shown(tmp_path: Path) -> None:
    order = Order("hf_jobs", "h200")
    directory = RunDir(fixtures.write_run(tmp_path / "found", until="fetch", outcome=None))
    dispatched = dispatch.Dispatch(directory, order, ALICE, EventLog(directory.events_path))
    dispatched._tell_machine(
        jobs.RemoteJob("1", "alice", "RUNNING", "", "h200", "https://x", 0.0, 3600.0)
    )
    fixtures.own(directory.path, OWNER, machine="h200", executor="hf_jobs")
    seen = RunStore(tmp_path, public=True).view("found", OWNER)
    assert seen.remote is not None and seen.remote.usd is None
    assert "Job on h200" in view.head(seen) and "$" not in view.head(seen)


@pytest.mark.parametrize(
    ("status", "words"),
    [(402, "payment"), (403, "no permission to write to the Jobs"), (401, "token")],
)
def test_refusals_are_sentences(hub: HubServer, store: RunStore, status: int, words: str) -> None:
    hub.fail_next(r"/api/jobs/alice$", status, times=9, method="POST")
    run = store.submit(fixtures.CONFIG, OWNER, ALICE, ORDER)
    until(lambda: state(store, run) == "failed")
    assert words in store.view(run, OWNER).error


@pytest.mark.slow
def test_without_a_bucket_a_repository_is_needed(hub: HubServer, store: RunStore) -> None:
    hub.jobs.may_make_buckets = False
    run = store.submit(fixtures.CONFIG, OWNER, ALICE, ORDER)
    until(lambda: state(store, run) == "failed")
    view = store.view(run, OWNER)
    assert "no place for the result" in view.error and not hub.jobs.all
    config = fixtures.dataclasses.replace(fixtures.CONFIG, publish="alice/x")
    run = store.submit(config, OWNER, ALICE, ORDER)
    until(lambda: state(store, run) == "finished")
    (job,) = hub.jobs.all.values()
    assert "volumes" not in job.spec


def test_nobody_signed_in(store: RunStore) -> None:
    run = store.submit(fixtures.CONFIG, OWNER, None, ORDER)
    until(lambda: state(store, run) == "failed")
    assert "nobody is signed in" in store.view(run, OWNER).error


@pytest.mark.slow
def test_jobs_do_not_wait_for_this_machine(store: RunStore, hub: HubServer) -> None:
    store.limits = Limits(workers=0, remote=2)
    here = store.submit(fixtures.CONFIG, OWNER, ALICE)
    away = store.submit(fixtures.CONFIG, OWNER, ALICE, ORDER)
    until(lambda: state(store, away) == "finished")
    assert store.view(here, OWNER).state == "queued"


@pytest.mark.slow
def test_the_real_pipeline_in_a_job(
    store: RunStore, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of the Hub, quantized in a Job by the command itself, published from there."""
    from tiny_models import tiny_llama

    for name, value in hub.env.items():
        monkeypatch.setenv(name, value)
    model = tiny_llama(tmp_path / "tiny", hidden_size=256, intermediate_size=512)
    hub.add_model("alice/tiny", {p.name: p for p in model.iterdir() if p.is_file()})
    code = "from quantkit.server.executors.hf_jobs import in_job; in_job.SET_UP = (); "
    code += "raise SystemExit(in_job.main())"
    hub.jobs.command = [sys.executable, "-c", code]
    config = RunConfig(
        "alice/tiny", profile="demo", calibration="builtin", publish="alice/tiny-GGUF", private=True
    )
    run = store.submit(config, OWNER, ALICE, ORDER)
    until(lambda: state(store, run) in ("finished", "failed"), 900)
    view = store.view(run, OWNER)
    assert (view.state, view.error) == ("finished", "")
    assert view.published_url and view.report and view.allocation and view.curve
    repo = hub.repos["model", "alice/tiny-GGUF"]
    (name,) = (n for n in repo.head.files if n.endswith(".gguf") and "imatrix" not in n)
    assert repo.private and repo.head.files[name].data[:4] == b"GGUF"
    assert {file.name: file.sha256 for file in view.files}[name] == repo.head.files[name].sha256


# The client's own part.


def test_jobs_of_others_are_not_seen(hub: HubServer) -> None:
    hub.jobs.command = [sys.executable, "-c", "print('hello')"]
    order = jobs.JobOrder("x", ("true",), "cpu-basic", 60, {}, {"A": "b"})
    mine = jobs.start(order, "run1", ALICE)
    assert [job.id for job in jobs.find("run1", ALICE)] == [mine.id]
    assert jobs.find("run1", BOB) == () and jobs.find("run2", ALICE) == ()
    with pytest.raises(QuantkitError):
        jobs.cancel(mine, BOB)
    assert list(jobs.lines(mine, ALICE)) == ["hello"]


def test_machines_and_prices(hub: HubServer) -> None:
    found = {machine.name: machine for machine in jobs.machines()}
    assert found["cpu-upgrade"].usd_per_hour == pytest.approx(0.03)
    assert found["a10g-large"].gpu == "1x A10G"
    assert found["a10g-large"].gpu_bytes == 24_000_000_000
    assert (found["h200x4"].gpu, found["h200x4"].n_gpus) == ("4x H200", 4)
    assert (found["h200"].n_cpu, found["h200"].usd_per_hour) == (23, pytest.approx(5.0, abs=0.01))


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (None, ""),
        ({}, ""),
        ({"cpu_usage_pct": 87, "rx_bps": 5}, " · processor 87 %"),
        (
            {
                "cpu_usage_pct": 86.6,
                "memory_used_bytes": 3_100_000_000,
                "memory_total_bytes": 16_000_000_000,
                "gpus": {"0": {"utilization": 42, "memory_used_bytes": 1}, "1": {}},
            },
            " · processor 87 %, memory 3.1 of 16 GB, GPU 42 %",
        ),
        ({"cpu_usage_pct": "much"}, ""),
        ({"cpu_usage_pct": 1, "gpus": ["0"]}, ""),
        ([87], ""),
    ],
)
def test_how_busy_a_machine_is(said: Any, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    api = SimpleNamespace(fetch_job_metrics=lambda job_id, namespace: iter([said]))
    monkeypatch.setattr(jobs, "hf_api", lambda token: api)
    job = jobs.RemoteJob("1", "alice", "RUNNING", "", "cpu-upgrade", "https://x", 0.0, 5.0)
    load = jobs.load(job, ALICE)
    assert view._load(load) == shown
    if shown:
        assert to_json(load).items() >= {k: v for k, v in said.items() if k != "gpus"}.items()


def test_the_machine_is_chosen_from_the_estimate(hub: HubServer) -> None:
    def offered(**needs: int | Seconds) -> tuple[Offer, ...]:
        estimates = dataclasses.replace(PLAN.estimates, **{**NEEDS, **needs})
        return offers(dataclasses.replace(PLAN, estimates=estimates), jobs.machines(), "hf_jobs")

    names = [offer.machine for offer in offered()]
    assert "t4-small" in names and names[0] == choose(offered()).machine
    chosen = choose(offered())
    assert chosen.seconds < 3600 * chosen.hours and 0 < chosen.usd <= chosen.most_usd
    large = offered(memory_bytes=100 * 10**9, cpu=Seconds(0, 8e6), gpu=Seconds(0, 5000))
    assert choose(large).machine == "h200"
    assert choose(large).device == "cuda"
    # What one GPU would not end in time is offered on four; what does not fit on one does not fit.
    longer = offered(memory_bytes=100 * 10**9, cpu=Seconds(0, 2.5e8), gpu=Seconds(0, 350_000))
    assert [(offer.machine, offer.device) for offer in longer] == [("h200x4", "cuda")]
    assert offered(memory_bytes=200 * 10**9) == ()
    with pytest.raises(QuantkitError, match="None of the offered machines"):
        choose(offered(memory_bytes=10**12))
    with pytest.raises(QuantkitError, match="does not fit on 'cpu-basic'"):
        choose(large, "cpu-basic")


def test_the_wheel_is_pinned_by_its_hash(tmp_path: Path) -> None:
    (tmp_path / "quantkit_gguf-0.1.0-py3-none-any.whl").write_bytes(b"wheel")
    space = {"SPACE_ID": "a/b"}
    found = wheel.job_requirement(space, tmp_path)
    assert "/spaces/a/b/resolve/main/quantkit_gguf-0.1.0-py3-none-any.whl#sha256=" in found
    with pytest.raises(QuantkitError):
        wheel.job_requirement({}, tmp_path)


def test_a_private_space_offers_no_jobs(hub: HubServer, tmp_path: Path) -> None:
    """They would fetch the wheel from it without a token."""
    name = "quantkit_gguf-0.1.0-py3-none-any.whl"
    (tmp_path / name).write_bytes(b"wheel")
    hub.add_model("bob/open", {name: b"wheel"}, kind="space")
    hub.add_model("bob/closed", {name: b"wheel"}, kind="space", private=True)

    def lacks(space: str) -> str:
        return " ".join(wheel.lacks({"SPACE_ID": space}, tmp_path) or ())

    assert lacks("bob/open") == "" and "no wheel" in " ".join(wheel.lacks({}, tmp_path) or ())
    for _ in range(3):
        assert "This Space is private" in lacks("bob/closed")
    asked = [request for request in hub.requests if "resolve" in request.path]
    assert [(request.method, request.user) for request in asked] == [("HEAD", None)] * 2
    hub.fail_next("/spaces/bob/busy/", 503)
    assert lacks("bob/busy") == "", "it does not say that it is private"


# What is told in a log.


@given(
    st.dictionaries(st.text(), st.text() | st.integers(-(2**63), 2**63)), st.binary(max_size=40_000)
)
def test_what_is_told_arrives(value: dict[str, Any], data: bytes) -> None:
    listener, event = Listener(), Event(1.0, "search", "note", "", value)
    assert listener.hear(event_line(7, event)) == SentEvent(7, event)
    heard = [listener.hear(line) for line in file_lines("manifest.json", data)]
    assert heard[:-1] == [None] * (len(heard) - 1)
    assert heard[-1] == SentFile("manifest.json", data)


@given(st.text())
def test_any_other_line_is_text(line: str) -> None:
    for start in ("", "@quantkit event ", "@quantkit file ", "@quantkit file manifest.json "):
        said = Listener().hear(start + line)
        assert isinstance(said, (str, SentEvent)) or said is None


@pytest.mark.parametrize(
    "event",
    ["", "3", "[]", '{"kind": "note"}', '{"time": 1, "stage": "search", "kind": "boast"}']
    + [
        '{"time": 1e999, "stage": null, "kind": "note"}',
        '{"time": 1, "stage": "x", "kind": "note"}',
    ],
)
def test_what_is_no_event_is_text(event: str) -> None:
    line = f"@quantkit event 3 {event}"
    assert Listener().hear(line) == line


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "job.json", "7-stitch/a.gguf", "lock"])
def test_only_results_are_taken_from_a_log(path: str) -> None:
    for line in file_lines(path, b"data"):
        assert Listener().hear(line) == line


def test_a_bomb_in_a_log_is_text() -> None:
    bomb = list(file_lines("manifest.json", bytes(30_000_000)))
    heard = [Listener().hear(line) for line in bomb]
    assert not any(isinstance(said, SentFile) for said in heard)


def test_keep_and_restore(tmp_path: Path) -> None:
    """A run moves to another machine whole, with the times that its manifest knows."""
    source = fixtures.write_run(tmp_path / "a", until="stitch", outcome=None)
    keep(source, tmp_path / "state")
    (tmp_path / "b").mkdir()
    restore(tmp_path / "state", tmp_path / "b")
    there = RunDir(tmp_path / "b")
    assert there.records() == RunDir(source).records()
    for record in there.records().values():
        for output in record.outputs:
            assert (tmp_path / "b" / output.path).stat().st_mtime_ns == output.mtime_ns
    # A stage whose file did not make it is done again, and all after it.
    (tmp_path / "state/5-search/best.json").unlink()
    (tmp_path / "c").mkdir()
    restore(tmp_path / "state", tmp_path / "c")
    assert list(RunDir(tmp_path / "c").records())[-1] == "quantize"


def test_prices_are_the_servers(hub: HubServer) -> None:
    assert len(jobs.machines()) == len(hub_jobs.PRICES)


def test_a_half_line_of_the_worker_meets_no_event(capsysbinary: pytest.CaptureFixture) -> None:
    """Text and its end are written apart; what is told meanwhile stays a line of its own."""
    out = in_job._WholeLines()
    reading, writing = os.pipe()
    with open(reading, "rb") as stream:
        passing = threading.Thread(target=out.pass_on, args=(stream,))
        passing.start()
        os.write(writing, b"quantize 0")
        time.sleep(0.1)
        out.write(b"event\n")
        os.write(writing, b" of 3\nend")
        os.close(writing)
        passing.join()
    assert capsysbinary.readouterr().out.splitlines() == [b"event", b"quantize 0 of 3", b"end"]
