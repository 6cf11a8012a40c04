"""Odd requests to the real page, started as its users start it: what each got through once, or did
not.

pytest tests/server/test_app_odd.py
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import app_fixtures as fixtures
import pytest
from app_fixtures import ask, event_number, page_headers

from quantkit.server.runs.record import load_record
from quantkit.server.web.fairness import UNHEARD_EACH
from quantkit.server.web.origin import counted
from quantkit.server.web.visitor import COOKIE, Visitors

RUN, JOIN = "/gradio_api/run/predict", "/gradio_api/queue/join"
MCP = {"Accept": "application/json, text/event-stream"}


class Page:
    """`python app.py` on a public page, its runs and its log."""

    def __init__(self, folder: Path) -> None:
        self.root, self.log = folder / "runs", folder / "log"
        self.visitors = Visitors(b"test")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        environment = {
            **{name: value for name, value in os.environ.items() if "QUANTKIT" not in name},
            **{"QUANTKIT_PUBLIC": "1", "QUANTKIT_SECRET": "test", "HF_HUB_OFFLINE": "1"},
            **{"QUANTKIT_RUNS": str(self.root), "GRADIO_SERVER_PORT": str(self.port)},
            "QUANTKIT_HOSTS": "quant.example",  # as behind a proxy on this machine
        }
        with self.log.open("wb") as log:
            command = [sys.executable, "app.py"]
            self.child = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=Path(__file__).parents[2]
            )

    def wait(self) -> None:
        deadline = time.monotonic() + 300
        while self.child.poll() is None and time.monotonic() < deadline:
            try:
                if ask(self.url, "GET", "/config")[0] == 200:
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(self.said())

    def said(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def memory(self) -> float:
        """Megabytes of the server."""
        status = Path(f"/proc/{self.child.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def visitor(self) -> tuple[str, dict[str, str]]:
        """A key, and what its page sends."""
        key = self.visitors.new_key()
        return key, page_headers(self.url, self.visitors, key)

    def owner(self, key: str) -> str:
        return f"visitor:{self.visitors.check(key)}"

    def raw(self, text: str) -> bytes:
        """What is answered to exactly these bytes."""
        said = b""
        with socket.create_connection(("127.0.0.1", self.port), 120) as connection:
            connection.sendall(text.replace("HOST", f"127.0.0.1:{self.port}").encode("latin-1"))
            while part := connection.recv(65536):
                said += part
        return said

    def call(
        self, name: str, arguments: dict[str, Any], headers: dict[str, str] | None = None
    ) -> str:
        path = f"/gradio_api/call/v2/{name}"
        status, _, body = ask(self.url, "POST", path, arguments, headers)
        assert status == 200, body
        event = json.loads(body)["event_id"]
        return ask(self.url, "GET", f"/gradio_api/call/{name}/{event}", None, headers)[2].decode()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(tmp_path_factory.mktemp("page"))
    try:
        page.wait()
        yield page
        said = page.said()
        assert "Traceback" not in said and len(said) < 20_000, said[-2000:]
    finally:
        page.child.terminate()
        page.child.wait(120)


JSON = "Content-Type: application/json\r\n"
CALL = "POST /gradio_api/call/v2/estimate HTTP/1.1\r\nHost: HOST\r\n" + JSON
GET = "GET /config HTTP/1.1\r\n"
AFTER = "GET /robots.txt HTTP/1.1\r\nHost: HOST\r\n\r\n"


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (f"{GET}Host: HOST\r\nHost: evil.example\r\n\r\n", 400),
        (f"{GET}Host: evil@127.0.0.1\r\n\r\n", 421),
        (f"{GET}Host: localhost.\r\n\r\n", 421),
        (f"{GET}Host: 0.0.0.0\r\n\r\n", 421),
        ("GET /config\r\n\r\n", 400),
        ("GET /config HTTP/1.0\r\n\r\n", 421),
        (f"{CALL}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{AFTER}", 411),
        (f"{CALL}Transfer-Encoding: identity\r\nContent-Length: 2\r\n\r\n{{}}", 400),
        (f"{CALL}Transfer-Encoding : chunked\r\nContent-Length: 2\r\n\r\n{{}}", 400),
        (f"{CALL}Content-Length: 2\r\nContent-Length: 40\r\n\r\n{{}}{AFTER}", 400),
        (f"{CALL}Content-Length: +2\r\n\r\n{{}}", 400),
        (f"{CALL}Content-Encoding: gzip\r\nContent-Length: 2\r\nX: y\r\n\r\n\x1f\x1f", 400),
        (f"{CALL}Expect: 100-continue\r\nContent-Length: 9999999\r\n\r\n", 413),
        ("TRACE /config HTTP/1.1\r\nHost: HOST\r\n\r\n", 405),
        ("CONNECT evil:443 HTTP/1.1\r\nHost: HOST\r\n\r\n", 404),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 421),
        (f"{GET}Host: HOST\r\nX: a\0b\r\n\r\n", 400),
    ],
)
def test_one_answer_and_an_end(page: Page, text: str, status: int) -> None:
    """What follows a request whose end is in doubt is never taken for another one."""
    said = page.raw(text)
    assert said.count(b"HTTP/1.1 ") == 1 and said.startswith(f"HTTP/1.1 {status} ".encode()), said


@pytest.mark.parametrize("query", ["deep_link=x", "deep%5flink=x", "%64eep_link=x&a=b"])
@pytest.mark.parametrize("path", ["/", "/config"])
def test_no_deep_link_however_written(page: Page, path: str, query: str) -> None:
    assert ask(page.url, "GET", f"{path}?{query}")[0] == 404


def test_preflights_are_counted(page: Page) -> None:
    asks = {"Origin": page.url.rstrip("/"), "Access-Control-Request-Method": "GET"}
    found = {ask(page.url, "OPTIONS", "/logout", None, asks)[0] for _ in range(70)}
    assert found == {204, 429}


VALUES: list[Any] = [
    *(None, True, -1, 1e300, [], {}, [{}], ["a", ["b"]], "\x00", "--help", "x" * 5000),
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
    {"url": "http://127.0.0.1:1/", "path": "x", "meta": {"_type": "gradio.FileData"}},
    {"__type__": "update", "value": 1},
]


def test_values_that_no_field_has_are_not_logged(page: Page) -> None:
    """Each printed a traceback, with the value: one visitor wrote 30 MB a second into the log."""
    _, headers = page.visitor()
    before = len(page.said())
    events = json.loads(ask(page.url, "GET", "/config")[2])["dependencies"]
    n_told = 0
    for event in events:
        for value in VALUES:
            body = {
                "data": [value] * len(event["inputs"]),
                "fn_index": event["id"],
                "session_hash": "odd",
            }
            status, _, said = ask(page.url, "POST", RUN, body, headers)
            assert status in (200, 404, 500) and b"/etc" not in said and b"Error:" not in said
            n_told += b"cannot have the value" in said
    assert n_told > 20
    odd = "x" * 5000
    for _ in range(2):
        said = page.call("estimate", {"model": {"path": "/etc/passwd", "meta": {"_type": odd}}})
        assert "event: error" in said and odd not in said
    request = {"jsonrpc": "2.0", "id": 1, "method": odd, "params": {"uri": odd}}
    for _ in range(5):
        assert ask(page.url, "POST", "/gradio_api/mcp/", request, MCP)[0] == 200
    assert len(page.said()) - before < 2000


def test_a_queued_event_does_not_pass_the_queue(page: Page) -> None:
    _, headers = page.visitor()
    for event in json.loads(ask(page.url, "GET", "/config")[2])["dependencies"]:
        body = {"data": [None] * len(event["inputs"]), "fn_index": event["id"]}
        if event["queue"] is not False and event["backend_fn"]:
            assert ask(page.url, "POST", RUN, body, headers)[0] == 404, event["api_name"]


def test_wide_values_are_refused(page: Page) -> None:
    """Gradio walks each in its only thread: six connections stopped everybody for seconds."""
    key, headers = page.visitor()
    number, _ = event_number(page.url, "", "tick")
    wide: list[Any] = [
        [0] * 60_000,
        [[{}] for _ in range(30_000)],
        {str(i): 0 for i in range(2000)},
    ]
    for value in wide:
        body = {"data": ["", value], "fn_index": number, "session_hash": "w"}
        status, _, said = ask(page.url, "POST", RUN, body, headers)
        assert status == 400 and b"values" in said
    many = "; ".join(f"{i:x}=1" for i in range(4000))
    headers = {**headers, "Cookie": f"{many}; {COOKIE}={key}"}
    assert ask(page.url, "GET", "/session", None, headers)[2].decode() == headers["x-quantkit-page"]


def test_events_of_others_are_not_heard(page: Page) -> None:
    """Neither by the name of her session nor by an event's."""
    hers, headers = page.visitor()
    fixtures.own(fixtures.write_run(page.root / "hers"), page.owner(hers))
    number, _ = event_number(page.url, "", "tick")
    body = {"data": ["hers", {}], "fn_index": number, "session_hash": "known"}
    event = json.loads(ask(page.url, "POST", JOIN, body, headers)[2])["event_id"]
    _, his = page.visitor()
    for path in ("/gradio_api/queue/data?session_hash=known", f"/gradio_api/call/estimate/{event}"):
        for sent in (his, {}):
            assert ask(page.url, "GET", path, None, sent)[0] == 404
    heard = ask(page.url, "GET", "/gradio_api/queue/data?session_hash=known", None, headers)[2]
    assert fixtures.GGUF.encode() in heard


def test_answers_that_nobody_hears_are_dropped(page: Page) -> None:
    """Gradio keeps two thousand, of any size."""
    key, _ = page.visitor()
    fixtures.own(fixtures.write_run(page.root / "unheard"), page.owner(key))
    path, asked = "/gradio_api/call/v2/job_status", {"job_id": "unheard", "key": key}

    def made_one() -> str:
        while True:
            status, _, body = ask(page.url, "POST", path, asked)
            if status != 429:  # five may wait
                return json.loads(body)["event_id"]
            time.sleep(0.05)

    made = [made_one() for _ in range(UNHEARD_EACH + 6)]
    for _ in range(3):  # each waits for its turn, which is after theirs
        heard = ask(page.url, "GET", f"/gradio_api/call/job_status/{made_one()}")[2]
        assert heard.startswith(b"event: complete")
    assert ask(page.url, "GET", f"/gradio_api/call/job_status/{made[0]}")[0] == 404
    assert ask(page.url, "GET", f"/gradio_api/call/job_status/{made[-1]}")[0] == 200


@pytest.mark.parametrize("address", ["198.51.100.7", "2001:db8::{}"])
def test_one_address_does_not_fill_the_queue(page: Page, address: str) -> None:
    """With a new cookie for each run, and all that a customer has of IPv6. Its records hold no
    address.
    """
    asked = {"model": "demo:smollm2-135m", "profile": "demo"}
    started, refused = [], ""
    try:
        for number in range(7):
            sent = {"X-Forwarded-For": address.format(number)}
            said = page.call("start_job", asked, sent)
            if "job_id" in said:
                started.append(json.loads(said.rpartition("data: ")[2])[0])  # after heartbeats
            else:
                refused = said
        assert len(started) == 6 and "from your address" in refused, refused
        places = {load_record(page.root / made["job_id"]).place for made in started}  # type: ignore[union-attr]
        assert places == {page.visitors.place(counted(address.format(1)))}
    finally:
        for made in started:
            page.call("cancel_job", {name: made[name] for name in ("job_id", "key")})


def test_a_jobs_files_do_not_stop_others(page: Page) -> None:
    """A report of two million lists that its Job writes again and again took four gigabytes and
    seconds of everybody's; 60 MB of events took half a minute.
    """
    key, headers = page.visitor()
    folder = fixtures.own(fixtures.write_run(page.root / "heavy"), page.owner(key))
    report = folder / "8-validate" / "report.json"
    wide = {**json.loads(report.read_text("utf-8")), "x": [[]] * 900_000}
    report.write_text(json.dumps(wide), "utf-8")
    line = b'{"time":1,"stage":"search","kind":"note"}\n'
    deep = b'{"time":1,"stage":null,"kind":"note","data":{"x":[' + b"[]," * 340_000 + b"1]}}\n"
    (folder / "events.jsonl").write_bytes(deep * 10 + line * 800_000)
    number, _ = event_number(page.url, "", "tick")
    _, other = page.visitor()
    before, done = page.memory(), threading.Event()

    def attack() -> None:
        while not done.is_set():
            body = {"data": ["heavy", {}], "fn_index": number, "session_hash": "x"}
            assert ask(page.url, "POST", RUN, body, headers)[0] == 200
            os.utime(report)

    thread = threading.Thread(target=attack)
    thread.start()
    try:
        for _ in range(50):
            body = {"data": ["", {}], "fn_index": number, "session_hash": "y"}
            assert ask(page.url, "POST", RUN, body, other)[0] == 200
            time.sleep(0.02)
    finally:
        done.set()
        thread.join()
    assert page.memory() - before < 300
