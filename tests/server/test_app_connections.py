"""Connections that wait, and addresses that have too many: others do not notice.

pytest tests/server/test_app_connections.py
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import app_fixtures as fixtures
import pytest
from app_fixtures import ask, event_number

from quantkit.server.runs.store import RunStore
from quantkit.server.web import bodies, gate, listen
from quantkit.server.web.listen import Connections, raise_files
from quantkit.server.web.origin import Places
from quantkit.server.web.visitor import Visitors

Site = tuple[str, RunStore, Visitors]
HEAD = b"POST /gradio_api/call/v2/estimate HTTP/1.1\r\nContent-Type: application/json\r\n"
HALVES = {
    "nothing": b"",
    "half a head": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Half:",
    "half a body": HEAD + b"Host: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n{",
    "half a second head": b"GET /robots.txt HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET / HT",
}
STREAM = b"GET /gradio_api/mcp/ HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n"
until = fixtures.patience(300.0)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("web") / "runs"
    with fixtures.serving(root, public=True, schedule=False) as served:
        yield served


def connect(url: str, source: str = "127.0.0.1") -> socket.socket:
    host, port = url.removeprefix("http://").rstrip("/").split(":")
    connection = socket.create_connection((host, int(port)), 120, (source, 0))
    connection.settimeout(120)
    return connection


def is_closed(connection: socket.socket) -> bool:
    """Whether the server has ended it; takes in what it said before."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(65536):
            pass
    return True


@pytest.mark.parametrize("half", HALVES)
def test_who_does_not_go_on_is_cut_off(
    site: Site, half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listen, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.3)
    with connect(site[0]) as connection:
        connection.sendall(HALVES[half])
        assert is_closed(connection)


@pytest.mark.parametrize("half", ["half a head", "half a body"])
def test_trickling_does_not_help(site: Site, half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.5)
    with connect(site[0]) as connection:
        connection.sendall(HALVES[half])
        deadline = time.monotonic() + 120
        with pytest.raises(ConnectionError):
            while time.monotonic() < deadline:
                connection.sendall(b"x")
                time.sleep(0.05)


def test_who_takes_nothing_is_cut_off(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large answer to somebody who never reads it."""
    monkeypatch.setattr(listen, "STALL_SECONDS", 0.5)
    url, store, visitors = site
    key = visitors.new_key()
    folder = fixtures.own(fixtures.write_run(store.root / "big"), f"visitor:{visitors.check(key)}")
    (folder / "7-stitch" / fixtures.GGUF).write_bytes(bytes(50_000_000))
    with connect(url) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = f"GET /files/big/{fixtures.GGUF} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        connection.sendall(f"{head}x-quantkit-key: {key}\r\n\r\n".encode())
        until(lambda: _ended(url, connection))


def _ended(url: str, connection: socket.socket) -> bool:
    """Whether the server's end is gone, asked of the kernel without reading."""
    ours = connection.getsockname()[1]
    table = Path("/proc/net/tcp").read_text().splitlines()[1:]
    port = int(url.rstrip("/").rpartition(":")[2])
    ends = [line.split() for line in table]
    return not any(
        int(x[1].split(":")[1], 16) == port and int(x[2].split(":")[1], 16) == ours and x[3] == "01"
        for x in ends
    )


def test_an_address_has_so_many(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "HEADER_SECONDS", 600.0)  # none of them is cut off meanwhile
    held = [connect(site[0]) for _ in range(listen.PER_ADDRESS)]
    try:
        with connect(site[0]) as one_more, contextlib.suppress(ConnectionError):
            one_more.sendall(b"GET /robots.txt HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert one_more.recv(100) == b""
        with connect(site[0], "127.0.0.2") as other:
            other.sendall(b"GET /robots.txt HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert other.recv(100).startswith(b"HTTP/1.1 200")
    finally:
        for connection in held:
            connection.close()


def test_streams_are_bounded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gate.STREAMS, "address", 3)
    held = [connect(site[0]) for _ in range(3)]
    try:
        for connection in held:
            connection.sendall(STREAM)
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        with connect(site[0]) as one_more:
            one_more.sendall(STREAM)
            assert one_more.recv(1000).startswith(b"HTTP/1.1 429")
        assert ask(site[0], "GET", "/config")[0] == 200
    finally:
        for connection in held:
            connection.close()


def test_a_stream_that_waits_for_what_never_comes_ends(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "STREAM_SECONDS", 1.0)
    with connect(site[0], "127.0.0.4") as connection:
        connection.sendall(STREAM)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        assert is_closed(connection)


def test_a_full_table_is_refused_and_emptied() -> None:
    table = Connections(Places.of({}, False), in_all=3, per_address=2)
    first = table.enter("1.1.1.1")
    assert first and table.enter("1.1.1.1") and table.enter("1.1.1.1") is None
    assert table.enter("2.2.2.2") and table.enter("3.3.3.3") is None
    table.leave(first)
    assert table.enter("3.3.3.3")
    proxied = Connections(Places.of({}, True), in_all=5, per_address=2)
    assert all(proxied.enter("10.0.0.1") for _ in range(5)) and proxied.enter("10.0.0.1") is None


def test_as_many_files_as_may_be() -> None:
    code = (
        "import resource; from quantkit.server.web.listen import raise_files\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 900)); assert raise_files() == 900\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (900, 900)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
    assert raise_files() <= max(resource.getrlimit(resource.RLIMIT_NOFILE))


@pytest.mark.slow
def test_eleven_hundred_that_wait(tmp_path: Path) -> None:
    """Of one address, with few files to open: another address is served as if they were not."""
    environment = {**os.environ, "QUANTKIT_PUBLIC": "1", "QUANTKIT_RUNS": str(tmp_path / "runs")}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment["GRADIO_SERVER_PORT"] = str(port)
    url = f"http://127.0.0.1:{port}/"
    limits = f"ulimit -S -n 1024; exec {sys.executable} app.py"
    said = tmp_path / "said"
    with said.open("wb") as log:
        child = subprocess.Popen(["bash", "-c", limits], env=environment, stdout=log, stderr=log)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    raise_files()
    held = []
    try:
        while True:
            with contextlib.suppress(OSError):
                if ask(url, "GET", "/config")[0] == 200:
                    break
            assert child.poll() is None
            time.sleep(0.2)
        number, n = event_number(url, "", "tick")
        body = json.dumps({"data": ["", {}][:n], "fn_index": number, "session_hash": "x"}).encode()
        kinds = list(HALVES.values())
        for n_polls in range(1, 101):
            while len(held) < 1100:
                with contextlib.suppress(OSError):
                    held.append(connect(url, "127.0.0.3"))
                    held[-1].sendall(kinds[len(held) % len(kinds)])
            head = f"Host: 127.0.0.1:{port}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
            with connect(url, "127.0.0.2") as other:
                kind = "Content-Type: application/json\r\n"
                line = "POST /gradio_api/run/predict HTTP/1.1\r\n"
                other.sendall(f"{line}{head}{kind}\r\n".encode() + body)
                assert other.recv(100).startswith(b"HTTP/1.1 200")
            if n_polls % 20 == 0:  # and new ones for those that were cut off
                for connection in held[:100]:
                    connection.close()
                del held[:100]
            time.sleep(0.05)
        status = Path(f"/proc/{child.pid}/status").read_text()
        memory = int(status.partition("VmRSS:")[2].split()[0]) / 1024
        assert memory < 1024
    finally:
        for connection in held:
            connection.close()
        child.terminate()
        child.wait(120)
    assert most and "Traceback" not in said.read_text("utf-8") and said.stat().st_size < 5000
