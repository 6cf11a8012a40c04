"""Another place where runs are done is one file and one row: a made-up one goes all the way, from
the page's form to the end of a run.

    pytest tests/server/test_executors.py
"""

from __future__ import annotations

import ast
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import app_fixtures as fixtures
import pytest
from plans import ask
from test_structure import OURS, imports, module_of, short, tree, walk

from quantkit.config import RunConfig
from quantkit.errors import QuantkitError, UsageError
from quantkit.planning.nouns import Plan
from quantkit.sandbox.untrusted import Damaged
from quantkit.server.executors import registry
from quantkit.server.executors.protocol import (
    MACHINE_FILE,
    Executor,
    FoundRun,
    Offer,
    Order,
    RemoteState,
)
from quantkit.server.runs.adopt import adopt
from quantkit.server.runs.limits import Limits
from quantkit.server.runs.record import RunRecord, load_record, owner_hash
from quantkit.server.runs.request import RunForm
from quantkit.server.runs.store import RunStore
from quantkit.server.web import form_handlers as handlers_module
from quantkit.server.web import view
from quantkit.server.web.form_handlers import Client
from quantkit.server.web.handlers import Handlers
from quantkit.server.web.page import build_app
from quantkit.server.web.visitor import Visitors
from quantkit.tensors import to_json

until = fixtures.patience(300.0)

OWNER = "visitor:alice"
ME = Client(OWNER, None, "1.2.3.4")

# The worker of the ship: what a run looks like from here while it is at work out there.
WORKER = f"""
import json, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(fixtures.__file__).parent)!r})
import app_fixtures as fixtures
from quantkit.files import write_json
order, folder = json.loads(sys.argv[1]), Path(sys.argv[2])

def note(stage):
    state = {{"job": "voyage 1", "url": "https://ship.example/1", "machine": order["machine"]}}
    state |= {{"stage": stage, "run_seconds": 60.0, "usd": 0.5}}
    write_json(folder / "machine.json", state)

def sunk(number, frame):
    note("CANCELED")
    sys.exit(130)

signal.signal(signal.SIGUSR2, sunk)
note("RUNNING")
fixtures.work(folder, float(__import__("os").environ["QUANTKIT_TEST_SECONDS"]))
note("COMPLETED")
"""


class Ship(Executor):
    """A made-up executor: all that another place needs."""

    name, noun, title = "ship", "Voyage", "On a ship"
    is_remote = True
    results_at = "They are in the hold."
    cancelled_by = signal.SIGUSR2

    def __init__(self) -> None:
        self.ended: list[tuple[str, str | None]] = []

    def command(self, order: Order) -> tuple[str, ...]:
        return sys.executable, "-c", WORKER, json.dumps(to_json(order))

    def offers(self, plan: Plan, token: str | None) -> tuple[Offer, ...]:
        return (Offer(self.name, "cutter", "Voyage: cutter", "cuda", 3600.0, 2, 0.5),)

    def end(self, run_id: str, token: str | None) -> None:
        self.ended.append((run_id, token))

    def found(self, token: str) -> tuple[FoundRun, ...]:
        config = json.dumps(to_json(fixtures.CONFIG))
        return (FoundRun("run-of-a-voyage", config, "cutter", 1.7e9),)


@pytest.fixture
def ship(monkeypatch: pytest.MonkeyPatch) -> Ship:
    """The row of the registry."""
    made = Ship()
    monkeypatch.setitem(registry.EXECUTORS, made.name, made)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    monkeypatch.setenv("QUANTKIT_TEST_SECONDS", "0.05")
    return made


@pytest.fixture
def store(tmp_path: Path, ship: Ship) -> Iterator[RunStore]:
    """A store without any worker on this machine."""
    made = RunStore(tmp_path / "runs", Limits(workers=0))
    yield made
    made.close()
    fixtures.kill_workers(made.root)


def state(store: RunStore, run: str) -> str:
    store.tick()
    return store.view(run, OWNER).state


@pytest.mark.parametrize("machine", ["ship", "ship:cutter"])
def test_from_the_form_to_the_end(
    store: RunStore, monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    monkeypatch.setattr(handlers_module, "estimate", lambda config, *_: ask(config))
    handlers = Handlers(store, Visitors(b"k"), on_space=False, sign_in=False)
    here = store.submit(fixtures.CONFIG, OWNER)
    (run,) = handlers.start(RunForm("a/b", machine=machine), "", ME)
    config = RunConfig.from_json(json.loads((store.root / run / "config.json").read_text()))
    assert config.device == "cuda", "as the machine of the offer has it"
    record = load_record(store.root / run)
    assert record is not None
    assert record.order == Order("ship", "cutter", 2, 0.5, 3600)

    until(lambda: state(store, run) in ("finished", "failed"))
    seen = store.view(run, OWNER)
    assert (seen.state, seen.error) == ("finished", "")
    assert [stage.state for stage in seen.stages] == ["done"] * 9 and seen.report is not None
    assert seen.remote == RemoteState(
        "voyage 1", "https://ship.example/1", "cutter", "COMPLETED", 60.0, 0.5
    )
    assert "Voyage on cutter" in view.head(seen) and "$0.50 in all" in view.head(seen)
    assert "search 4" in store.log_tail(run, OWNER)
    assert state(store, here) == "queued", "what is done elsewhere waits for no place here"
    assert RunStore(store.root).view(run, OWNER).executor == "ship"


def test_cancel_sends_its_own_signal(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_TEST_SECONDS", "20")
    run = store.submit(fixtures.CONFIG, OWNER, order=Order("ship", "cutter"))
    until(lambda: state(store, run) == "running" and bool(store.view(run, OWNER).log))
    store.cancel(run, OWNER)
    until(lambda: state(store, run) == "cancelled")
    remote = store.view(run, OWNER).remote
    assert remote is not None and remote.stage == "CANCELED"


def test_a_run_that_nobody_listens_to_is_ended_there(
    store: RunStore, ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_TEST_SECONDS", "20")
    run = store.submit(fixtures.CONFIG, OWNER, order=Order("ship", "cutter"))
    until(lambda: (store.root / run / MACHINE_FILE).exists() or state(store, run) == "")
    record = load_record(store.root / run)
    assert record is not None and record.pid is not None
    os.killpg(record.pid, signal.SIGKILL)
    until(lambda: state(store, run) == "interrupted")
    lost = store.view(run, OWNER)
    assert lost.is_unattended and "may still be running and is billed" in lost.error
    assert "Resume listens to it again" in lost.remedy and "process ended" not in lost.error
    assert "$0.50 when it was last heard of" in view.head(lost)
    with pytest.raises(UsageError, match="may still be running"):
        store.delete(run, OWNER)
    store.cancel(run, OWNER, "a token")
    assert ship.ended == [(run, "a token")] and state(store, run) == "cancelled"


def test_the_page_offers_it(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers_module, "estimate", lambda config, *_: ask(config))
    monkeypatch.setattr(handlers_module, "known_plan", lambda config, token: ask(config))
    handlers = Handlers(store, Visitors(b"k"), on_space=False, sign_in=False)
    *_, last = handlers.preview(RunForm("a/b", machine="ship:cutter"), "", ME)
    html = last.html
    assert '<tr class="ours"><th scope="row">Voyage: cutter' in html and "$0.50" in html
    with pytest.raises(QuantkitError, match="does not fit on 'galleon'"):
        handlers.start(RunForm("a/b", machine="ship:galleon"), "", ME)
    with pytest.raises(UsageError, match="There is no 'boat'"):
        handlers.start(RunForm("a/b", machine="boat:x"), "", ME)
    app = json.dumps(build_app(store, Visitors(b"k")).get_config_file(), default=str)
    assert "On a ship" in app


def test_what_it_knows_is_taken_in(store: RunStore, ship: Ship) -> None:
    store.root.mkdir()
    assert adopt(store.root, OWNER, ship, ship.found("")) == ("run-of-a-voyage",)
    seen = store.view("run-of-a-voyage", OWNER)
    assert (seen.executor, seen.machine, seen.state) == ("ship", "cutter", "interrupted")
    assert "found again by its Voyage" in seen.error


@pytest.mark.parametrize(("machine", "executor"), [(None, "local"), ("cpu-upgrade", "hf_jobs")])
def test_records_of_before_executors_had_names(
    tmp_path: Path, machine: str | None, executor: str
) -> None:
    old = {"owner": owner_hash(OWNER), "created": 1.7e9, "phase": "started", "machine": machine}
    (tmp_path / "job.json").write_text(json.dumps(old))
    record = load_record(tmp_path)
    assert record is not None and record.executor == executor
    with pytest.raises(Damaged):
        RunRecord(None, 1.7e9, executor="airship")


@pytest.mark.parametrize(
    ("word", "executor", "machine"),
    [
        ("here", "local", "auto"),
        ("auto", "hf_jobs", "auto"),
        ("t4-small", "hf_jobs", "t4-small"),
        ("hf_jobs", "hf_jobs", "auto"),
        ("hf_jobs:h200", "hf_jobs", "h200"),
    ],
)
def test_what_the_api_calls_a_machine(word: str, executor: str, machine: str) -> None:
    found, name = registry.asked(word)
    assert (found.name, name) == (executor, machine)


def test_only_the_registry_knows_which_there_are() -> None:
    """So another one is its file and a row."""
    inside = "quantkit.server.executors.hf_jobs"
    for package, known in (
        (inside, set()),
        ("quantkit.server.executors.local", {f"{inside}.in_job"}),
    ):
        knows = {
            module_of(path)
            for path in OURS
            if any(f"{name}.".startswith(f"{package}.") for name in imports(path))
        }
        outside = {name for name in knows if not f"{name}.".startswith(f"{package}.")}
        assert outside == {"quantkit.server.executors.registry", *known}


def test_a_run_is_a_run() -> None:
    """Jobs are Hugging Face's; the API and what lies on disk keep the names that they have."""
    kept = {"start_job", "job_status", "cancel_job", "job_id", "job", "jobs", "hf_jobs"}
    kept |= {"list_jobs", "resume_job", "publish_job", "share_job"}
    for path in OURS:
        name = short(path)
        if name.startswith("quantkit/server/") and "/hf_jobs/" not in name:
            words = {n.id for n in walk(tree(path)) if isinstance(n, ast.Name)}
            words |= {n.arg for n in walk(tree(path)) if isinstance(n, ast.arg)}
            words |= {n.attr for n in walk(tree(path)) if isinstance(n, ast.Attribute)}
            words |= {getattr(n, "name", "") for n in walk(tree(path)) if hasattr(n, "body")}
            named = {str(word) for word in words if "job" in str(word).lower()}
            allowed = {
                "quantkit/server/web/api.py": kept,
                "quantkit/server/executors/protocol.py": {"job"},
                "quantkit/server/executors/registry.py": {"HfJobs", "HF_JOBS"},
            }
            assert named <= allowed.get(name, set()), (name, named)
