"""Call a function in a sandboxed child, or listen to one that gives its values one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypedDict, Unpack

from quantkit.sandbox import untrusted
from quantkit.sandbox.in_force import Protection
from quantkit.sandbox.limits import Crashed, Limits
from quantkit.sandbox.outcome import check
from quantkit.sandbox.process import Child, Job, Message


class Options(TypedDict, total=False):
    """What else a call may be given, as `call` says."""

    limits: Limits
    readable: Sequence[Path]
    writable: Sequence[Path]
    log: Path
    preload: bool


def call(
    function: str, arguments: Mapping[str, Any], *, shape: Any = Any, **options: Unpack[Options]
) -> Any:
    """Run `function` ("package.module:name", a plain function of quantkit or evaluators) in a
    sandboxed child: JSON-able keyword arguments in, JSON-able value out. It reads only `readable`,
    the interpreter and its packages, and writes only into `writable` (or nowhere). No network, no
    programs, no token, nothing of the parent. In `writable` files can be made and written, but not
    renamed, removed or linked; for what is temporary it has a folder in memory of its own, where
    the system allows one. `shape` is the type of what comes back, as an annotation. `preload` is
    for what imports torch and transformers anyway: the process is a fork of one that has.

    Raises the QuantkitError that the child raised, or Crashed when it died of a signal, time,
    memory or another exception, or answered with something of another shape.
    """
    (value,) = listen(_job(function, arguments, options), "value", shape)
    return value


def stream(
    function: str, arguments: Mapping[str, Any], *, shape: Any = Any, **options: Unpack[Options]
) -> Iterator[Any]:
    """Call a generator and return its values as they come. Closing the iterator ends the child."""
    return listen(_job(function, arguments, options), "part", shape)


@cache
def protection() -> Protection:
    """Return what is in force on this machine. Tried once: a child starts and says it."""
    with Child(Job("quantkit.sandbox.in_force:nothing", {}, Limits(10, 20))) as child:
        for _ in child.messages():
            pass
    return child.ended.protection


def _job(function: str, arguments: Mapping[str, Any], options: Options) -> Job:
    if not function.startswith(("quantkit.", "evaluators.")):
        raise ValueError(f"{function} is not a function of this project")
    return Job(function, arguments, **options)


def listen(job: Job, kind: str, shape: Any = Any) -> Iterator[Any]:
    """Yield the `value` or the `part`s of a job. Raises as `call` does."""
    last = Message()
    with Child(job) as child:
        for message in filter(None, child.messages()):
            if message.kind not in ("facts", "part"):
                last = message
            if message.kind == kind:
                try:
                    value = untrusted.typed(shape, message.content)
                except untrusted.Damaged:
                    raise Crashed("answered with something that was not asked for") from None
                yield value
    check(job, child.ended, last)
