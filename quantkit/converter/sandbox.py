"""Start `entry.py` in a child process that can do no harm, watch it, and end it.

The child gets a stripped environment, Python's isolated mode, limits, no network (see entry.py for
how) and its own session; it dies with its parent and is killed with its whole group on a cancel.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Progress = Callable[[int, int], None]

ENTRY = Path(__file__).with_name("entry.py")
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Limits:
    """What a child may use. Sizes in bytes. The address space counts every mapping, libraries and
    weights that are only mapped included, so it is far above the memory that is really used.
    """

    cpu_seconds: int
    wall_seconds: int
    address_bytes: int
    file_bytes: int

    @classmethod
    def for_weights(cls, weight_bytes: int, output_bytes: int) -> Limits:
        """Room for converting `weight_bytes` into a file of at most `output_bytes`.

        Measured: the imports take 10 CPU seconds, conversion about 6 seconds per GB; the converter
        holds one tensor at a time in several types.
        """
        gigabytes = 1 + weight_bytes // 10**9
        return cls(
            cpu_seconds=1800 + 120 * gigabytes,
            wall_seconds=3600 + 240 * gigabytes,  # a disk can be slow
            address_bytes=24 * 2**30 + 2 * weight_bytes,
            file_bytes=256 * 2**20 + output_bytes,
        )


@dataclass(frozen=True)
class Outcome:
    """How a child ended, what it reported, and the end of its log."""

    returncode: int
    status: dict[str, Any]
    log: str
    timed_out: bool
    limits: Limits

    @property
    def ok(self) -> bool:
        return self.returncode == 0 and self.status.get("done") is True


def environment(home: Path) -> dict[str, str]:
    """All that the child sees of the environment: no token, no cache, no proxy."""
    n_threads = str(min(8, os.cpu_count() or 1))
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return {
        **kept,
        "HOME": str(home),
        "TMPDIR": str(home),
        "HF_HOME": str(home),
        "LANG": "C.UTF-8",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        # Each thread and malloc arena reserves address space, which is limited.
        "OMP_NUM_THREADS": n_threads,
        "MALLOC_ARENA_MAX": "2",
    }


def run(
    mode: str,
    tree: Path,
    log: Path,
    limits: Limits,
    *,
    folder: Path | None = None,
    output: Path | None = None,
    progress: Progress | None = None,
    **job: Any,
) -> Outcome:
    """Run one job of `entry.py` and wait for it. Its log goes to `log`; `progress` is called with
    the bytes of `output` and the bytes it will have. The child's home is made in `folder`, by
    default beside the log; only a kill of this process leaves it there.
    """
    with tempfile.TemporaryDirectory(dir=folder or log.parent, prefix="sandbox-") as scratch:
        home = Path(scratch)
        status = home / "status.json"
        hard = dataclasses.asdict(limits)
        hard.pop("wall_seconds")
        job_file = home / "job.json"
        job_file.write_text(
            json.dumps(
                {
                    **job,
                    "mode": mode,
                    "tree": str(tree),
                    "status": str(status),
                    "parent": os.getpid(),
                    "limits": hard,
                }
            )
        )
        with log.open("wb") as log_file:
            child = subprocess.Popen(
                # -I: no PYTHON* variables, no user site, no current folder. -B: the converter's
                # tree is hashed, so nothing may be written into it.
                [sys.executable, "-I", "-B", str(ENTRY), str(job_file)],
                env=environment(home),
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            timed_out = _watch(child, status, output, progress, limits.wall_seconds)
        finally:
            _kill(child)
        reported = json.loads(status.read_text()) if status.exists() else {}
    text = log.read_bytes()[-(2**20) :].decode("utf-8", errors="replace")
    return Outcome(child.returncode, reported, text, timed_out, limits)


def _watch(
    child: subprocess.Popen[bytes],
    status: Path,
    output: Path | None,
    progress: Progress | None,
    wall_seconds: int,
) -> bool:
    """Wait for the child's end and pass its progress on. True when it took too long."""
    deadline = time.monotonic() + wall_seconds
    total = done = 0
    while True:
        try:
            child.wait(_POLL_SECONDS)
            return False
        except subprocess.TimeoutExpired:
            pass
        if time.monotonic() > deadline:
            return True
        if progress is not None and output is not None and status.exists():
            total = total or json.loads(status.read_text()).get("total", 0)
            n_bytes = min(output.stat().st_size, total) if output.exists() else 0
            if n_bytes > done:  # the child goes on for a while after its last byte
                done = n_bytes
                progress(done, total)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End the child's whole session, if any of it is left."""
    if child.returncode is None:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        child.wait()
