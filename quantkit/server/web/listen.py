"""Listen with limits on connections, per address and in time, before a byte of theirs is read.

Gradio's own server takes any number of connections and keeps each as long as it likes to stay.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import time
from collections import Counter
from typing import Any

import uvicorn
from gradio import http_server
from uvicorn.protocols.http.h11_impl import H11Protocol

from quantkit.errors import QuantkitError
from quantkit.server.web.origin import Places, counted

logger = logging.getLogger(__name__)

PER_ADDRESS = 128  # connections; a browser opens six
IN_ALL = 2048
HEADER_SECONDS = 10.0  # from the first byte of a request, or the connection, to the end of its head
IDLE_SECONDS = 5  # between requests
STALL_SECONDS = 60.0  # that a client may take nothing of what is sent to it
_SPARE_FILES = 256  # descriptors that are for other things than connections
_MOST_FILES = 65_536
_MAX_HEAD = 32_768  # bytes
_BACKLOG = 256


class Connections:
    """Who is connected, and how often."""

    def __init__(self, places: Places, in_all: int = IN_ALL, per_address: int = PER_ADDRESS):
        self._places = places
        self._in_all = in_all
        self._per_address = per_address
        self._open: Counter[str] = Counter()

    def enter(self, peer: str) -> str | None:
        """Count a connection and return the key to leave with; None for one connection too many.

        A trusted proxy brings everybody's: the gate counts those by whom they are for.
        """
        key = counted(peer)
        full = self._open.total() >= self._in_all
        if full or (self._open[key] >= self._per_address and not self._places.trusts(peer)):
            return None
        self._open[key] += 1
        return key

    def leave(self, key: str) -> None:
        self._open[key] -= 1
        if self._open[key] <= 0:
            del self._open[key]


class Guarded(H11Protocol):
    """HTTP/1.1 with an end to waiting."""

    table: Connections  # of the server, set in a subclass of its own
    _key: str | None = None
    _head: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        peer = transport.get_extra_info("peername")
        self._key = self.table.enter(str(peer[0]) if peer else "")
        if self._key is None:
            transport.abort()  # quietly: an answer would cost more than it helps
            return
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._key is None:
            return
        self.table.leave(self._key)
        _stop(self._head)
        _stop(self._stall)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._key is None:
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            _stop(self._head)  # a head is complete: the gate waits for the body
            self._head = None
        elif self._head is None and not self.transport.is_closing():
            self._wait_for_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _stop(self._stall)
        self._stall = None

    def _wait_for_head(self) -> None:
        self._head = self.loop.call_later(HEADER_SECONDS, self.transport.abort)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class Server(http_server.Server):
    """On a socket that is bound already."""

    def __init__(self, config: uvicorn.Config, bound: socket.socket) -> None:
        super().__init__(config)
        self._bound = bound
        self._said = -1e9

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run([self._bound])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._trouble)
        await super().startup(sockets)

    def _trouble(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What goes wrong outside of requests. That no file is free is said once a minute."""
        if "accept" not in context.get("message", ""):
            loop.default_exception_handler(context)
        elif time.monotonic() > self._said + 60:
            self._said = time.monotonic()
            logger.error("no connection can be taken: %s", context.get("exception"))


def serve(
    app: Any, places: Places, server_name: str | None, server_port: int | None
) -> tuple[str, int, str, Server]:
    """Serve as `gradio.http_server.start_server` does; return name, port, local address and the
    server.

    A port that was asked for is taken or none. Raises QuantkitError when no port is free.
    """
    name = server_name or http_server.LOCALHOST_NAME
    first = server_port or http_server.INITIAL_PORT_VALUE
    is_asked = server_port or os.environ.get("GRADIO_SERVER_PORT")
    ports = range(first, first + (1 if is_asked else http_server.TRY_NUM_PORTS))
    bound = _bind(name.strip("[]"), ports)
    table = Connections(places, min(IN_ALL, raise_files() - _SPARE_FILES))
    config = uvicorn.Config(
        app=app,
        log_level="error",
        access_log=False,
        http=type("Protocol", (Guarded,), {"table": table}),
        ws="none",
        proxy_headers=False,  # the gate decides whom it believes
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=3,
        h11_max_incomplete_event_size=_MAX_HEAD,
    )
    server = Server(config, bound)
    server.run_in_thread()
    shown = "localhost" if name == "0.0.0.0" else name
    port = bound.getsockname()[1]
    return name, port, f"http://{shown}:{port}/", server


def _bind(host: str, ports: range) -> socket.socket:
    for port in ports:
        bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, port))
            bound.listen(_BACKLOG)
            return bound
        except OSError:
            bound.close()
    named = f"Port {ports[0]} is" if len(ports) == 1 else f"Ports {ports[0]} to {ports[-1]} are"
    raise QuantkitError(
        f"{named} taken, or may not be listened on.",
        "Name a free one with --port or GRADIO_SERVER_PORT.",
    )


def raise_files() -> int:
    """Allow as many open files as this process may have; return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return _MOST_FILES if soft == resource.RLIM_INFINITY else soft
