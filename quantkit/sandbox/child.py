"""What the parent starts: `python -I -S -B child.py`, with the job as JSON on stdin. A fork server
(fork_server.py) does the same in a fork of itself.

It is the keeper of the worker (worker.py), in which the function runs with no rights left:

    keeper    this process: ends the worker when the parent is gone, when time or memory is used up
    init      in namespaces of its own where the kernel gives them: its death ends all within
    worker    the one process that sees what a stranger wrote

Nothing is imported here but the standard library and its siblings.
"""

from __future__ import annotations

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import signal
from select import POLLHUP, POLLIN, poll
from time import monotonic

from quantkit.sandbox import kernel, mounts, usage, worker
from quantkit.sandbox.told import Told, Verdict

_POLL_SECONDS = 0.05

# From the strongest down: the first that the kernel grants is used.
_ISOLATED = kernel.NEW_PID | kernel.NEW_NET | kernel.NEW_IPC | kernel.NEW_UTS
_LADDER = (
    (True, _ISOLATED | kernel.NEW_MOUNTS),  # only root needs no user namespace
    (False, _ISOLATED | kernel.NEW_MOUNTS | kernel.NEW_USER),
    (True, _ISOLATED),
    (False, _ISOLATED | kernel.NEW_USER),
)


def main() -> None:
    """Keep the worker, and never return."""
    with open(0, "rb", closefd=False) as file:
        job = Told(**json.load(file))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    there = sum(usage.bytes_below(folder) or 0 for folder in job.folders)
    job = job._replace(total_bytes=there + job.file_bytes)
    init, told, flags = _start(job)
    kernel.set_not_dumpable()
    os.close(job.result)
    verdict = _keep(job, init, told)._replace(namespaces=_names(flags))
    if job.owns_home:
        try:
            os.rmdir(job.home)  # the parent may be gone
        except OSError:
            pass
    os.write(job.verdict, json.dumps(verdict._asdict()).encode())
    os._exit(0)


def _names(flags: int) -> tuple[str, ...]:
    known = {
        "user": kernel.NEW_USER,
        "pid": kernel.NEW_PID,
        "network": kernel.NEW_NET,
        "ipc": kernel.NEW_IPC,
        "mount": kernel.NEW_MOUNTS,
    }
    return tuple(name for name, flag in known.items() if flags & flag)


def _start(job: Told) -> tuple[int, int, int]:
    """Fork an init. Returns its number, a pipe that tells of its worker, and its namespaces."""
    possible = kernel.KNOWN_MACHINE and "namespaces" not in job.without
    for needs_root, flags in _LADDER if possible else ():
        if needs_root and os.geteuid() != 0:
            continue
        if flags & kernel.NEW_MOUNTS and "mounts" in job.without:
            continue
        try:
            started = _attempt(job, flags)
        except OSError:
            continue
        if started is not None:
            return *started, flags
    started = _attempt(job, 0)
    if started is None:
        os._exit(1)
    return *started, 0


def _attempt(job: Told, flags: int) -> tuple[int, int] | None:
    """An init in these namespaces, or None when they cannot be set up."""
    ids, keeper = (os.getuid(), os.getgid()), os.getpid()
    reading, writing = os.pipe()
    pid = kernel.fork_into(flags) if flags else os.fork()
    if pid == 0:
        try:
            os.close(reading)
            _init(job, flags, ids, keeper, writing)
        finally:
            os._exit(1)
    os.close(writing)
    if os.read(reading, 1) == b"+":
        return pid, reading
    os.close(reading)
    os.waitpid(pid, 0)
    return None


def _init(job: Told, flags: int, ids: tuple[int, int], keeper: int, writing: int) -> None:
    """Set the namespaces up, start the worker, wait for it, and tell how it ended."""
    alone = bool(flags & kernel.NEW_PID)  # its parent is out of sight then
    if not kernel.die_with_parent(0 if alone else keeper):
        return
    if flags & kernel.NEW_USER:
        kernel.map_user(*ids)
    if flags & kernel.NEW_MOUNTS:
        mounts.make_root(job.readable, job.writable, job.home, worker.SCRATCH_BYTES)
    kernel.set_not_dumpable()
    own = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            if kernel.die_with_parent(own):
                worker.run(job, flags)
        finally:
            os._exit(1)
    os.close(job.result)
    os.write(writing, b"+")  # fails when the keeper is gone
    _, status, used = os.wait4(child, 0)
    seen = Verdict(
        status,
        cpu_seconds=round(used.ru_utime + used.ru_stime, 3),
        peak_bytes=used.ru_maxrss * (1024 if sys.platform == "linux" else 1),
    )
    os.write(writing, json.dumps(seen._asdict()).encode())


def _keep(job: Told, init: int, told: int) -> Verdict:
    """Wait for the end of the worker, or bring it about. Returns what is known about it."""
    deadline = monotonic() + job.wall_seconds
    events = poll()
    events.register(job.lifeline, POLLIN | POLLHUP)
    events.register(told, POLLIN | POLLHUP)
    number: int | None = None
    why: str | None = None
    while why is None:
        ready = {descriptor for descriptor, _ in events.poll(1000 * _POLL_SECONDS)}
        if told in ready:
            break
        if job.lifeline in ready:
            why = "parent"
        elif monotonic() > deadline:
            why = "wall"
        else:
            number = number or usage.only_child(init)
            why = usage.too_much(number, job) if number else None
    if why is not None:
        os.kill(init, signal.SIGKILL)
    elif usage.writes_too_much(job):
        why = "bytes"  # all of it was written since the last look
    text = b"" if why is not None else os.read(told, 2**16)
    os.waitpid(init, 0)
    seen = Verdict(**json.loads(text)) if text else Verdict()
    return seen._replace(why=why)


if __name__ == "__main__":
    main()
