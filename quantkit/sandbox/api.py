"""Call a function in a sandboxed child, or listen to one that gives its values one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from quantkit.sandbox import untrusted
from quantkit.sandbox.in_force import Protection
from quantkit.sandbox.limits import Crashed, Limits
from quantkit.sandbox.outcome import check
from quantkit.sandbox.process import Child, Job


def call(
    function: str,
    arguments: Mapping[str, Any],
    *,
    limits: Limits | None = None,
    readable: Sequence[Path] = (),
    writable: Path | None = None,
    log: Path | None = None,
    shape: Any = Any,
    preload: bool = False,
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
    job = _job(function, arguments, limits, readable, writable, log, preload)
    (value,) = listen(job, "value", shape)
    return value


def stream(
    function: str,
    arguments: Mapping[str, Any],
    *,
    limits: Limits | None = None,
    readable: Sequence[Path] = (),
    writable: Path | None = None,
    log: Path | None = None,
    shape: Any = Any,
    preload: bool = False,
) -> Iterator[Any]:
    """Call a generator and return its values as they come. Closing the iterator ends the child."""
    job = _job(function, arguments, limits, readable, writable, log, preload)
    return listen(job, "part", shape)


@cache
def protection() -> Protection:
    """Return what is in force on this machine. Tried once: a child starts and says it."""
    with Child(Job("quantkit.sandbox.in_force:nothing", {}, Limits(10, 20))) as child:
        for _ in child.messages():
            pass
    return child.ended.protection


def _job(
    function: str,
    arguments: Mapping[str, Any],
    limits: Limits | None,
    readable: Sequence[Path],
    writable: Path | None,
    log: Path | None,
    preload: bool,
) -> Job:
    if not function.startswith(("quantkit.", "evaluators.")):
        raise ValueError(f"{function} is not a function of this project")
    folders = () if writable is None else (writable,)
    return Job(function, arguments, limits or Limits(), readable, folders, log=log, preload=preload)


def listen(job: Job, kind: str, shape: Any = Any) -> Iterator[Any]:
    """Yield the `value` or the `part`s of a job. Raises as `call` does."""
    last: dict[str, Any] = {}
    with Child(job) as child:
        for message in child.messages():
            if message is not None and not {"facts", "part"} & message.keys():
                last = message
            if message is not None and kind in message:
                try:
                    value = untrusted.typed(shape, message[kind])
                except untrusted.Damaged:
                    raise Crashed("answered with something that was not asked for") from None
                yield value
    check(job, child.ended, last)
