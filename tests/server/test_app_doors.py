"""Which doors of Gradio are open, how much goes through them, and what is said at the others.

pytest tests/server/test_app_doors.py
"""

from __future__ import annotations

import gc
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import app_fixtures as fixtures
import pytest
from app_fixtures import ask, event_number
from gradio.state_holder import StateHolder

from quantkit.server.runs.store import RunStore
from quantkit.server.web import doors
from quantkit.server.web.page import build_app
from quantkit.server.web.server import launch
from quantkit.server.web.visitor import COOKIE, Visitors

# Every route of the installed Gradio that no part of the page and of docs/api.md needs. A route
# that is neither here nor a door is new: decide about it.
SHUT = {
    *("/openapi.json", "/login", "/login/", "/monitoring", "/monitoring/summary"),
    *("/monitoring/{key}", "/gradio_api/deep_link", "/gradio_api/mcp/sse"),
    *("/gradio_api/mcp/messages", "/gradio_api/user", "/gradio_api/user/"),
    *("/gradio_api/login_check", "/gradio_api/login_check/", "/gradio_api/token"),
    *("/gradio_api/token/", "/gradio_api/app_id/", "/gradio_api/dev/reload", "/gradio_api/runs"),
    *("/gradio_api/runs/", "/gradio_api/openapi.json", "/gradio_api/run/{api_name}/"),
    *("/gradio_api/custom_component/{id}/{environment}/{type}/{file_name}",),
    *("/gradio_api/proxy={url_path:path}", "/gradio_api/file/{path:path}"),
    *("/gradio_api/stream/{event_id}", "/gradio_api/stream/{event_id}/close"),
    *("/gradio_api/stream/{session_hash}/{run}/{component_id}/playlist.m3u8",),
    *("/gradio_api/stream/{session_hash}/{run}/{component_id}/{segment_id}.{ext}",),
    *("/gradio_api/stream/{session_hash}/{run}/{component_id}/playlist-file",),
    *("/gradio_api/reset/", "/gradio_api/heartbeat/{session_hash}", "/gradio_api/api/{api_name}"),
    *("/gradio_api/api/{api_name}/", "/gradio_api/call/v2/{api_name}/"),
    *("/gradio_api/call/{api_name}/", "/gradio_api/component_server"),
    *("/gradio_api/component_server/", "/gradio_api/upload_progress", "/gradio_api/upload"),
    *("/gradio_api/process_recording", "/gradio_api/vibe-edit/", "/gradio_api/vibe-edit"),
    *("/gradio_api/undo-vibe-edit/", "/gradio_api/undo-vibe-edit", "/gradio_api/vibe-code/"),
    *("/gradio_api/vibe-code", "/gradio_api/vibe-starter-queries/"),
    *("/gradio_api/vibe-starter-queries", "/gradio_api/queue/status"),
}
ONE_LINE = re.compile(rb"[^\n]{1,200}")
DEEP = b"[" * 200_000


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, RunStore, Visitors]]:
    root = tmp_path_factory.mktemp("web") / "runs"
    with fixtures.serving(root, public=True, schedule=False) as served:
        yield served


def example(path: str) -> str:
    """An address that a route answers."""
    path = path.replace("{path_or_url:path}", f"{doors._ICONS}/huggingface-logo.svg")
    path = path.replace("{api_name}", "predict" if "/run/" in path else "estimate")
    return re.sub(r"\{[a-z_]+(?::path)?\}", "1", path.replace("\\", ""))


def routes(found: Any, prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """Paths and methods of all routes below."""
    for route in found:
        inner = getattr(route, "original_router", route)
        path = prefix + getattr(route, "path", "")
        if getattr(inner, "routes", None):
            yield from routes(inner.routes, path)
        else:
            yield path or "/", tuple(getattr(route, "methods", None) or ("GET", "POST"))


def test_every_route_is_a_door_or_known_to_be_shut(tmp_path: Path) -> None:
    store, visitors = RunStore(tmp_path), Visitors(b"k")
    app = build_app(store, visitors)
    store.start = lambda: None  # type: ignore[method-assign]
    try:
        launch(app, store, visitors, prevent_thread_lock=True, quiet=True)
        found = list(routes(app.app.routes))
    finally:
        app.close(verbose=False)
        store.close()
    assert len(found) > 70, "the routes are not where they were looked for"
    new, gone = set(), set(SHUT)
    for path, methods in found:
        gone.discard(path)
        if path in SHUT:
            assert not any(doors.find(m, example(path))[0] for m in methods), path
        elif not any(doors.find(m, example(path))[0] for m in methods):
            new.add(path)
    assert not new, f"neither a door nor known to be shut: {sorted(new)}"
    assert not gone, f"Gradio has no such route any more: {sorted(gone)}"


@pytest.mark.parametrize(
    "path",
    [
        *("/gradio_api/process_recording", "/gradio_api/component_server", "/gradio_api/upload"),
        *("//gradio_api/upload", "/gradio_api//upload", "/gradio_api/%75pload"),
        *("/gradio_api/./upload", "/gradio_api/x/../upload", "/gradio_api/mcp/upload"),
        *("/monitoring", "/Gradio_api/upload"),
        *("/gradio_api/run/predict/", "/gradio_api/run/predict;x=1", "/gradio_api/run/Predict"),
        *("/gradio_api/run/predict%2f", "/gradio_api/run/estimate", "/gradio_api/queue%2fjoin"),
        *("/gradio_api/vibe-code", "/gradio_api/deep_link", "/gradio_api/heartbeat/x", "/login"),
        *("/gradio_api/stream/x", "/gradio_api/run/predict\\..\\x", "/?deep_link=x", "/docs"),
        *("/gradio_api/proxy=http://169.254.169.254/", "/gradio_api/file=/etc/passwd", "/\x7f"),
        *("/assets/../config", "/assets/%2e%2e/x", "/static/..%2f..%2froutes.py", "http://x/config"),
    ],
)  # fmt: skip
def test_a_shut_door_is_one_line(site: tuple[str, RunStore, Visitors], path: str) -> None:
    """Before a byte of the body is read: it need not even come."""
    for method in ("GET", "POST"):
        host, port = urlsplit(site[0]).netloc.split(":")
        with socket.create_connection((host, int(port)), timeout=120) as connection:
            head = f"{method} {path} HTTP/1.1\r\nHost: {host}:{port}\r\n"
            length = "Content-Length: 900\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}{length if method == 'POST' else ''}\r\n".encode("latin-1"))
            said = connection.recv(65536)
            while more := connection.recv(65536):
                said += more
        head_lines, _, body = said.partition(b"\r\n\r\n")
        assert re.match(rb"HTTP/1.1 4\d\d ", head_lines), said[:200]
        assert ONE_LINE.fullmatch(body)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/gradio_api/run/predict", DEEP, 400),
        ("POST", "/gradio_api/call/v2/start_job", DEEP, 400),
        ("POST", "/gradio_api/mcp/", DEEP, 400),
        ("POST", "/gradio_api/mcp/", b"[" * 40 + b"]" * 40, 400),
        ("POST", "/gradio_api/run/predict", b'{"data": [', 400),
        ("POST", "/gradio_api/run/predict", b"\xff\xfe", 400),
        ("POST", "/gradio_api/run/predict", b"[]", 400),
        ("POST", "/gradio_api/run/predict", {"data": [1], "fn_index": 99999}, 404),
        ("POST", "/gradio_api/run/predict", {"data": [1], "fn_index": "1"}, 404),
        ("POST", "/gradio_api/run/predict", {"data": [1]}, 404),
        ("POST", "/gradio_api/run/predict", {"data": {}, "fn_index": 0}, 422),
        ("POST", "/gradio_api/queue/join", {"data": [1], "fn_index": -1, "session_hash": "s"}, 404),
        ("POST", "/gradio_api/queue/join", {"data": [], "fn_index": 0, "session_hash": {}}, 422),
        ("POST", "/gradio_api/call/v2/nosuch", {}, 404),
        ("POST", "/gradio_api/call/nosuch", {"data": []}, 404),
        ("POST", "/gradio_api/call/v2/start_job", {}, 422),
        ("POST", "/gradio_api/call/v2/start_job", {"model": "a/b", "evil": 1}, 422),
        ("POST", "/gradio_api/call/v2/start_job", {"model": "a/b", "oauth_token": [1]}, 422),
        ("POST", "/gradio_api/call/start_job", {"data": [1] * 99}, 422),
        ("GET", "/gradio_api/call/start_job/nosuch", None, 404),
        ("GET", "/gradio_api/queue/data?session_hash=nosuch", None, 404),
        ("GET", "/gradio_api/queue/data", None, 422),
        ("DELETE", "/gradio_api/run/predict", None, 405),
        ("PUT", "/config", None, 405),
    ],
)
def test_what_cannot_be_is_one_line(
    site: tuple[str, RunStore, Visitors],
    capfd: pytest.CaptureFixture[str],
    method: str,
    path: str,
    body: Any,
    status: int,
) -> None:
    found, headers, said = ask(site[0], method, path, body)
    assert found == status and ONE_LINE.fullmatch(said), said[:300]
    assert headers["x-content-type-options"] == "nosniff"
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err


def test_bodies_have_a_size_a_length_and_a_kind(site: tuple[str, RunStore, Visitors]) -> None:
    url = site[0]
    path = "/gradio_api/call/v2/estimate"
    assert ask(url, "POST", path, b" " * 300_000)[0] == 413
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert ask(url, "POST", path, b"{}", {"Content-Type": kind})[0] == 415
    chunked = {"Transfer-Encoding": "chunked"}
    assert ask(url, "POST", path, b"2\r\n{}\r\n0\r\n\r\n", chunked)[0] == 411
    assert ask(url, "GET", "/config", b"x")[0] == 413
    # In one piece: what came after the refusal would reset the connection, and the answer with it.
    place = urlsplit(url)
    head = f"POST {path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((place.hostname, place.port), 60) as connection:
        connection.sendall(f"{head}Content-Length: -1\r\n\r\n{{}}".encode())
        assert connection.recv(1000).split()[1] in (b"400", b"413")


def test_sessions_of_strangers_take_nothing(site: tuple[str, RunStore, Visitors]) -> None:
    """Gradio makes one of 200 KB for whoever names it: no more than a hundred are kept."""
    url, _, visitors = site
    number, n = event_number(url, "", "tick")
    headers = fixtures.page_headers(url, visitors, visitors.new_key())
    for i in range(150):
        body = {"data": ["", None][:n], "fn_index": number, "session_hash": f"s{i}"}
        assert ask(url, "POST", "/gradio_api/run/predict", body, headers)[0] == 200
    holders = [x for x in gc.get_objects() if isinstance(x, StateHolder)]
    assert holders and max(len(x.session_data) for x in holders) <= 100


def test_an_address_may_ask_only_so_often(
    site: tuple[str, RunStore, Visitors], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(doors.RATES, "sign", (3, 3600.0))
    found = [ask(site[0], "GET", "/logout") for _ in range(5)]
    assert [status for status, _, _ in found][3:] == [429, 429]
    assert found[-1][1]["retry-after"] and ONE_LINE.fullmatch(found[-1][2])
    assert ask(site[0], "GET", "/config")[0] == 200


def test_a_file_is_sent_in_few_ranges(site: tuple[str, RunStore, Visitors]) -> None:
    url, store, visitors = site
    key = visitors.new_key()
    fixtures.own(fixtures.write_run(store.root / "ranges"), f"visitor:{visitors.check(key)}")
    path = f"/files/ranges/{fixtures.GGUF}"
    many = "bytes=" + ",".join(f"{i}-{i}" for i in range(0, 4000, 2))
    headers = {"Cookie": f"{COOKIE}={key}", "Range": many}
    status, found, body = ask(url, "GET", path, None, headers)
    assert status == 200 and len(body) == int(found["content-length"])
    for name in ("x%0d%0aX-Evil:1", "%00", "a%2f..%2fb", "%c3%28"):
        status, found, _ = ask(url, "GET", f"/files/ranges/{name}", None, headers)
        assert status == 404 and "x-evil" not in found


def test_info_names_the_four_endpoints_alone(site: tuple[str, RunStore, Visitors]) -> None:
    info = json.loads(ask(site[0], "GET", "/gradio_api/info")[2])
    assert {"/estimate", "/start_job", "/list_jobs"} <= set(info["named_endpoints"])
