"""The fork server: `python -I -S -B fork_server.py`, started as evaluators/sandbox.py is.

It imports what many jobs need, once, and then forks for every job that it is handed: the fork goes
on as that does, and only there the job is read. This process reads nothing of a stranger, and
has one thread: a fork takes no other along, and a lock that one held would stay locked.

It ends with its parent, or when it had nothing to do for a while. The parent's side is
fork_client.py.
"""

from __future__ import annotations

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import fcntl
import gc
import socket
from importlib import import_module
from select import POLLHUP, POLLIN, poll
from time import monotonic

from evaluators import sandbox

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_TICK_SECONDS = 0.5
_MOST_DESCRIPTORS = 250  # the kernel takes 253 in one message


def main() -> None:
    parent = os.getppid()
    with open(0, "rb", closefd=False) as file:
        told = json.load(file)
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)  # is 0 now
    sandbox.set_not_dumpable()
    control = socket.socket(fileno=told["control"])
    sys.path[:] = told["path"]
    try:
        os.close(os.pidfd_open(os.getpid()))  # which Linux has since 5.3
        for name in told["modules"]:
            import_module(name)
    except Exception as error:
        _answer(control, "failed", f"{type(error).__name__}: {error}"[:2000])
        os._exit(1)
    gc.collect()
    gc.freeze()  # what a collection looks at would be copied for every fork
    _answer(control, "done", _resident_bytes())
    is_idle = _serve(control, parent, told["idle_seconds"])
    try:
        os.rmdir(os.environ["HOME"])  # the parent may be gone
    except OSError:
        pass
    os._exit(told["idle_status"] if is_idle else 0)


def _serve(control: socket.socket, parent: int, idle_seconds: float) -> bool:
    """Fork for every message, until the parent is gone, its end is closed and all has ended, or
    there was nothing to do for so long. Says whether it was that.
    """
    working: set[int] = set()
    events = poll()
    events.register(control, POLLIN | POLLHUP)
    is_open, last = True, monotonic()
    while os.getppid() == parent and (is_open or working):
        ready = events.poll(1000 * _TICK_SECONDS)
        working = {pid for pid in working if os.waitpid(pid, os.WNOHANG)[0] == 0}
        if ready:
            message, received, _, _ = socket.recv_fds(control, 2**16, _MOST_DESCRIPTORS)
            if message:
                working |= _fork(control, json.loads(message), received)
            else:
                is_open = False
                events.unregister(control)
            for descriptor in received:
                os.close(descriptor)
        if ready or working:
            last = monotonic()
        elif monotonic() - last > idle_seconds:
            return True
    return False


def _fork(control: socket.socket, numbers: Sequence[int], received: Sequence[int]) -> set[int]:
    """Fork a keeper, which gets the received descriptors by these numbers."""
    n_threads = len(os.listdir("/proc/self/task"))
    if n_threads != 1:
        _answer(control, "refused", f"{n_threads} threads run in it")
        return set()
    pid = os.fork()
    if pid:
        return {pid}
    try:
        # The keeper answers itself: without an answer no job runs.
        descriptor = os.pidfd_open(os.getpid())
        socket.send_fds(control, [json.dumps(["done", os.getpid()]).encode()], [descriptor])
        os.close(descriptor)
        _take(numbers, received)
        os.setsid()
        # A program that was just started is, too, so that it may write the map of its users; main()
        # ends it.
        sandbox.set_dumpable()
        sandbox.main()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(1)


def _take(numbers: Sequence[int], received: Sequence[int]) -> None:
    """Give descriptors their numbers, and close all others: the server's own among them."""
    above = max(*numbers, *received) + 1
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, above) for descriptor in received]
    os.closerange(3, above)
    for number, descriptor in zip(numbers, moved, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)


def _answer(control: socket.socket, kind: str, said: object) -> None:
    control.send(json.dumps([kind, said]).encode())


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
