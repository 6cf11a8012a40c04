"""The launcher: states from what lies on disk, the queue, real worker processes, what is refused.

    pytest tests/server/test_launch.py

Workers are `tests/support/app_fixtures.py`, a real process that takes the run's lock and writes
real events; the slow test runs the pipeline itself on a tiny model.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import app_fixtures as fixtures
import hub_server
import pytest

from quantkit.errors import UsageError
from quantkit.run.events import EventLog
from quantkit.server.executors import local, process
from quantkit.server.runs.limits import Limits
from quantkit.server.runs.record import NoSuchRun, load_record, new_run_id, run_folder
from quantkit.server.runs.request import RunForm, to_config
from quantkit.server.runs.store import RunStore, is_public, open_store

until = fixtures.patience(300.0)

ALICE, MALLORY = "visitor:alice", "visitor:mallory"
WORKER = (sys.executable, fixtures.__file__)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunStore]:
    """A store whose workers are the test worker."""
    monkeypatch.setattr(local, "COMMAND", WORKER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    monkeypatch.setenv("QUANTKIT_TEST_SECONDS", "0.05")
    made = RunStore(tmp_path / "runs")
    yield made
    made.close()
    fixtures.kill_workers(made.root)


def state(store: RunStore, run_id: str) -> str:
    store.tick()
    return store.view(run_id, ALICE).state


def test_a_run_goes_to_its_end(store: RunStore) -> None:
    run_id = store.submit(fixtures.CONFIG, ALICE)
    queued = store.view(run_id, ALICE)
    assert (queued.state, queued.position) == ("queued", 1)
    assert [stage.state for stage in queued.stages] == ["waiting"] * 9
    until(lambda: state(store, run_id) == "finished")
    view = store.view(run_id, ALICE)
    assert [stage.state for stage in view.stages] == ["done"] * 9
    assert view.report is not None and view.files[0].name == fixtures.GGUF
    assert len(view.curve) == 5 and view.curve[-1].kl == pytest.approx(0.004)
    assert "search 4" in store.log_tail(run_id, ALICE)


def test_a_visitor_takes_no_more_places_by_resuming(tmp_path: Path) -> None:
    store = RunStore(tmp_path, public=True)
    store.limits = Limits(active_per_owner=2)
    runs = []
    for _ in range(3):
        runs.append(store.submit(fixtures.CONFIG, ALICE))
        store.cancel(runs[-1], ALICE)
    store.resume(runs[0], ALICE)
    store.resume(runs[1], ALICE)
    with pytest.raises(UsageError, match="waiting or running"):
        store.resume(runs[2], ALICE)
    assert store.view(runs[2], ALICE).state == "cancelled"


def test_the_queue_runs_one_after_the_other(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_TEST_SECONDS", "0.5")
    first, second, third = (store.submit(fixtures.CONFIG, ALICE) for _ in range(3))
    store.tick()
    assert state(store, first) == "running"
    assert [store.view(j, ALICE).position for j in (second, third)] == [1, 2]
    store.cancel(second, ALICE)
    assert store.view(second, ALICE).state == "cancelled"
    assert store.view(third, ALICE).position == 1
    until(lambda: state(store, third) == "running")
    assert state(store, first) == "finished"


def test_cancel_ends_the_worker_and_resume_goes_on(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_TEST_SECONDS", "0.3")
    run_id = store.submit(fixtures.CONFIG, ALICE)
    until(lambda: state(store, run_id) == "running" and bool(store.view(run_id, ALICE).log))
    until(lambda: store.view(run_id, ALICE).stages[0].state == "done")
    record = load_record(store.root / run_id)
    assert record is not None and record.pid is not None
    store.cancel(run_id, ALICE)
    until(lambda: not process.is_alive(record.pid, record.pid_started))
    assert state(store, run_id) == "cancelled"
    monkeypatch.setenv("QUANTKIT_TEST_SECONDS", "0.01")
    store.resume(run_id, ALICE)
    until(lambda: state(store, run_id) == "finished")
    skipped = [line.stage for line in store.view(run_id, ALICE).log if line.kind == "skipped"]
    assert skipped[:1] == ["fetch"]


def test_a_killed_worker_is_seen_and_resumed(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_TEST_SECONDS", "0.5")
    run_id = store.submit(fixtures.CONFIG, ALICE)
    until(lambda: state(store, run_id) == "running" and bool(store.view(run_id, ALICE).log))
    record = load_record(store.root / run_id)
    assert record is not None and record.pid is not None
    os.killpg(record.pid, signal.SIGKILL)
    until(lambda: state(store, run_id) == "interrupted")
    view = store.view(run_id, ALICE)
    assert "cut off" in view.error and view.can_resume
    monkeypatch.setenv("QUANTKIT_TEST_SECONDS", "0.01")
    store.resume(run_id, ALICE)
    until(lambda: state(store, run_id) == "finished")


@pytest.mark.slow
def test_another_server_takes_over(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that comes back finds the running job and starts the waiting one."""
    monkeypatch.setenv("QUANTKIT_TEST_SECONDS", "0.2")
    running, waiting = store.submit(fixtures.CONFIG, ALICE), store.submit(fixtures.CONFIG, ALICE)
    with_token = store.submit(fixtures.CONFIG, ALICE, token="hf_secret")
    store.tick()
    other = RunStore(store.root)
    other.tick()  # the first one still holds the scheduler's lock
    assert other.view(waiting, ALICE).state == "queued"
    store.close()
    assert other.view(running, ALICE).state == "running"
    until(lambda: state(other, waiting) == "finished")
    assert other.view(running, ALICE).state == "finished"
    until(lambda: state(other, with_token) == "interrupted")
    assert "sign" in other.view(with_token, ALICE).error
    other.close()


def test_a_token_is_in_no_file(store: RunStore) -> None:
    token = "hf_onlyInMemory"
    run_id = store.submit(fixtures.CONFIG, ALICE, token=token)
    until(lambda: state(store, run_id) == "finished")
    assert "a token is there" in [line.text for line in store.view(run_id, ALICE).log]
    written = [path for path in store.root.rglob("*") if path.is_file()]
    assert written and not any(token.encode() in path.read_bytes() for path in written)
    assert token not in repr(store.view(run_id, ALICE))


def test_nobody_reaches_the_run_of_another(store: RunStore) -> None:
    fixtures.own(fixtures.write_run(store.root / "hers"), ALICE)
    for refused in (
        lambda who: store.view("hers", who),
        lambda who: store.log_tail("hers", who),
        lambda who: store.cancel("hers", who),
        lambda who: store.resume("hers", who),
        lambda who: store.delete("hers", who),
        lambda who: store.publish("hers", who, "a/b", "model", None),
        lambda who: store.result_path("hers", fixtures.GGUF, who),
    ):
        for who in (MALLORY, None, ""):
            with pytest.raises(NoSuchRun):
                refused(who)
    assert store.runs(MALLORY) == () and len(store.runs(ALICE)) == 1
    assert store.result_path("hers", fixtures.GGUF, ALICE).is_file()


@pytest.mark.parametrize(
    "run_id",
    ["", ".", "..", "../x", "a/b", "/etc", "a\x00b", "x" * 101, ".secret", None, 3, ["a"], "Ω"],
)
def test_an_id_never_leaves_the_root(store: RunStore, run_id: object) -> None:
    (store.root.parent / "x").mkdir()
    (store.root / ".secret").mkdir(parents=True)
    with pytest.raises(NoSuchRun):
        store.view(run_id, ALICE)


@pytest.mark.parametrize("name", ["", "..", "../config.json", "config.json", "job.json", "a/b"])
def test_only_results_are_served(store: RunStore, name: str) -> None:
    fixtures.own(fixtures.write_run(store.root / "hers"), ALICE)
    with pytest.raises(NoSuchRun):
        store.result_path("hers", name, ALICE)


def test_a_link_is_no_run(store: RunStore) -> None:
    outside = fixtures.write_run(store.root.parent / "outside")
    store.root.mkdir(exist_ok=True)
    (store.root / "link").symlink_to(outside)
    assert store.runs(ALICE) == ()
    with pytest.raises(NoSuchRun):
        store.view("link", ALICE)


def test_runs_of_the_command_line_show_on_a_private_page_only(store: RunStore) -> None:
    fixtures.write_run(store.root / "demo")
    assert [run.id for run in store.runs(ALICE)] == ["demo"]
    assert store.view("demo", None).is_local
    with pytest.raises(UsageError):
        store.delete("demo", ALICE)
    public = RunStore(store.root, public=True)
    assert public.runs(ALICE) == ()
    with pytest.raises(NoSuchRun):
        public.view("demo", ALICE)


def test_a_run_of_the_command_line_is_seen_running(store: RunStore) -> None:
    folder = fixtures.write_run(store.root / "cli", until="search", share=0.5, outcome=None)
    assert store.view("cli", ALICE).state == "interrupted"
    hold = "import sys,time;from pathlib import Path;from quantkit.run.folder import RunDir\n"
    hold += "with RunDir(Path(sys.argv[1])).lock(): print('held', flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", hold, folder], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline()
        assert store.view("cli", ALICE).state == "running"
    finally:
        child.kill()
        child.wait()
    assert store.view("cli", ALICE).state == "interrupted"


def test_of_a_mix_only_types_are_taken(store: RunStore) -> None:
    best = fixtures.write_run(store.root / "cli") / "5-search" / "best.json"
    assert "Q6_K" in (store.view("cli", ALICE).allocation or {}).values()
    best.write_text('{"x": 3, "y": {"qtype": null}, "z": {"qtype": "Q4_K"}}')
    assert store.view("cli", ALICE).allocation == {"z": "Q4_K"}


def test_a_worker_that_dies_before_its_first_event_tells_why(store: RunStore) -> None:
    run_id = store.submit(fixtures.CONFIG, ALICE)
    config = store.root / run_id / "config.json"
    config.write_text(config.read_text().replace('"standard"', '"demo"'))
    (store.root / run_id / "log.txt").write_text("x\nquantkit: It holds another run. Do this.\n")
    fixtures.own(store.root / run_id, ALICE, "started", pid=2**22 + 1, pid_started="1")
    view = store.view(run_id, ALICE)
    assert (view.state, view.error) == ("failed", "It holds another run. Do this.")


def test_a_failure_is_shown_with_its_remedy(store: RunStore) -> None:
    run_id = store.submit(dataclasses.replace(fixtures.CONFIG, seed=13), ALICE)
    until(lambda: state(store, run_id) == "failed")
    view = store.view(run_id, ALICE)
    assert (view.error, view.remedy) == ("Not enough <b>disk</b>.", "Free 3 GB.")
    assert view.current == "calibrate"


@pytest.mark.slow
def test_publishing_queues_the_finished_run_again(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = store.submit(fixtures.CONFIG, ALICE)
    until(lambda: state(store, run_id) == "finished")
    with hub_server.running_hub(monkeypatch, tmp_path) as hub:
        for name, value in hub.env.items():
            monkeypatch.setenv(name, value)
        store.publish(run_id, ALICE, "alice/model", "private", hub_server.ALICE)
        assert store.view(run_id, ALICE).publish_to == "alice/model"
        until(lambda: state(store, run_id) == "finished")
    assert "a token is there" in [line.text for line in store.view(run_id, ALICE).log]


def test_deleting_removes_the_folder(store: RunStore) -> None:
    run_id = store.submit(fixtures.CONFIG, ALICE)
    store.delete(run_id, ALICE)
    assert store.runs(ALICE) == () and not (store.root / run_id).exists()


def test_limits(tmp_path: Path) -> None:
    public = RunStore(tmp_path, Limits(active_per_owner=2), public=True)
    for _ in range(2):
        public.submit(fixtures.CONFIG, ALICE)
    with pytest.raises(UsageError, match="2 runs"):
        public.submit(fixtures.CONFIG, ALICE)
    public.submit(fixtures.CONFIG, MALLORY)
    full = RunStore(tmp_path, Limits(min_free_bytes=2**62))
    with pytest.raises(UsageError, match="full"):
        full.submit(fixtures.CONFIG, ALICE)


def test_damaged_folders_do_not_take_the_list_down(store: RunStore) -> None:
    broken = fixtures.own(fixtures.write_run(store.root / "broken"), ALICE)
    (broken / "events.jsonl").write_bytes(b'{"time": 1}\n\xff\n')
    for name in ("manifest.json", "8-validate/report.json", "5-search/best.json"):
        (broken / name).write_text("{")
    no_config = fixtures.own(fixtures.write_run(store.root / "none"), ALICE)
    (no_config / "config.json").write_text('{"model": 3}')
    view = store.view("broken", ALICE)
    assert view.report is None and view.files == ()
    states = {run.id: run.state for run in store.runs(ALICE)}
    assert states == {"broken": "interrupted", "none": "damaged"}
    shown = store.view("none", ALICE)
    assert "config.json" in shown.error and shown.can_delete and not shown.can_resume
    with pytest.raises(UsageError, match="config.json"):
        store.resume("none", ALICE)
    store.delete("none", ALICE)
    assert [run.id for run in store.runs(ALICE)] == ["broken"]


def test_environment_opens_the_store(tmp_path: Path) -> None:
    store = open_store({"QUANTKIT_RUNS": str(tmp_path), "QUANTKIT_WORKERS": "3"})
    assert (store.root, store.limits.workers, store.public) == (tmp_path, 3, False)
    assert open_store({"SYSTEM": "spaces"}).public and is_public({"QUANTKIT_PUBLIC": "1"})
    with pytest.raises(UsageError):
        open_store({"QUANTKIT_WORKERS": "many"})


def test_ids_cannot_be_guessed() -> None:
    ids = {new_run_id() for _ in range(300)}
    assert len(ids) == 300 and all(len(i) >= 20 and i[0] not in "-_." for i in ids)


def test_run_folder_takes_plain_names(tmp_path: Path) -> None:
    (tmp_path / "SmolLM2-1.7B").mkdir()
    assert run_folder(tmp_path, "SmolLM2-1.7B").name == "SmolLM2-1.7B"


def test_reading_is_incremental(store: RunStore) -> None:
    folder = fixtures.own(
        fixtures.write_run(store.root / "hers", until="search", share=0.5, outcome=None), ALICE
    )
    before = len(store.view("hers", ALICE).curve)
    follower = store._followers["hers"]
    offset = follower._offset
    EventLog(folder / "events.jsonl").emit(
        "search", "progress", "", done=1, total=2, generation=99, kl=0.001, stderr=0.0
    )
    assert len(store.view("hers", ALICE).curve) == before + 1
    assert follower._offset > offset


def test_a_list_of_many_runs_opens_no_file_twice(store: RunStore) -> None:
    for number in range(50):
        fixtures.own(fixtures.write_run(store.root / f"job{number}"), ALICE)
    with fixtures.opened_files(store.root) as opened:
        store.runs(ALICE)
        assert len(opened) >= 50
        opened.clear()
        assert len(store.runs(ALICE)) == 50
    assert opened == []


@pytest.mark.slow
def test_the_real_pipeline(tmp_path: Path) -> None:
    """A tiny model through `python -m quantkit resume` as the server starts it."""
    from tiny_models import tiny_llama

    model = tiny_llama(tmp_path / "tiny", hidden_size=256, intermediate_size=512)
    store = RunStore(tmp_path / "runs")
    form = RunForm(str(model), profile="demo", calibration="builtin", levels=("Q4_K", "Q6_K"))
    run_id = store.submit(to_config(form, public=False), ALICE)
    until(lambda: state(store, run_id) not in ("queued", "running"), 480)
    view = store.view(run_id, ALICE)
    assert (view.state, view.error) == ("finished", "")
    assert view.report is not None and view.files[0].name == "tiny-EVO-Q4_K_M.gguf"
    assert store.result_path(run_id, view.files[0].name, ALICE).read_bytes()[:4] == b"GGUF"
    store.close()
