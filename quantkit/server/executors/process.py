"""A run's worker as a process of its own: it outlives the page and the server that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from quantkit.sandbox import secrets
from quantkit.server.executors.protocol import LOG_FILE

# What only the server needs to know.
_SERVER_VARIABLES = ("OAUTH_CLIENT_ID",)
_PROC = Path("/proc")
_NICE = 15  # the page answers first, then its previews


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a worker, without any secret of the server or a visitor."""
    clean = secrets.without(environment)
    child = {name: v for name, v in clean.items() if name not in _SERVER_VARIABLES}
    child.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    child["PYTHONUNBUFFERED"] = "1"
    return child


def worker_secrets(token: str | None, public: bool) -> dict[str, str]:
    """Return what a worker is told through a pipe. Whose token it uses is decided here.

    A visitor's token travels here and nowhere else. Without one, a worker of a public page is
    anonymous; one of a private page uses what this machine is logged in with.
    """
    if token or public:
        return {"QUANTKIT_HF_TOKEN": token or ""}
    return {name: value for name in secrets.HUB if (value := secrets.get(name)) is not None}


def start(
    command: Sequence[str], folder: Path, token: str | None, public: bool
) -> subprocess.Popen[bytes]:
    """Start, or go on with, the run whose config lies in `folder`, by an executor's command."""
    told = worker_secrets(token, public)
    with (folder / LOG_FILE).open("ab") as log, secrets.handed_on(told) as (more, descriptors):
        child = subprocess.Popen(
            [*command, str(folder.resolve())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**worker_environment(os.environ), **more},
            pass_fds=descriptors,
            start_new_session=True,
        )
    with suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, child.pid, _NICE)
    return child


def start_cleaning(folder: Path) -> subprocess.Popen[bytes]:
    """Drop what only the stages of a finished run needed."""
    return subprocess.Popen(
        [sys.executable, "-m", "quantkit", "clean", str(folder.resolve())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=worker_environment(os.environ),
        start_new_session=True,
    )


def started_at(pid: int | None) -> str | None:
    """Return a mark of when the process began; None if it is gone or only its exit status is
    left.
    """
    if pid is None or pid <= 0:
        return None
    try:
        # The name in parentheses may hold anything, so fields are counted from behind it.
        # Not psutil's time, which moves when somebody sets the clock.
        fields = (_PROC / f"{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        pass
    if (_PROC / "self/stat").exists():
        return None
    try:  # not Linux
        process = psutil.Process(pid)
        gone = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return None if gone else repr(process.create_time())
    except psutil.Error:
        return None


def age_seconds(pid: int | None, pid_started: str | None) -> float | None:
    """Return how long that very process has been running, by the kernel's steady clock; None where
    that cannot be known.
    """
    if not is_alive(pid, pid_started) or not (pid_started or "").isdecimal():
        return None
    try:
        up = float((_PROC / "uptime").read_text("ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return max(0.0, up - int(pid_started or 0) / os.sysconf("SC_CLK_TCK"))


def is_alive(pid: int | None, pid_started: str | None) -> bool:
    """Return whether that very process still runs."""
    now = started_at(pid)
    return now is not None and now == pid_started


def kill_group(pid: int, pid_started: str | None, number: signal.Signals) -> None:
    """Send a signal to a worker and everything it started, if it is still that worker."""
    if is_alive(pid, pid_started):
        try:
            os.killpg(pid, number)
        except ProcessLookupError:
            pass
