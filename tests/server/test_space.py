"""A deployed Space: what the deploy script pushes, what outlives the machine, who is signed in.

pytest tests/server/test_space.py
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from http.client import HTTPConnection
from http.cookies import SimpleCookie
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import app_fixtures as fixtures
import pytest
from hub_jobs import Job
from hub_server import ALICE, BOB, SECRETS, HubServer, running_hub
from itsdangerous import TimestampSigner

from quantkit.errors import QuantkitError, UsageError
from quantkit.hub import jobs
from quantkit.server.executors import local
from quantkit.server.executors.hf_jobs.executor import app_labels
from quantkit.server.executors.protocol import Order
from quantkit.server.executors.registry import HF_JOBS
from quantkit.server.runs.adopt import adopt
from quantkit.server.runs.limits import CLEAN, DELETE, Limits, what_is_due
from quantkit.server.runs.mirror import Mirror, state_folder
from quantkit.server.runs.record import load_record
from quantkit.server.runs.store import RunStore
from quantkit.server.web.first_run import SIGN_IN
from quantkit.server.web.page import build_app
from quantkit.server.web.visitor import Visitors
from quantkit.tensors import to_json

ROOT = Path(__file__).parents[2]
ALICE_OWNS, MALLORY_OWNS = "hf:alice", "hf:mallory"


def load_deploy() -> Any:
    """spaces/deploy.py, which is no module of anything."""
    spec = importlib.util.spec_from_file_location("deploy", ROOT / "spaces" / "deploy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["deploy"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running_hub(monkeypatch, tmp_path) as server:
        yield server


# The deploy script.


@pytest.mark.slow
def test_the_dry_run_shows_exactly_what_is_pushed(hub: HubServer, tmp_path: Path) -> None:
    deploy = load_deploy()
    done = subprocess.run(
        [sys.executable, "spaces/deploy.py", "--space", "alice/quantkit", "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = re.findall(r"^([0-9a-f]{12}) +[\d,]+  (\S+)$", done.stdout, re.MULTILINE)
    shown = {path: sha256 for sha256, path in lines}
    assert {"app.py", "README.md", "requirements.txt", "LICENSE"} <= shown.keys()
    assert (
        "quantkit/server/web/style.css" in shown and "quantkit_gguf-0.1.0-py3-none-any.whl" in shown
    )
    assert not [path for path in shown if path.startswith(("spaces/", "tests/", "dev/", "."))]
    assert not hub.repos

    hub.add_model("alice/quantkit", {"quantkit/old.py": "x", "mine.txt": "x"}, kind="space")
    deploy.stage(tmp_path / "stage")
    n_commits = len(hub.repos["space", "alice/quantkit"].commits)
    deploy.push(tmp_path / "stage", "alice/quantkit", "gradio", False, None, ALICE)
    repo = hub.repos["space", "alice/quantkit"]
    assert len(repo.commits) == n_commits + 1
    pushed = {p: hashlib.sha256(b.data).hexdigest()[:12] for p, b in repo.head.files.items()}
    assert pushed.pop("mine.txt"), "what others put there is gone"
    assert pushed == shown
    assert "volumes" not in repo.extra
    deploy.push(tmp_path / "stage", "alice/quantkit", "gradio", False, "alice/state", ALICE)
    (volume,) = repo.extra["volumes"]  # of a Space that was there before
    assert (volume["source"], volume["mountPath"]) == ("alice/state", "/data")


@pytest.mark.parametrize(
    ("space", "token", "said"),
    [
        ("alice/quantkit", None, "needs a token"),
        ("alice/quantkit", SECRETS[3], "does not accept this token"),
        ("quantkit", ALICE, "quantkit is not an owner and a name. Write USER/NAME."),
        ("alice/quant kit", ALICE, "is not a model's id"),
        ("bob/quantkit", ALICE, "belongs to alice, who cannot publish under bob"),
    ],
)
def test_what_cannot_be_pushed_is_said_first(
    space: str,
    token: str | None,
    said: str,
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It was a traceback, after the list of all files."""
    deploy = load_deploy()
    monkeypatch.setattr(deploy, "resolve_token", lambda: token)
    assert deploy.main(["--space", space]) == 2
    out, err = capsys.readouterr()
    assert not out and said in err and len(err.splitlines()) == 1, err


def test_a_refused_push_is_a_sentence(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where the Hub wants a paid plan for a Space."""
    deploy = load_deploy()
    monkeypatch.setattr(deploy, "resolve_token", lambda: ALICE)
    monkeypatch.setattr(deploy, "stage", lambda folder, docker: folder.mkdir())
    hub.fail_next("/api/repos/create", 402, times=9)
    assert deploy.main(["--space", "alice/quantkit"]) == 1
    assert "The Hub requires payment for this." in capsys.readouterr().err


@pytest.mark.slow
def test_the_wheel_holds_what_a_job_runs(tmp_path: Path) -> None:
    deploy = load_deploy()
    deploy.stage(tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        needs = archive.read(metadata).decode()
    wanted = {
        "quantkit/server/executors/hf_jobs/in_job.py",
        "quantkit/server/web/style.css",
        "evaluators/kl.py",
    }
    assert wanted | {"quantkit/data/commit.txt"} <= names
    sources = {path for path in deploy.tracked(("quantkit",)) if path.endswith(".py")}
    assert sources <= names, f"pyproject.toml leaves out {sorted(sources - names)}"
    assert "Requires-Dist: llama-cpp-python==" in needs


def test_card_and_requirements() -> None:
    deploy = load_deploy()
    card, docker = deploy.card(False), deploy.card(True)
    assert f"sdk_version: {deploy.gradio_version()}" in card and f"\n{SIGN_IN}" in docker
    scopes = re.findall(r"^- ([a-z-]+)$", card.split("hf_oauth_scopes:")[1].split("tags:")[0], re.M)
    assert scopes[:3] == ["gated-repos", "contribute-repos", "jobs"]
    assert not {"write-repos", "manage-repos", "read-repos", "email"} & set(scopes)
    assert "sdk: docker\napp_port: 7860" in docker and "sdk_version" not in docker
    pinned = (ROOT / "requirements.txt").read_text("utf-8").strip()
    assert pinned in deploy.requirements() and "whl/cpu" in deploy.requirements()


# What outlives the machine.


def test_another_machine_finds_the_runs(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "old", public=True)
    fixtures.own(fixtures.write_run(store.root / "done"), ALICE_OWNS)
    fixtures.own(
        fixtures.write_run(store.root / "half", until="search", share=0.4, outcome=None), ALICE_OWNS
    )
    fixtures.write_run(store.root / "local")
    waiting = store.submit(fixtures.CONFIG, ALICE_OWNS, ALICE)
    (store.root / ".secret").write_bytes(b"s" * 32)
    mirror = Mirror(store.root, tmp_path / "bucket")
    mirror.keep()
    for path in (tmp_path / "bucket").rglob("*"):
        assert not path.is_file() or ALICE.encode() not in path.read_bytes(), path
    assert not (tmp_path / "bucket/runs/done/7-stitch" / fixtures.GGUF).exists()

    assert Mirror(tmp_path / "new", tmp_path / "bucket").restore() == 3
    new = RunStore(tmp_path / "new", public=True)
    done = new.view("done", ALICE_OWNS)
    assert done.state == "finished" and done.report and done.can_publish
    assert new.result_path("done", fixtures.GGUF, ALICE_OWNS).read_bytes()[:4] == b"GGUF"
    assert new.view("half", ALICE_OWNS).can_resume
    new.tick()
    forgotten = new.view(waiting, ALICE_OWNS)
    assert forgotten.state == "interrupted" and "sign in" in forgotten.error
    assert (tmp_path / "new/.secret").stat().st_mode & 0o077 == 0
    # What is deleted here is deleted there.
    store.delete("done", ALICE_OWNS)
    mirror.keep()
    assert not (tmp_path / "bucket/runs/done").exists()


def test_where_the_state_is_kept(tmp_path: Path) -> None:
    assert state_folder({"QUANTKIT_DATA": str(tmp_path)}) == tmp_path
    assert state_folder({}) is None


def test_runs_are_found_again_by_their_jobs(hub: HubServer, tmp_path: Path) -> None:
    """Nothing was kept at all: the visitor's own Jobs still know the runs."""
    hub.jobs.command = [sys.executable, "-c", "print('hello')"]
    config = json.dumps(to_json(fixtures.CONFIG))
    asked = Order("hf_jobs", "cpu-basic", 2, 0.01, 1800, {"fetch": 60})
    labels, environment = app_labels({}), {"QUANTKIT_CONFIG": config}
    order = jobs.JobOrder("x", ("true",), "cpu-basic", 60, labels, environment)
    told = {**environment, "QUANTKIT_ORDER": json.dumps(to_json(asked))}
    jobs.start(dataclasses.replace(order, environment=told), "run-of-alice", ALICE)
    for name, said in (("of-before", {}), ("lies", {"QUANTKIT_ORDER": '{"hours": -1}'})):
        jobs.start(dataclasses.replace(order, environment={**environment, **said}), name, ALICE)
    jobs.start(jobs.JobOrder("x", ("y",), "cpu-basic", 60, labels, {}), "no-config", ALICE)
    jobs.start(order, "../evil", ALICE)
    fixtures.own(fixtures.write_run(tmp_path / "theirs"), MALLORY_OWNS)
    jobs.start(order, "theirs", ALICE)
    found = HF_JOBS.found(ALICE)
    assert set(adopt(tmp_path, ALICE_OWNS, HF_JOBS, found)) == {"run-of-alice", "of-before"}
    record, older = load_record(tmp_path / "run-of-alice"), load_record(tmp_path / "of-before")
    assert record is not None and record.order == asked, "its limit, price and estimate"
    assert older is not None and older.order == Order("hf_jobs", "cpu-basic")
    store = RunStore(tmp_path, public=True)
    run = store.view("run-of-alice", ALICE_OWNS)
    assert run.can_resume and "found again" in run.error and run.machine == "cpu-basic"
    assert jobs.runs(labels, BOB) == ()
    record = load_record(tmp_path / "theirs")
    assert record is not None and record.machine is None  # not taken over
    assert adopt(tmp_path, ALICE_OWNS, HF_JOBS, found) == ()


def lost_job(hub: HubServer, root: Path) -> tuple[RunStore, Job]:
    """A Job that nobody here listens to any more, and its run."""
    hub.jobs.command = [sys.executable, "-c", "import time; time.sleep(600)"]
    labels = app_labels({})
    environment = {"QUANTKIT_CONFIG": json.dumps(to_json(fixtures.CONFIG))}
    jobs.start(jobs.JobOrder("x", ("true",), "cpu-basic", 60, labels, environment), "lost", ALICE)
    (job,) = hub.jobs.all.values()
    store = RunStore(root, public=True)
    assert adopt(store.root, ALICE_OWNS, HF_JOBS, HF_JOBS.found(ALICE)) == ("lost",)
    return store, job


def test_the_page_cancels_a_lost_job_with_the_sign_in(hub: HubServer, tmp_path: Path) -> None:
    store, job = lost_job(hub, tmp_path)
    app = build_app(store, Visitors(b"k"))
    button = next(b._id for b in app.blocks.values() if getattr(b, "elem_id", "") == "cancel")
    (cancel,) = [f for f in app.fns.values() if (button, "click") in f.targets]
    asks = SimpleNamespace(client=None, cookies={})
    cancel.fn(asks, SimpleNamespace(username="alice"), SimpleNamespace(token=ALICE), "lost", {}, "")
    assert job.stage == "CANCELED" and store.view("lost", ALICE_OWNS).state == "cancelled"


def test_a_lost_job_is_ended_before_its_run_is_deleted(hub: HubServer, tmp_path: Path) -> None:
    """It is paid for; and what was deleted does not come back, whatever the Hub still lists."""
    store, job = lost_job(hub, tmp_path / "a")
    mirror = Mirror(tmp_path / "a", tmp_path / "b")
    run = store.view("lost", ALICE_OWNS)
    assert run.can_cancel and run.can_resume and not run.can_delete
    with pytest.raises(UsageError, match="may still be running"):
        store.delete("lost", ALICE_OWNS)
    with pytest.raises(QuantkitError, match="nobody is signed in"):
        store.cancel("lost", ALICE_OWNS)
    assert job.stage != "CANCELED" and store.view("lost", ALICE_OWNS).can_cancel
    store.cancel("lost", ALICE_OWNS, ALICE)
    assert job.stage == "CANCELED" and store.view("lost", ALICE_OWNS).state == "cancelled"
    store.delete("lost", ALICE_OWNS)
    assert adopt(store.root, ALICE_OWNS, HF_JOBS, HF_JOBS.found(ALICE)) == ()
    mirror.keep()
    Mirror(tmp_path / "c", tmp_path / "b").restore()  # another machine
    assert adopt(tmp_path / "c", ALICE_OWNS, HF_JOBS, HF_JOBS.found(ALICE)) == ()


# Rules.


def test_old_runs_go_by_rule(tmp_path: Path) -> None:
    store = RunStore(tmp_path, public=True)
    fixtures.own(fixtures.write_run(tmp_path / "done"), ALICE_OWNS)
    fixtures.own(
        fixtures.write_run(tmp_path / "half", until="search", share=0.4, outcome=None), ALICE_OWNS
    )
    fixtures.write_run(tmp_path / "local")
    store.submit(fixtures.CONFIG, ALICE_OWNS)
    limits, now, day = Limits(clean_after_hours=24, keep_days=14), time.time(), 86400
    due = {
        days: {
            follower.folder.name: what_is_due(follower, limits, now + days * day, False)
            for follower in store._scan().values()
        }
        for days in (0, 2, 15)
    }
    assert set(due[0].values()) == {None}
    assert (due[2]["done"], due[2]["half"], due[2]["local"]) == (CLEAN, None, None)
    assert (due[15]["done"], due[15]["half"], due[15]["local"]) == (DELETE, DELETE, None)


def test_a_run_takes_no_longer_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "COMMAND", (sys.executable, fixtures.__file__))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    monkeypatch.setenv("QUANTKIT_TEST_SECONDS", "20")
    store = RunStore(tmp_path, Limits(seconds=1), public=True)
    run = store.submit(fixtures.CONFIG, ALICE_OWNS)

    def is_ended() -> bool:
        store.tick()
        return store.view(run, ALICE_OWNS).state == "interrupted"

    fixtures.patience(300.0)(is_ended)
    assert "longer than" in store.view(run, ALICE_OWNS).error
    store.close()


def test_a_visitor_has_so_much_disk(tmp_path: Path) -> None:
    store = RunStore(tmp_path, Limits(bytes_per_owner=10_000), public=True)
    fixtures.own(fixtures.write_run(tmp_path / "done"), ALICE_OWNS)
    with pytest.raises(Exception, match="Delete one"):
        store.submit(fixtures.CONFIG, ALICE_OWNS)
    store.submit(fixtures.CONFIG, MALLORY_OWNS)


def test_who_waits_is_told_how_long(tmp_path: Path) -> None:
    store = RunStore(tmp_path, public=True)
    first = store.submit(fixtures.CONFIG, ALICE_OWNS, order=Order(estimate_seconds=600))
    second = store.submit(fixtures.CONFIG, ALICE_OWNS, order=Order(estimate_seconds=600))
    assert store.view(first, ALICE_OWNS).wait_seconds is None
    assert store.view(second, ALICE_OWNS).wait_seconds == pytest.approx(600)


# Who is signed in.


def session(secret: str, user: str, token: str, expires: float) -> str:
    """The cookie that Gradio gives a user who came back from signing in."""
    info = {
        "access_token": token,
        "scope": "openid profile jobs",
        "expires_at": int(expires),
        "userinfo": {
            "name": user.title(),
            "preferred_username": user,
            "profile": f"https://huggingface.co/{user}",
            "picture": "",
        },
    }
    data = base64.b64encode(json.dumps({"oauth_info": info}).encode())
    key = hashlib.sha256(f"{secret}-v4".encode()).hexdigest()
    return TimestampSigner(key).sign(data).decode()


@pytest.mark.slow
def test_a_space_with_sign_in(hub: HubServer, tmp_path: Path) -> None:
    """`python app.py` in the clone itself, beside spaces/, as on a Space with OAuth."""
    from test_app import _app, get

    runs = tmp_path / "runs"
    fixtures.own(fixtures.write_run(runs / "hers"), ALICE_OWNS)
    given = {
        **hub.env,
        "OAUTH_CLIENT_ID": "id",
        "OAUTH_CLIENT_SECRET": "client-secret",
        "OAUTH_SCOPES": "openid profile jobs",
        "OPENID_PROVIDER_URL": hub.url(),
        "SPACE_HOST": "a-b.hf.space",
    }
    with _app(ROOT, runs, True, given) as url:
        file = f"{url}files/hers/{fixtures.GGUF}"
        hers = session("client-secret", "alice", ALICE, time.time() + 900)
        assert get(file, Cookie=f"session={hers}")[0] == 200
        refused = [
            session("client-secret", "mallory", BOB, time.time() + 900),
            session("client-secret", "alice", ALICE, time.time() - 5),
            session("another-secret", "alice", ALICE, time.time() + 900),
            "rubbish",
        ]
        for cookie in refused:
            assert get(file, Cookie=f"session={cookie}")[0] == 404
        assert get(file)[0] == 404
        assert b"Sign in with Hugging Face" in get(f"{url}config")[2]
        # Without a sign-in no run is started.
        status = call(url, "start_job", {"model": "a/b"})
        assert "Sign in" in status or "signed in" in status, status


@pytest.mark.slow
def test_the_way_to_the_sign_in(hub: HubServer, tmp_path: Path) -> None:
    """The way to the Hub: its page, back to the Space, least scopes, nowhere else."""
    from test_app import _app

    scopes = re.findall(r"^- ([a-z-]+)$", load_deploy().card(False).partition("tags:")[0], re.M)
    given = {
        **hub.env,
        "OAUTH_CLIENT_ID": "id",
        "OAUTH_CLIENT_SECRET": "client-secret",
        "OAUTH_SCOPES": " ".join(["openid", "profile", *scopes]),
        "OPENID_PROVIDER_URL": hub.url(),
        "SPACE_HOST": "a-b.hf.space",
    }

    def step(url: str, cookies: dict[str, str]) -> tuple[int, str]:
        """Status and target of a request; takes in the cookies that the answer sets."""
        parts = urlsplit(url)
        connection = HTTPConnection(parts.netloc, timeout=120)
        sent = "; ".join(f"{name}={value}" for name, value in cookies.items())
        connection.request("GET", f"{parts.path}?{parts.query}", headers={"Cookie": sent})
        answer = connection.getresponse()
        for value in answer.headers.get_all("set-cookie") or []:
            cookies |= {name: morsel.value for name, morsel in SimpleCookie(value).items()}
        return answer.status, answer.headers.get("location", "")

    with _app(ROOT, tmp_path / "runs", True, given) as url:
        cookies: dict[str, str] = {}
        there = urlsplit(step(f"{url}login/huggingface?_target_url=//evil.example/x", cookies)[1])
        asked = {name: values[0] for name, values in parse_qs(there.query).items()}
        assert f"{there.scheme}://{there.netloc}{there.path}" == f"{hub.url()}/oauth/authorization"
        assert asked["redirect_uri"].startswith("https://a-b.hf.space/login/callback")
        wanted = {"openid", "profile", "gated-repos", "contribute-repos", "jobs"}
        assert set(asked["scope"].split()) == wanted
        back = f"{url}login/callback?{urlsplit(asked['redirect_uri']).query}&code=x&state=forged"
        _, again = step(back, dict(cookies))
        assert again.startswith("/login/huggingface"), "a forged state signs nobody in"
        assert urlsplit(step(f"{url}logout?_target_url=//evil.example/x", {})[1]).netloc == ""


def call(url: str, name: str, data: dict[str, Any]) -> str:
    """What an endpoint answers over plain HTTP."""
    import urllib.request

    request = urllib.request.Request(
        f"{url}gradio_api/call/v2/{name}",
        json.dumps(data).encode(),
        {"Content-Type": "application/json"},
    )
    event = json.loads(urllib.request.urlopen(request, timeout=120).read())["event_id"]
    answer = urllib.request.urlopen(f"{url}gradio_api/call/{name}/{event}", timeout=300)
    return answer.read().decode()
