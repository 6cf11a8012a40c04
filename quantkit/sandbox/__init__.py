"""Run one function where it can do no harm, for everything that parses a stranger's bytes.

What is started, gives up every right and is kept within limits is evaluators/sandbox.py. Here:

    api.py         call, stream, protection
    limits.py      Limits and Crashed
    outcome.py     how it ended, in a sentence
    in_force.py    what of all this the kernel granted
    process.py     the parent's side: start, listen, end
    start.py       the environment and the home of what is started
    fork_server.py what is started once, imports torch and transformers, and forks such processes
    fork_client.py the parent's side of it
    places.py      what has to be read whatever the function is
    untrusted.py   what came back, read as what was asked for
    secrets.py     tokens, in memory only

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
