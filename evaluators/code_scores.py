"""Score programs that a model wrote, each in a sandbox of its own: no network, no other programs,
nothing outside to be read or written, and limits of time and memory (`evaluators.sandbox`).

It stands in for `code_eval` of the package `evaluate`, which lm-evaluation-harness's code tasks
(HumanEval, MBPP and those made of them) ask for by name and which runs programs in the harness's
own process. Same programs, same pass@k (Chen et al. 2021); a program passes if it ends without an
exception.
"""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from evaluators import sandbox
from evaluators.errors import EvaluationError

CODE_EVAL = "code_eval"

# The harness gives a program 3 seconds by the clock. Here it is processor time, so that a busy
# machine fails nobody, and the clock only ends what waits.
_CPU_SECONDS = 4
_WALL_SECONDS = 20
_MEMORY_BYTES = 1 << 30
_MOST_THREADS = 8
_MOST_SAID = 1 << 16
_GRACE_SECONDS = 10.0


@cache
def check_sandbox() -> None:
    """Raise EvaluationError where the kernel cannot keep a program from files and system calls."""
    if not _passes("pass\n"):
        raise EvaluationError(
            "This system has no sandbox for code that a model wrote: seccomp, and Landlock or mount"
            " namespaces, are needed.",
            "Run code tasks on Linux (5.13 or later, x86-64 or arm64), or leave them out.",
        )


def passes(program: str) -> bool:
    """Return whether a Python program ends without an exception, within 4 seconds of processor time
    and 1 GiB of memory. Raises EvaluationError where there is no sandbox.
    """
    check_sandbox()
    return _passes(program)


def _passes(program: str) -> bool:
    with tempfile.TemporaryDirectory(prefix="code-") as folder:
        path = Path(folder, "program.py")
        path.write_text(program, "utf-8", "surrogatepass")
        home = Path(folder, "home")  # a name alone, without a file system of its own
        home.mkdir()
        said = _run(str(path), str(home))
    last = said[-1] if said else {}
    # sys.exit and os._exit are no success: the tests stand below
    return last.get("kind") == "value" and last.get("content") is None


def _run(path: str, home: str) -> list[dict[str, Any]]:
    """What the worker said, nothing when it did not end by itself."""
    (result, result_w), (verdict, verdict_w), (lifeline, lifeline_w) = (os.pipe() for _ in range(3))
    told = sandbox.Told(
        "evaluators.sandbox:run_file",
        {"path": path},
        cpu_seconds=_CPU_SECONDS,
        wall_seconds=_WALL_SECONDS,
        memory_bytes=_MEMORY_BYTES,
        file_bytes=0,
        n_processes=_MOST_THREADS,
        path=list(sandbox.import_path()),
        readable=[*sandbox.interpreter(), path],
        writable=[],
        folders=[],
        mapped_bytes=0,
        address_bytes=None,
        without=[],
        inherited=[],
        result=result_w,
        verdict=verdict_w,
        lifeline=lifeline,
        home=home,
        strict=True,
    )
    given = (result_w, verdict_w, lifeline)
    process = None
    try:
        process = sandbox.start(told._asdict(), _environment(home), given, subprocess.DEVNULL)
    finally:
        for descriptor in given:
            os.close(descriptor)
        if process is None:
            for descriptor in (result, verdict, lifeline_w):
                os.close(descriptor)
    deadline = time.monotonic() + _WALL_SECONDS + _GRACE_SECONDS
    try:
        said = _read(result, deadline)
        ended = json.loads(_read(verdict, deadline) or b"{}")
        lines = [json.loads(line) for line in said.splitlines()]
    except ValueError:  # it wrote something of its own
        return []
    finally:
        os.close(lifeline_w)  # ends the rest, if there is any
        os.close(result)
        os.close(verdict)
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    is_whole = ended.get("why") is None and ended.get("status") == 0
    return [line for line in lines if isinstance(line, dict)] if is_whole else []


def _read(descriptor: int, deadline: float) -> bytes:
    """All that comes, nothing if it is too much or too late."""
    parts = bytearray()
    while (left := deadline - time.monotonic()) > 0 and len(parts) <= _MOST_SAID:
        if select.select([descriptor], [], [], left)[0]:
            data = os.read(descriptor, _MOST_SAID)
            if not data:
                return bytes(parts)
            parts += data
    return b""


def _environment(home: str) -> dict[str, str]:
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX"), "1")
    return {"PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", **one}


class CodeEval:
    """What `evaluate.load("code_eval")` gives, but that programs run in the sandbox."""

    def compute(
        self,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
    ) -> tuple[dict[str, float], list[list[bool]]]:
        """Return {"pass@k": mean of its estimates} of problems with tests `references` and several
        programs each, and which of them passed.
        """
        passed = [
            [passes(f"{program}\n{tests}") for program in programs]
            for tests, programs in zip(references, predictions, strict=True)
        ]
        least = min(map(len, passed))
        estimates = {
            f"pass@{n}": sum(pass_at(n, len(one), sum(one)) for one in passed) / len(passed)
            for n in k
            if n <= least
        }
        return estimates, passed


def pass_at(k: int, n: int, n_passed: int) -> float:
    """Return the unbiased estimate that one of `k` programs passes, of `n` that were tried."""
    return 1.0 - math.comb(n - n_passed, k) / math.comb(n, k)


@contextmanager
def in_sandbox() -> Iterator[None]:
    """Have whoever imports `evaluate` get `CodeEval` from it, and no program of the Hub's. The
    package itself, which takes seconds to import, is not.
    """

    def load(path: str, *_: Any, **__: Any) -> CodeEval:
        if path == CODE_EVAL:
            check_sandbox()
            return CodeEval()
        raise EvaluationError(
            f"The task's metric {path} is a program from the Hub, which is not run here.",
            "Leave the task out.",
        )

    stand_in = ModuleType("evaluate")
    stand_in.load = load  # type: ignore[attr-defined]
    before = sys.modules.get("evaluate")
    sys.modules["evaluate"] = stand_in
    try:
        yield
    finally:
        del sys.modules["evaluate"]
        if before is not None:
            sys.modules["evaluate"] = before


def is_scored_here(task: Any) -> bool:
    """Return whether a task of the harness has its programs run by `CodeEval`."""
    for function in task._metric_fn_list.values():
        names = getattr(getattr(function, "__self__", function), "__globals__", {})
        if any(isinstance(value, CodeEval) for value in names.values()):
            return True
    return False
