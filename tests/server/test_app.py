"""The web page over real HTTP: what it is made of, who reaches what, the API, how it starts.

pytest tests/server/test_app.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

import app_fixtures as fixtures
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from quantkit.evidence import report as reports
from quantkit.evidence.report.render import THEMES
from quantkit.run.artifacts import NAMES
from quantkit.server.runs.progress import KlPoint, LogLine
from quantkit.server.runs.store import RunStore
from quantkit.server.runs.view import RunSummary
from quantkit.server.web import charts, results, theme, view, visitor
from quantkit.server.web.page import build_app
from quantkit.server.web.visitor import COOKIE, Visitors

ROOT = Path(__file__).parents[2]
ENDPOINTS = {
    *("estimate", "start_job", "job_status", "cancel_job", "list_jobs"),
    *("resume_job", "publish_job", "share_job"),
}
HOSTILE = "<img src=x onerror=alert(1)>\"'&"


@pytest.fixture
def page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, RunStore, Visitors]]:
    monkeypatch.setenv("QUANTKIT_TEST_SECONDS", "0.05")
    with fixtures.serving(tmp_path / "runs") as served:
        yield served


def get(url: str, cookie: str = "", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (lower case) and body, whatever the status."""
    if cookie:
        headers["Cookie"] = f"{COOKIE}={cookie}"
    request = urllib.request.Request(
        url, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


def test_only_the_documented_endpoints_are_public(tmp_path: Path) -> None:
    app = build_app(RunStore(tmp_path), Visitors(b"k"))
    shown = {fn.api_name for fn in app.fns.values() if fn.api_visibility != "private"}
    assert shown == ENDPOINTS
    names = set(app.get_api_info()["named_endpoints"])
    assert names == {f"/{name}" for name in ENDPOINTS}


def test_stages_have_one_spelling() -> None:
    assert tuple(view.STAGE_ABOUT) == NAMES


def test_cookie_and_headers(page: tuple[str, RunStore, Visitors]) -> None:
    url, _, visitors = page
    status, headers, _ = get(url)
    jar: SimpleCookie = SimpleCookie(headers["set-cookie"])
    assert status == 200 and visitors.check(jar[COOKIE].value)
    assert jar[COOKIE]["httponly"] and jar[COOKIE]["samesite"] == "Lax"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "SAMEORIGIN"
    _, again, _ = get(url, jar[COOKIE].value)
    assert "set-cookie" not in again
    _, forged, _ = get(url, jar[COOKIE].value[:-1] + "0z")
    assert "set-cookie" in forged


def test_the_cookies_of_others_hide_none() -> None:
    """All ports of localhost share them, and what other applications put there is odd at times."""
    for odd in ('prefs={"theme":"dark"}', "bare", "a[0]=1", "x y=z"):
        sent = f"{odd}; {COOKIE}=mine".encode()
        assert visitor.parse_cookies([(b"cookie", sent)], [COOKIE])[COOKIE] == "mine"


def test_keys_are_signed() -> None:
    ours, theirs = Visitors(b"ours"), Visitors(b"theirs")
    key = ours.new_key()
    assert ours.check(key) and theirs.check(key) is None
    for forged in ("", key[1:], key + "0", None, 3, "a.b", "x" * 10_000):
        assert ours.check(forged) is None


def test_the_secret_survives_a_restart(tmp_path: Path) -> None:
    key = Visitors.of_root(tmp_path, {}).new_key()
    assert Visitors.of_root(tmp_path, {}).check(key)
    assert (tmp_path / ".secret").stat().st_mode & 0o077 == 0


def test_downloads_stream_in_ranges_to_their_owner_only(
    page: tuple[str, RunStore, Visitors],
) -> None:
    url, store, visitors = page
    hers, his = visitors.new_key(), visitors.new_key()
    owner = f"visitor:{visitors.check(hers)}"
    folder = fixtures.own(fixtures.write_run(store.root / "hers"), owner)
    file = f"{url}files/hers/{fixtures.GGUF}"
    whole = (folder / "7-stitch" / fixtures.GGUF).read_bytes()
    status, headers, body = get(file, hers)
    assert (status, body) == (200, whole)
    assert fixtures.GGUF in headers["content-disposition"]
    status, headers, body = get(file, hers, Range="bytes=100-299")
    assert (status, body) == (206, whole[100:300])
    assert headers["content-range"] == f"bytes 100-299/{len(whole)}"
    assert get(file, X_Quantkit_Key=hers)[0] == 200
    for refused in (
        get(file),
        get(file, his),
        get(f"{url}files/hers/config.json", hers),
        get(f"{url}files/hers/..%2Fconfig.json", hers),
        get(f"{url}files/..%2Fhers/{fixtures.GGUF}", hers),
        get(f"{url}files/nope/x", hers),
    ):
        assert refused[0] == 404 and b"Traceback" not in refused[2]
    # Nothing of a run is reachable by Gradio's own file route either.
    for path in (
        folder / "config.json",
        store.root / ".secret",
        folder / "7-stitch" / fixtures.GGUF,
    ):
        assert get(f"{url}gradio_api/file={path}", hers)[0] in (403, 404)


def test_api_runs_a_job(page: tuple[str, RunStore, Visitors]) -> None:
    client = Client(page[0], verbose=False)
    job = client.predict("demo:smollm2-135m", profile="demo", api_name="/start_job")
    while True:
        status = client.predict(job["job_id"], job["key"], api_name="/job_status")
        if status["state"] not in ("queued", "running"):
            break
        time.sleep(0.3)
    assert (status["state"], status["error"]) == ("finished", "")
    assert [stage["name"] for stage in status["stages"]] == list(NAMES)
    assert status["report"]["outputs"][0]["n_bytes"] > 0
    assert status["files"][0]["name"] == fixtures.GGUF and status["job_id"] == job["job_id"]
    address = page[0] + status["files"][0]["url"]
    assert get(address, X_Quantkit_Key=job["key"])[2][:4] == b"GGUF"
    listed = client.predict(job["key"], api_name="/list_jobs")
    assert [(one["job_id"], one["state"]) for one in listed] == [(job["job_id"], "finished")]
    shared = client.predict(job["job_id"], key=job["key"], api_name="/share_job")
    assert get(page[0] + shared["url"])[0] == 200
    second = client.predict("demo:smollm2-135m", key=job["key"], api_name="/start_job")
    assert second["key"] == job["key"]
    ended = client.predict(second["job_id"], second["key"], api_name="/cancel_job")
    assert ended["state"] in ("cancelled", "running")


def test_api_errors_are_sentences(page: tuple[str, RunStore, Visitors]) -> None:
    url, store, visitors = page
    owner = f"visitor:{visitors.check(visitors.new_key())}"
    fixtures.own(fixtures.write_run(store.root / "hers"), owner)
    client = Client(url, verbose=False)
    calls: list[tuple[str, dict[str, Any]]] = [
        ("/start_job", {"model": "not a model!"}),
        ("/start_job", {"model": "a/b", "size": "many"}),
        ("/start_job", {"model": "a/b", "profile": "all"}),
        ("/job_status", {"job_id": "hers"}),
        ("/job_status", {"job_id": "hers", "key": visitors.new_key()}),
        ("/job_status", {"job_id": "../hers"}),
        ("/cancel_job", {"job_id": "hers", "key": "forged"}),
        ("/estimate", {"model": "a/b/c/d"}),
    ]
    for name, arguments in calls:
        with pytest.raises(AppError) as caught:
            client.predict(api_name=name, **arguments)
        assert "Traceback" not in str(caught.value) and str(caught.value).endswith(".")


def test_estimate_asks_the_planner(tmp_path: Path) -> None:
    """The planner's refusal of a folder without a model arrives as its own sentence; what it
    refuses does not start.
    """
    (tmp_path / "empty").mkdir()
    with fixtures.serving(tmp_path / "runs", planned=False) as (url, store, _):
        client = Client(url, verbose=False)
        for name in ("/estimate", "/start_job"):
            with pytest.raises(AppError) as caught:
                client.predict(str(tmp_path / "empty"), api_name=name)
        assert store.runs(None) == ()
    assert "empty has no safetensors weights" in str(caught.value)


def test_a_poll_that_finds_nothing_new_opens_nothing(
    page: tuple[str, RunStore, Visitors],
) -> None:
    """Fifty runs, twenty visitors at once. What polls take in time: benchmarks/page.py."""
    url, store, visitors = page
    key = visitors.new_key()
    owner = f"visitor:{visitors.check(key)}"
    for number in range(50):
        fixtures.own(fixtures.write_run(store.root / f"job{number}"), owner)
    config = json.loads(get(f"{url}config")[2])
    ticks = [d for d in config["dependencies"] if d["targets"] and d["targets"][0][1] == "tick"]
    answered: list[int] = []

    def poll(number: int) -> None:
        body = {"data": [None, None], "fn_index": ticks[0]["id"], "session_hash": f"s{number}"}
        request = urllib.request.Request(
            f"{url}gradio_api/run/predict",
            json.dumps(body).encode(),
            fixtures.page_headers(url, visitors, key),
        )
        answered.append(len(urllib.request.urlopen(request, timeout=120).read()))

    with fixtures.opened_files(store.root) as opened:
        poll(0)
        assert any(path.endswith("events.jsonl") for path in opened)  # the runs were new to it
        opened.clear()
        threads = [threading.Thread(target=poll, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answered) == 21 and min(answered) > 0
    assert opened == []


def test_all_text_is_escaped() -> None:
    """What comes from models, events and users never becomes markup."""
    log = (LogLine(1.0, "fetch", "note", HOSTILE), LogLine(1.0, None, HOSTILE, HOSTILE))
    job = _replace(
        _view(),
        model=f"a/{HOSTILE}",
        revision=HOSTILE,
        target=HOSTILE,
        state="failed",
        error=HOSTILE,
        remedy=HOSTILE,
        log=log,
        files=(_file(HOSTILE),),
        published_url=f"https://x/{HOSTILE}",
    )
    summary = RunSummary("id", HOSTILE, HOSTILE, HOSTILE, "running", 1.0, current=HOSTILE)
    report = fixtures.make_report()
    report["baselines"][0]["name"] = HOSTILE
    report["outputs"][0]["name"] = HOSTILE
    report["calibration"]["note"], report["versions"] = HOSTILE, {HOSTILE: HOSTILE}
    report["texts"], report["protocol"] = {HOSTILE: HOSTILE}, HOSTILE
    allocation = {f"blk.0.{HOSTILE}": HOSTILE, HOSTILE: "Q4_K"}
    finished = _replace(job, state="finished", report=report, allocation=allocation)
    for html in (
        view.head(job),
        view.head(finished),
        view.stages(job),
        view.log(job),
        view.raw_log(HOSTILE),
        view.files(job),
        view.run_list([summary]),
        view.notice(HOSTILE, HOSTILE),
        results.results(finished),
        results.report(finished),
        view.card(_replace(job, card=HOSTILE)),
        view.strip(finished),
    ):
        assert html and "<img" not in html


def test_links_are_only_to_the_web() -> None:
    job = _replace(_view(), state="finished", published_url="javascript:alert(1)")
    assert "javascript" not in view.head(job)


def test_a_report_of_another_kind_is_a_sentence() -> None:
    job = _replace(_view(), report={"schema": 9, "outputs": []})
    assert "cannot be read" in results.report(job) and results.results(job) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (4, "a few seconds left"), (33, "about 30 s left"), (200, "about 3 min left")],
)
def test_time_left(seconds: float | None, text: str) -> None:
    assert view.time_left(seconds) == text


def test_charts_of_little_data() -> None:
    assert charts.kl_curve([]) == "" and charts.kl_curve([KlPoint(0, 1, 0.1, 0.01)]) == ""
    flat = [KlPoint(i, 1000 * i, 0.01, 0.0) for i in range(3)]
    made = json.loads(charts.kl_curve(flat))
    assert made["width"] == "container" and made["usermeta"]["embedOptions"]["renderer"] == "svg"
    assert [datum["kl"] for datum in made["data"]["values"]] == [0.01] * 3
    assert charts.tensor_map({}) == ""


def test_the_plots_of_a_page() -> None:
    """Those of the report; before there is one those of the search, each made once."""
    best = {name: choice["qtype"] for name, choice in fixtures.make_allocation().items()}
    job = _replace(_view(), report=fixtures.make_report(), allocation=best)
    whole = results.plots(job)
    assert list(whole) == list(charts.PLOTS) and all(whole.values())
    assert results.plots(job)["tensor-map"] is whole["tensor-map"]
    curve = [KlPoint(i, 1000 * i, 0.01, 0.0) for i in range(3)]
    early = results.plots(_replace(job, report=None, curve=curve))
    assert [name for name in early if early[name]] == ["convergence", "tensor-map"]
    assert not any(results.plots(_replace(job, report={"schema": 9})).values())


def test_the_page_has_a_rule_for_every_color_of_the_plots() -> None:
    sheet = theme.CSS_PATH.read_text("utf-8")
    for name, plot in charts.of_report(reports.read(fixtures.make_report())).items():
        for role, color in THEMES["light"].items():
            for what in re.findall(rf'"(fill|stroke|color)": "{color}"', plot):
                rules = [f'[{w}="{color}"] {{ {w}: var(--qk-{role})' for w in ("fill", "stroke")]
                wanted = rules if what == "color" else [r for r in rules if what in r]
                assert any(rule in sheet for rule in wanted), (name, role, what)


def test_a_card_is_shown_as_text_with_the_pictures_of_its_run() -> None:
    files = (_file("frontier.png"), dataclasses.replace(_file("domains.png"), is_here=False))
    card = (
        "---\nlicense: mit\n---\n# A <script>alert(1)</script>\n\n![KL](plots/frontier.png)\n"
        "![far](https://evil.example/x.png) ![gone](plots/domains.png) [a](javascript:alert(1))\n"
        "[hub](https://huggingface.co/a/b)\n\n| a | b |\n| --- | ---: |\n| 1 | 2 |\n"
    )
    shown = view.card(_replace(_view(), card=card, files=files))
    assert "license" not in shown and "<script" not in shown and "&lt;script&gt;" in shown
    assert re.findall('src="([^"]*)"', shown) == ["files/id/frontier.png"]
    assert "far" in shown and "gone" in shown and 'href="javascript' not in shown
    assert '<a href="https://huggingface.co/a/b" rel="noopener" target="_blank">' in shown
    assert "<table>" in shown


@pytest.mark.parametrize("expected", [True, False])
def test_a_curve_says_whether_its_kl_is_expected(expected: bool) -> None:
    points = [KlPoint(i, 1000 * i, 0.01 / (i + 1), 0.001, expected) for i in range(3)]
    said = view.curve(_replace(_view(), report=None, curve=points))
    assert "after generation 2" in said
    assert ("as tuning is expected to leave it" in said) == expected


def _view() -> Any:
    from quantkit.server.runs.progress import StageView
    from quantkit.server.runs.view import RunView

    stages = tuple(StageView(name) for name in NAMES)
    return RunView("id", "a/b", "like Q4_K_M", "demo", "queued", 1.0, stages=stages)


def _replace(job: Any, **fields: Any) -> Any:
    return dataclasses.replace(job, **fields)


def _file(name: str) -> Any:
    from quantkit.server.runs.view import ResultFile

    return ResultFile(name, 5, name)


# How it starts.


def test_the_front_end_is_light() -> None:
    """No torch and the like, however it is imported."""
    code = (
        "import sys; sys.path.insert(0, '.'); import app; from quantkit.server.web import server\n"
        "heavy = {'torch', 'transformers', 'llama_cpp', 'datasets', 'accelerate'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("on_space", [True, False])
def test_app_starts_in_the_clone_itself(tmp_path: Path, on_space: bool) -> None:
    """`SYSTEM=spaces SPACE_ID=a/b python app.py`, beside spaces/: Gradio imports a package of that
    name on a Space, and our folder must not answer.
    """
    assert (ROOT / "spaces" / "deploy.py").is_file()
    with _app(ROOT, tmp_path / "runs", on_space) as url:
        status, headers, body = get(url)
        assert status == 200 and b"quantkit" in body
        assert ("x-frame-options" in headers) is not on_space
        assert b"How big should the file be?" in get(f"{url}config")[2]


@pytest.mark.slow
def test_a_wrong_setting_is_a_sentence(tmp_path: Path) -> None:
    environment = {**os.environ, "QUANTKIT_WORKERS": "many", "QUANTKIT_RUNS": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "app.py"], cwd=ROOT, env=environment, capture_output=True, timeout=600
    )
    assert done.returncode == 2 and done.stderr.startswith(b"quantkit: QUANTKIT_WORKERS=many")


class _app:
    """`python app.py` in a folder, on a free port."""

    def __init__(
        self, folder: Path, runs: Path, on_space: bool, given: dict[str, str] | None = None
    ) -> None:
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        environment = {
            **os.environ,
            "GRADIO_SERVER_PORT": str(self._port),
            "QUANTKIT_RUNS": str(runs),
            "HF_HUB_OFFLINE": "1",
        }
        if on_space:
            environment |= {"SYSTEM": "spaces", "SPACE_ID": "a/b"}
        environment |= given or {}
        self._child = subprocess.Popen(
            [sys.executable, "app.py"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> str:
        url = f"http://127.0.0.1:{self._port}/"
        deadline = time.monotonic() + 300
        while True:
            try:
                get(url)
                return url
            except OSError:
                if self._child.poll() is not None or time.monotonic() > deadline:
                    self._child.kill()
                    assert self._child.stdout is not None
                    raise AssertionError(self._child.stdout.read().decode()) from None
                time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        self._child.terminate()
        self._child.wait(120)


@pytest.mark.slow
def test_api_runs_the_real_pipeline(tmp_path: Path) -> None:
    """A tiny local model from `start_job` to the report, by `python app.py` itself."""
    from tiny_models import tiny_llama

    model = tiny_llama(tmp_path / "tiny", hidden_size=256, intermediate_size=512)
    with _app(ROOT, tmp_path / "runs", False) as url:
        client = Client(url, verbose=False)
        options = {"profile": "demo", "calibration": "builtin"}
        job = client.predict(str(model), api_name="/start_job", **options)
        deadline = time.monotonic() + 1800
        while True:
            status = client.predict(job["job_id"], job["key"], api_name="/job_status")
            if status["state"] not in ("queued", "running"):
                break
            assert time.monotonic() < deadline
            time.sleep(2)
        assert (status["state"], status["error"]) == ("finished", "")
        name = status["files"][0]["name"]
        body = get(f"{url}files/{job['job_id']}/{name}", X_Quantkit_Key=job["key"])[2]
        assert body[:4] == b"GGUF" and len(body) == status["report"]["outputs"][0]["n_bytes"]


def test_agents_find_four_tools(page: tuple[str, RunStore, Visitors]) -> None:
    """As an MCP client: the documented tools and no other, with what they take and sentences."""
    import asyncio

    client = pytest.importorskip("mcp.client.streamable_http", reason="mcp is not installed")
    from mcp import ClientSession

    async def talk() -> tuple[dict[str, set[str]], Any, Any]:
        async with client.streamablehttp_client(f"{page[0]}gradio_api/mcp/") as (read, write, _):
            async with ClientSession(read, write) as session:
                await session.initialize()
                tools = (await session.list_tools()).tools
                asked = {"model": "demo:smollm2-135m", "profile": "demo"}
                started = await session.call_tool("start_job", asked)
                lost = await session.call_tool("job_status", {"job_id": "../x"})
                return {t.name: set(t.inputSchema["properties"]) for t in tools}, started, lost

    tools, started, lost = asyncio.run(talk())
    assert set(tools) == ENDPOINTS
    assert {"model", "memory", "context", "machine", "key"} <= tools["start_job"]
    assert "job_id" in started.content[0].text and not started.isError
    assert lost.isError and lost.content[0].text.startswith("There is no such run")
