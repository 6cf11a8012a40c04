"""Explain how a sandboxed call ended, in a sentence."""

from __future__ import annotations

import signal

from quantkit.errors import QuantkitError
from quantkit.sandbox.limits import Crashed, Limits
from quantkit.sandbox.process import Ended, Job, Message

_MOST_WORDS = 2000


def plain(text: object) -> str:
    """Return a stranger's words on one line, without control characters, cut to what a sentence
    needs.
    """
    cut = str(text)[:_MOST_WORDS]
    return " ".join("".join(c if c.isprintable() else " " for c in cut).split())


def check(job: Job, ended: Ended, last: Message) -> None:
    """Return when the function returned. Raises QuantkitError or Crashed otherwise."""
    if ended.why is None and ended.status == 0 and last.kind == "value":
        return
    if ended.why is None and last.ours:
        raise QuantkitError(plain(last.message), plain(last.remedy))
    raise Crashed(reason(job.limits, ended, last))


def reason(limits: Limits, ended: Ended, last: Message) -> str:
    """Return why there is no answer, as a clause."""
    memory = f"needed more than its {limits.memory_bytes:,} bytes of memory"
    by_limit = {
        "wall": f"was stopped after {limits.wall_seconds:,} seconds",
        "memory": memory,
        "processes": f"started more than {limits.n_processes:,} threads",
        "bytes": f"wrote more than its {limits.file_bytes:,} bytes",
        "answer": "answered with more than can be read",
    }
    if ended.why in by_limit:
        return by_limit[ended.why]
    used_up = f"used up its {limits.cpu_seconds:,} seconds of processor time"
    if ended.signal == signal.SIGXCPU:
        return used_up
    if ended.signal == signal.SIGKILL:
        spent = ended.cpu_seconds >= limits.cpu_seconds
        return used_up if spent else "was killed, most likely because the machine ran out of memory"
    if ended.signal == signal.SIGXFSZ:
        return by_limit["bytes"]
    if last.kind == "error" and last.content == "MemoryError":
        return memory
    if last.kind == "error":
        return f"failed with {plain(last.content)}: {plain(last.message)}".rstrip(". :")
    if last.kind == "exit":
        return f"ended early: {plain(last.message)}".rstrip(". :")
    if ended.signal:
        return f"crashed ({signal.Signals(ended.signal).name})"
    if ended.status is None:  # the keeper has nothing to say of a worker
        return f"could not be started: {plain(ended.log[-500:])}".rstrip(". :")
    return "ended without an answer"
