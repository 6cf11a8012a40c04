"""Keeps a planner in bounds: run by its path, with psutil and the kernel's interfaces alone.

    python -I -S keeper.py PACKAGES MEMORY_BYTES PROCESSOR_SECONDS WALL_SECONDS COMMAND...

PACKAGES is the folder of psutil. The command and everything that it starts take at most that memory
and processor time together, and end by the clock, too, and when this process's stdin closes, on
Linux also when it ends: whoever started it is gone then, killed or not. How it ended is the last
line on stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys

sys.path.insert(0, os.path.abspath(__file__).removesuffix("/quantkit/server/previews/keeper.py"))
if __name__ == "__main__":
    sys.path.append(sys.argv[1])

import select
import subprocess
import time

import psutil

from evaluators import sandbox

_TICK_SECONDS = 0.2
_NICER = 5
_FORK_SERVER = f"{sys.path[0]}/quantkit/sandbox/fork_server.py"


def main(argv: list[str]) -> None:
    """Start the command, watch it, and end what is left of it."""
    memory, busy, seconds, command = int(argv[2]), float(argv[3]), float(argv[4]), argv[5:]
    sandbox.set_not_dumpable()  # a token may be on its way through
    sandbox.adopt_orphans()
    parent = os.getpid()

    def prepare() -> None:
        os.nice(_NICER)  # after the page, before runs
        if not sandbox.die_with_parent(parent):
            os._exit(1)

    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=False, preexec_fn=prepare)
    why, peak, deadline = "", 0, time.monotonic() + seconds
    while child.poll() is None and not why:
        closed, _, _ = select.select([0], [], [], _TICK_SECONDS)
        if closed and not os.read(0, 1):
            why = "gone"
        found = descendants(parent)
        used = sum(map(memory_bytes, _holders(found)))
        peak = max(peak, used)
        if used > memory:
            why = "memory"
        elif time.monotonic() > deadline or sum(map(processor_seconds, found)) > busy:
            why = "time"
    told = {"ended": why or child.poll(), "peak_bytes": peak}
    try:
        os.write(1, (json.dumps(told) + "\n").encode())
    except OSError:  # nobody listens
        why = why or "gone"
    for _ in range(100):  # what is started meanwhile is found by the next look
        left = descendants(parent)
        if not left:
            return
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        _reap()


def _reap() -> None:
    deadline = time.monotonic() + 0.1
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
        except OSError:
            return


def descendants(root: int) -> list[psutil.Process]:
    """Return the processes that `root` has started, and those that they have started. On Linux it
    has adopted those whose parent is gone; elsewhere they are not found.
    """
    try:
        return psutil.Process(root).children(recursive=True)
    except psutil.Error:
        return []


def memory_holders(root: int) -> list[psutil.Process]:
    """Return its descendants, except those that share all of their memory with another one: the
    keeper and the init that a fork server (quantkit.sandbox) has forked. They are known by having
    children of their own, which the worker, the only process that a stranger's bytes reach, cannot
    have.
    """
    return _holders(descendants(root))


def _holders(found: list[psutil.Process]) -> list[psutil.Process]:
    parents, servers = {}, set()
    for process in found:
        with contextlib.suppress(psutil.Error):
            parents[process.pid] = process.ppid()
            if _FORK_SERVER in process.cmdline():
                servers.add(process.pid)
    forked = {pid for pid in servers if parents[pid] in servers} & set(parents.values())
    return [process for process in found if process.pid not in forked]


def processor_seconds(process: psutil.Process) -> float:
    """Return the processor time of a process and, on Linux, of those children that it has waited
    for.
    """
    try:
        return sum(process.cpu_times()[:4])  # its own and its children's: user, system
    except psutil.Error:
        return 0.0


def memory_bytes(process: psutil.Process) -> int:
    """Return the memory of a process, without files that are only mapped where the system tells
    them apart: psutil's figures of Linux lack what is shared without a file.
    """
    try:
        if not sandbox.LINUX:
            return int(process.memory_info().rss)
        with open(f"/proc/{process.pid}/status", "rb") as file:
            lines = [line.split() for line in file if line.startswith((b"RssAnon:", b"RssShmem:"))]
    except (OSError, psutil.Error):
        return 0
    return 1024 * sum(int(line[1]) for line in lines)


if __name__ == "__main__":
    main(sys.argv)
