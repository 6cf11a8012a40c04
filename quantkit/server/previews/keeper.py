"""Keeps a planner in bounds: run by its path, with nothing of quantkit but the kernel's interfaces.

    python -I -S keeper.py MEMORY_BYTES PROCESSOR_SECONDS WALL_SECONDS COMMAND...

The command and everything that it starts take at most that memory and processor time together, and
end by the clock, too, and when this process ends or its stdin closes: whoever started it is gone
then, killed or not. How it ended is the last line on stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys

sys.path.insert(0, os.path.abspath(__file__).removesuffix("/quantkit/server/previews/keeper.py"))

import select
import signal
import subprocess
import time

from evaluators import sandbox

_TICK_SECONDS = 0.2
_NICER = 5
_FORK_SERVER = f"{sys.path[0]}/quantkit/sandbox/fork_server.py".encode()


def main(argv: list[str]) -> None:
    """Start the command, watch it, and end what is left of it."""
    memory, busy, seconds, command = int(argv[1]), float(argv[2]), float(argv[3]), argv[4:]
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
        children = _children()
        used = sum(map(memory_bytes, _holders(parent, children)))
        peak = max(peak, used)
        if used > memory:
            why = "memory"
        elif time.monotonic() > deadline or processor_seconds(_below(parent, children)) > busy:
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
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        _reap()


def _reap() -> None:
    deadline = time.monotonic() + 0.1
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
        except OSError:
            return


def descendants(root: int) -> list[int]:
    """Return the processes that `root` has started, and those that they have started."""
    return _below(root, _children())


def _below(root: int, children: dict[int, list[int]]) -> list[int]:
    found, todo = [], [root]
    while todo:
        mine = children.get(todo.pop(), [])
        found += mine
        todo += mine
    return found


def memory_holders(root: int) -> list[int]:
    """Return its descendants, except those that share all of their memory with another one: the
    keeper and the init that a fork server (quantkit.sandbox) has forked. They are known by having
    children of their own, which the worker, the only process that a stranger's bytes reach, cannot
    have.
    """
    return _holders(root, _children())


def _holders(root: int, children: dict[int, list[int]]) -> list[int]:
    found = _below(root, children)
    servers = [pid for pid in found if _FORK_SERVER in _command(pid)]
    forked = {child for pid in servers for child in children.get(pid, [])}
    return [pid for pid in found if not (pid in forked and pid in servers and pid in children)]


def processor_seconds(pids: list[int]) -> float:
    """Return the processor time of processes and of those children that they have waited for."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
            ticks += sum(map(int, fields[11:15]))  # its own and its children's: user, system
    return ticks / os.sysconf("SC_CLK_TCK")


def _command(pid: int) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return []


def _children() -> dict[int, list[int]]:
    """The numbers of living processes, by that of their parent."""
    children: dict[int, list[int]] = {}
    try:
        names = os.listdir("/proc")
    except OSError:
        return {}
    for name in names:
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if fields and fields[0] not in (b"Z", b"X"):
                children.setdefault(int(fields[1]), []).append(int(name))
    return children


def memory_bytes(pid: int) -> int:
    """Return the memory of a process, without files that are only mapped."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            lines = [line.split() for line in file if line.startswith((b"RssAnon:", b"RssShmem:"))]
    except OSError:
        return 0
    return 1024 * sum(int(line[1]) for line in lines)


if __name__ == "__main__":
    main(sys.argv)
