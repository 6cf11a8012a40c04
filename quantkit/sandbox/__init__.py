"""Run one function where it can do no harm, for everything that parses a stranger's bytes.

    api.py         call, stream, protection
    limits.py      Limits and Crashed
    outcome.py     how it ended, in a sentence
    in_force.py    what of all this the kernel granted
    process.py     the parent's side: start, listen, end
    told.py        what goes between its processes
    start.py       how every process is started
    child.py       what is started: the keeper and the init around the worker
    usage.py       what the worker takes, as its keeper sees it
    fork_server.py what is started once, imports torch and transformers, and forks such children
    fork_client.py the parent's side of it
    worker.py      gives up every right, then runs the function
    kernel.py      namespaces, Landlock, capabilities: the kernel's own interfaces
    seccomp.py     the filter of system calls
    mounts.py      a file system that holds only what may be read
    places.py      what has to be read whatever the function is

Nothing is imported before it is used: the child imports this package, too, and has to be quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit.sandbox.api import call as call
    from quantkit.sandbox.api import protection as protection
    from quantkit.sandbox.api import stream as stream
    from quantkit.sandbox.in_force import Protection as Protection
    from quantkit.sandbox.limits import Crashed as Crashed
    from quantkit.sandbox.limits import Limits as Limits
    from quantkit.sandbox.process import Child as Child
    from quantkit.sandbox.process import Ended as Ended
    from quantkit.sandbox.process import Job as Job
    from quantkit.sandbox.process import Message as Message

_WHERE = {
    **dict.fromkeys(("call", "protection", "stream"), "api"),
    **dict.fromkeys(("Crashed", "Limits"), "limits"),
    **dict.fromkeys(("Child", "Ended", "Job", "Message"), "process"),
    "Protection": "in_force",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(name)
    return getattr(import_module(f"quantkit.sandbox.{_WHERE[name]}"), name)
