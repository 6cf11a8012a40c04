"""The places where runs are done. Another one is a file with an `Executor`, and a row here."""

from __future__ import annotations

from quantkit.errors import UsageError
from quantkit.server.executors.hf_jobs.executor import HfJobs
from quantkit.server.executors.local import Local
from quantkit.server.executors.protocol import Executor

HERE, AUTO = "here", "auto"  # as the form and the API have it
LOCAL, HF_JOBS = Local(), HfJobs()
EXECUTORS: dict[str, Executor] = {
    LOCAL.name: LOCAL,
    HF_JOBS.name: HF_JOBS,
}


def of_record(name: str, machine: str | None) -> str:
    """Return the name of a record's executor; records of before executors had names say where a
    run is done by its machine.
    """
    return name or (LOCAL.name if machine is None else HF_JOBS.name)


def remote() -> tuple[Executor, ...]:
    """Return the executors elsewhere that this server can use."""
    return tuple(e for e in EXECUTORS.values() if e.is_remote and e.lacks() is None)


def asked(where: str) -> tuple[Executor, str]:
    """Return the executor and the machine that `where` means: `here`, EXECUTOR, EXECUTOR:MACHINE,
    `auto` or a MACHINE of Hugging Face. Raise UsageError.
    """
    if where == HERE:
        return LOCAL, AUTO
    name, colon, machine = where.partition(":")
    if not colon and name not in EXECUTORS:
        return HF_JOBS, where
    if name not in EXECUTORS:
        raise UsageError(f"There is no {name[:40]!r}.", "Use one of " + ", ".join(EXECUTORS) + ".")
    return EXECUTORS[name], machine or AUTO
