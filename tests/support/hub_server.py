"""A small Hub on localhost that speaks enough of the real one's protocol for huggingface_hub.

    with HubServer() as hub:
        hub.add_user("hf_aliceToken0123", "alice")
        hub.add_model("alice/tiny", {"config.json": b"{}", "model.safetensors": path})
        hub.fail_next(r"/api/models/", 503)             # the next matching request gets a 503
        hub.cut_next(r"/resolve/", after_bytes=1000)    # ... is cut in the middle of its body
        hub.lose_next(r"/commit/")                      # ... is carried out, but never answered
        hub.hang_next(r"/api/", seconds=60)             # ... is answered too late
        subprocess.run([...], env={**os.environ, **hub.env})

The routes are in hub_routes.py. Repositories (models, datasets, Spaces) have commits; large files
go through LFS (PUT to a signed address, in parts when `part_bytes` is set). `cdn=True` redirects
large downloads to a second server, as the Hub does: no token may arrive there. `hub.requests`
tells what was asked.
"""

from __future__ import annotations

import json
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from hub_jobs import Jobs
from hub_routes import Answer, Routes, Stream
from hub_store import Blob, Repo, is_large
from huggingface_hub import constants

from quantkit import hub, sources
from quantkit.checkpoint.info import ModelInfo


@dataclass(frozen=True)
class Request:
    """One request as it arrived. `user` is None for an anonymous one, "?" for an unknown token."""

    server: str  # "hub" or "cdn"
    method: str
    path: str
    query: str
    range: str | None
    user: str | None
    n_bytes: int
    body: bytes  # empty for uploads


@dataclass
class _Fault:
    pattern: re.Pattern[str]
    method: str | None
    times: int
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    lose: bool = False
    seconds: float = 0.0


class HubServer:
    """The server and its repositories; a context manager."""

    def __init__(self, cdn: bool = False, part_bytes: int | None = None) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.aliases: dict[str, str] = {}
        self.users: dict[str, dict[str, Any]] = {}  # token -> answer of whoami
        self.requests: list[Request] = []
        self.lfs: dict[str, bytes] = {}
        self.part_bytes = part_bytes
        self._parts: dict[str, dict[int, bytes]] = {}
        self._faults: list[_Fault] = []
        self._lock = threading.RLock()
        self.stopping = threading.Event()
        self.collections: dict[str, list[dict[str, Any]]] = {}  # slug -> items
        self.titles: dict[str, str] = {}  # of collections that were created, by slug
        self._machines = tempfile.TemporaryDirectory(prefix="test-hub-")
        self.jobs = Jobs(Path(self._machines.name))
        self._servers = {"hub": self._listen("hub")}
        if cdn:
            self._servers["cdn"] = self._listen("cdn")

    def _listen(self, name: str) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "name": name})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stopping.set()
        self.jobs.close()
        for server in self._servers.values():
            server.shutdown()
            server.server_close()
        self._machines.cleanup()

    def url(self, name: str = "hub") -> str:
        return f"http://127.0.0.1:{self._servers[name].server_port}"

    @property
    def env(self) -> dict[str, str]:
        """What a process needs in its environment to take this for the Hub."""
        return {"HF_ENDPOINT": self.url(), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def add_user(
        self, token: str, name: str, orgs: tuple[str, ...] = (), auth: dict[str, Any] | None = None
    ) -> None:
        """`auth` is the part of whoami that describes the token; by default it may write."""
        self.users[token] = {
            "type": "user",
            "name": name,
            "orgs": [{"type": "org", "name": org, "roleInOrg": "write"} for org in orgs],
            "auth": auth or {"type": "access_token", "accessToken": {"role": "write"}},
        }

    def add_model(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str | Path],
        *,
        kind: str = "model",
        gated: bool = False,
        private: bool = False,
        branch: str = "main",
        **extra: Any,
    ) -> Repo:
        """A repository with these files, or another commit in it. `extra`: pipeline_tag, tags..."""
        repo = self.repos.setdefault((kind, repo_id), Repo(repo_id, kind))
        repo.gated, repo.private = gated, private
        repo.extra.update(extra)
        content = {p: c.encode() if isinstance(c, str) else c for p, c in files.items()}
        repo.commit("Add files", {p: Blob(c, is_large(p, c)) for p, c in content.items()}, branch)
        repo.refs.setdefault("main", repo.commits[-1].sha)
        return repo

    def fail_next(
        self,
        path: str,
        status: int,
        times: int = 1,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Answer the next `times` requests whose path matches with this status."""
        self._faults.append(_Fault(re.compile(path), method, times, status, headers or {}))

    def cut_next(
        self, path: str, after_bytes: int = 0, times: int = 1, method: str | None = None
    ) -> None:
        """Close the connection after so many bytes of the answer's body."""
        self._faults.append(_Fault(re.compile(path), method, times, cut_after=after_bytes))

    def lose_next(self, path: str, times: int = 1, method: str | None = None) -> None:
        """Carry the request out and close the connection without a word."""
        self._faults.append(_Fault(re.compile(path), method, times, lose=True))

    def hang_next(self, path: str, seconds: float, times: int = 1) -> None:
        """Answer only after so many seconds."""
        self._faults.append(_Fault(re.compile(path), None, times, seconds=seconds))

    def fault(self, method: str, path: str) -> _Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times and fault.method in (None, method) and fault.pattern.search(path):
                    fault.times -= 1
                    return fault
        return None

    def asked(self, pattern: str, method: str | None = None) -> list[Request]:
        """The requests whose path matches."""
        return [
            r for r in self.requests if re.search(pattern, r.path) and method in (None, r.method)
        ]


class _Handler(Routes, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else small answers wait 40 ms for the client's ACK

    def log_message(self, format: str, *args: Any) -> None:
        return None

    def _serve(self) -> None:
        address = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._read_chunks()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        account = self.hub.users.get(token) if token else None
        self.user: str | None = account["name"] if account else None
        self.account = account
        seen = account["name"] if account else ("?" if token else None)
        kept = b"" if self.command == "PUT" else body
        self.hub.requests.append(
            Request(
                self.name,
                self.command,
                unquote(address.path),
                address.query,
                self.headers.get("Range"),
                seen,
                len(body),
                kept,
            )
        )
        fault = self.hub.fault(self.command, unquote(address.path))
        try:
            if fault is not None and fault.seconds:
                self.hub.stopping.wait(fault.seconds)
            if fault is not None and fault.status:
                raise Answer(fault.status, {"error": "Injected fault"}, **fault.headers)
            if token and account is None and self.name == "hub":
                message = "Invalid credentials in Authorization header"
                raise Answer(401, {"error": message}, X_Error_Message=message)
            with self.hub._lock:
                self.route(address.path, parse_qs(address.query), body)
            raise Answer(404, {"error": "Not found"})
        except Stream as stream:
            self._stream(stream, fault)
        except Answer as answer:
            self._send(answer, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_chunks(self) -> bytes:
        body = b""
        while n := int(self.rfile.readline(), 16):
            body += self.rfile.read(n)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _stream(self, stream: Stream, fault: _Fault | None) -> None:
        """Server-sent events; a fault cuts the connection after so many of them."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        cut = fault.cut_after if fault is not None else None
        try:
            for number, event in enumerate(stream.events):
                if cut is not None and number >= cut:
                    return
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            return

    def _send(self, answer: Answer, fault: _Fault | None) -> None:
        if fault is not None and fault.lose:
            self.close_connection = True
            return
        body = answer.body
        headers = {"Content-Type": "application/json", **answer.headers}
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        else:
            headers["Content-Type"] = "application/octet-stream"
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.cut_after is not None:
            body = body[: fault.cut_after]
            self.close_connection = True
        self.wfile.write(body)


# For tests in the same process as the client, which reads some of its settings only once.

ALICE, BOB, READER = "hf_aliceSecretToken01", "hf_bobSecretToken0001", "hf_readerSecretToken1"
SECRETS = (ALICE, BOB, READER, "hf_wrongSecretToken01")


def isolate(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """No token and no cache of this machine, no Xet, and no waiting between tries."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "QUANTKIT_HF_TOKEN", "SYSTEM", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[HubServer]:
    """A Hub that this process takes for the real one, with users alice (of the organisation lab),
    bob, and a token of alice's that may only read.
    """
    isolate(monkeypatch, folder)
    with HubServer(cdn=True, part_bytes=1_000_000) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url())
        running.add_user(ALICE, "alice", orgs=("lab",))
        running.add_user(BOB, "bob")
        running.add_user(READER, "alice", auth={"accessToken": {"role": "read"}})
        yield running


def look(text: str, token: str | None = None, revision: str | None = None) -> ModelInfo:
    """Inspect what a user typed."""
    return sources.inspect(hub.parse_reference(text, revision), token)
