"""The parent's side of the fork server (fork_server.py): one for each process, started when the
first job asks for it, replaced when it has ended.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from evaluators.sandbox import Told, in_memory, start
from quantkit.sandbox.places import import_path
from quantkit.sandbox.start import empty_folder, environment, remove_empty

logger = logging.getLogger(__name__)

_SERVER = Path(__file__).with_name("fork_server.py")
# What takes seconds to import, and nothing that imports gguf: the converter brings its own.
MODULES = (
    "transformers.modeling_utils",  # and with it torch
    "transformers.conversion_mapping",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto",
    "transformers.models.auto.tokenization_auto",
    "evaluators.oracle",
    "evaluators.vocabulary",
)
IDLE_SECONDS = 120.0
_START_SECONDS = 300.0  # from a cold disk
_FORK_SECONDS = 60.0
_END_SECONDS = 2.0
_IDLE_STATUS = 3
_MOST_FAILURES = 2  # in a row; from then on every job gets a fresh interpreter
_RLIMITS = sorted(getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_"))


class Forked:
    """A keeper that the server forked: what subprocess.Popen is for one that was started here."""

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._descriptor = descriptor  # means this process, whoever gets its number later

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            events = select.poll()
            events.register(self._descriptor, select.POLLIN)
            if not events.poll(None if timeout is None else 1000 * timeout):
                raise subprocess.TimeoutExpired(str(_SERVER), timeout or 0.0)
            os.close(self._descriptor)
            self.returncode = 0
        return self.returncode

    def kill(self) -> None:
        """Kill it while it has not ended; the kernel has its init and worker die with it."""
        signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)


class _Refused(OSError):
    """The server runs, and cannot fork; another one could not, either."""


class _Server:
    """A running server. Its methods raise OSError when it does not answer."""

    def __init__(self, conditions: object) -> None:
        self.conditions = conditions
        self.home = empty_folder()
        self._process: subprocess.Popen[bytes] | None = None
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        told = {
            "path": import_path(),
            "modules": MODULES,
            "control": theirs.fileno(),
            "idle_seconds": IDLE_SECONDS,
            "idle_status": _IDLE_STATUS,
        }
        began = time.monotonic()
        try:
            with theirs:
                self._process = start(
                    told,
                    environment(self.home),
                    [theirs.fileno()],
                    subprocess.DEVNULL,
                    str(_SERVER),
                )
            n_bytes, _ = self._answer(_START_SECONDS)
        except BaseException:
            self.end()
            raise
        logger.info(
            "A fork server was started in %.1f s; idle it takes %.0f MB.",
            time.monotonic() - began,
            n_bytes / 1e6,
        )

    def fork(self, told: Told, descriptors: Mapping[int, int]) -> Forked:
        """Have a keeper forked that gets `descriptors` by these numbers, and `told` as its job."""
        with in_memory(told._replace(home=self.home)._asdict()) as job:
            given = {0: job, **descriptors}
            socket.send_fds(self._control, [json.dumps([*given]).encode()], [*given.values()])
            pid, (descriptor,) = self._answer(_FORK_SECONDS)
        return Forked(pid, descriptor)

    def _answer(self, seconds: float) -> tuple[int, list[int]]:
        """Return what it says (its bytes, or a process's number) and descriptors."""
        self._control.settimeout(seconds)
        data, descriptors, _, _ = socket.recv_fds(self._control, 2**16, 1)
        kind, said = json.loads(data or b'["failed", "it has ended"]')
        if kind != "done":
            raise _Refused(said) if kind == "refused" else OSError(said)
        return int(said), descriptors

    def close(self) -> int | None:
        """Have it end as soon as what it has forked has. Returns its status if it has ended."""
        self._control.close()
        remove_empty(self.home)
        if self._process is None:
            return None
        try:
            return self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> bool:
        """End one that does not answer. Says whether it had ended itself, with nothing to do."""
        status = self.close()
        if self._process is not None and status is None:
            self._process.kill()
            self._process.wait()
        return status == _IDLE_STATUS

    def forget(self) -> None:
        """Forget the server in a fork of this process, which does not own it."""
        self._control.close()
        if self._process is not None:
            self._process.returncode = 0


class _Client:
    """At most one server, for all threads of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.server: _Server | None = None
        self._n_failures = 0

    def fork(self, told: Told, descriptors: Mapping[int, int]) -> Forked | None:
        """As `fork` below."""
        with self._lock:
            while self._n_failures < _MOST_FAILURES:
                try:
                    forked = self._fitting().fork(told, descriptors)
                except (OSError, ValueError) as error:
                    self._failed(error)
                except BaseException:  # the answer to this job would be taken for the next one's
                    self.close()
                    raise
                else:
                    self._n_failures = 0
                    return forked
        return None

    def _fitting(self) -> _Server:
        """A server whose forks get what a process started now would get from this one."""
        limits = [resource.getrlimit(which) for which in _RLIMITS]
        conditions = (os.geteuid(), environment(""), limits)
        if self.server is not None and self.server.conditions != conditions:
            self.close()
        if self.server is None:
            self.server = _Server(conditions)
        return self.server

    def _failed(self, error: Exception) -> None:
        server, self.server = self.server, None
        if server is not None and server.end():
            return  # had nothing to do
        self._n_failures = _MOST_FAILURES if isinstance(error, _Refused) else self._n_failures + 1
        if self._n_failures < _MOST_FAILURES:
            logger.info("The fork server is replaced: %s.", error)
        else:
            logger.warning("There is no fork server, each child imports by itself: %s.", error)

    def close(self) -> None:
        """End the server, if there is one."""
        if self.server is not None:
            self.server.close()
            self.server = None


_client = _Client()


def fork(told: Told, descriptors: Mapping[int, int]) -> Forked | None:
    """Have a process forked that goes on as evaluators/sandbox.py does with the job `told`. Starts
    a server if there is none.

    Args:
        told: the job but for its home, which is the server's: libraries have read it.
        descriptors: what it gets, by the number that it gets it by.

    Returns:
        None where there can be no server, which is said in the log.
    """
    return _client.fork(told, descriptors) if sys.platform == "linux" else None


def _begin_anew() -> None:
    """In a fork of this process: the server is not its own, and the lock may be held."""
    global _client
    if _client.server is not None:
        _client.server.forget()
    _client = _Client()


atexit.register(lambda: _client.close())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
