"""Explain how a sandboxed call ended, in a sentence."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.sandbox.limits import Crashed, Limits
from quantkit.sandbox.process import Ended, Job

_MOST_WORDS = 2000


def plain(text: object) -> str:
    """Return a stranger's words on one line, without control characters, cut to what a sentence
    needs.
    """
    cut = str(text)[:_MOST_WORDS]
    return " ".join("".join(c if c.isprintable() else " " for c in cut).split())


def check(job: Job, ended: Ended, last: Mapping[str, Any]) -> None:
    """Return when the function returned. Raises QuantkitError or Crashed otherwise."""
    if ended.why is None and ended.status == 0 and "value" in last:
        return
    if ended.why is None and last.get("ours") is True:
        raise QuantkitError(plain(last.get("message")), plain(last.get("remedy", "")))
    raise Crashed(reason(job.limits, ended, last))


def reason(limits: Limits, ended: Ended, last: Mapping[str, Any]) -> str:
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
    if last.get("error") == "MemoryError":
        return memory
    if "error" in last:
        return f"failed with {plain(last['error'])}: {plain(last.get('message'))}".rstrip(". :")
    if "exit" in last:
        return f"ended early: {plain(last.get('message'))}".rstrip(". :")
    if ended.signal:
        return f"crashed ({signal.Signals(ended.signal).name})"
    if ended.status is None:  # the keeper has nothing to say of a worker
        return f"could not be started: {plain(ended.log[-500:])}".rstrip(". :")
    return "ended without an answer"
