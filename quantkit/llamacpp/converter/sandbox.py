"""The converter's jobs in the sandbox (quantkit.sandbox): one of entry.py's functions in a child
that may read the model's copy and the converter, and write the output's file and nothing else.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit import sandbox
from quantkit.errors import QuantkitError

Progress = Callable[[int, int], None]

_ENDS = ("error", "message")  # only an end has them
_MOST_WORDS = 4000
_MODES = {"convert": "convert", "list": "list_architectures", "match": "match"}

_WITHOUT_TENSORS = 4 * 2**30  # libraries, and tokenizers of any size that is known
_ELEMENT_BYTES = 24  # as it is stored, in float32, moved, and as it is written
_LEAST = 2 * 2**30  # less is not tried: the end would come from the machine, without a sentence


@dataclass(frozen=True)
class Limits:
    """What a child may use. Sizes in bytes; weights that are only mapped are no memory."""

    cpu_seconds: int
    wall_seconds: int
    memory_bytes: int
    file_bytes: int

    @classmethod
    def for_weights(
        cls, weight_bytes: int, output_bytes: int, largest: int = 0, free: int | None = None
    ) -> Limits:
        """Return the limits for converting `weight_bytes` into a file of at most `output_bytes`,
        where the largest tensor has so many elements and the machine so many bytes of memory left.

        Measured: the imports take 10 CPU seconds, conversion about 6 seconds per GB; the converter
        holds one tensor at a time in several types.
        """
        memory = _WITHOUT_TENSORS + _ELEMENT_BYTES * largest
        gigabytes = 1 + weight_bytes // 10**9
        return cls(
            cpu_seconds=1800 + 120 * gigabytes,
            wall_seconds=3600 + 240 * gigabytes,  # a disk can be slow
            memory_bytes=memory if free is None else min(memory, max(free, _LEAST)),
            file_bytes=256 * 2**20 + output_bytes,
        )


@dataclass(frozen=True)
class Outcome:
    """How a child ended, and what it reported: a stranger's words."""

    ended: sandbox.Ended
    limits: Limits
    status: dict[str, Any] = field(default_factory=dict)
    done: bool = False

    @property
    def ok(self) -> bool:
        return self.done and self.ended.why is None and self.ended.status == 0

    @property
    def log(self) -> str:
        return self.ended.log

    @property
    def protection(self) -> sandbox.Protection:
        return self.ended.protection


def run(
    mode: str,
    tree: Path,
    log: Path,
    limits: Limits,
    *,
    readable: Sequence[Path] = (),
    output: Path | None = None,
    progress: Progress | None = None,
    **job: Any,
) -> Outcome:
    """Run one job of entry.py and wait for it. Its log goes to `log`; `progress` is called with the
    bytes of `output` and the bytes it will have. `output` is made, empty, before the job.
    """
    made = None if output is None else _make(output)
    child_job = sandbox.Job(
        f"quantkit.llamacpp.converter.entry:{_MODES[mode]}",
        {"job": {**job, "tree": str(tree)}},
        sandbox.Limits(
            limits.cpu_seconds, limits.wall_seconds, limits.memory_bytes, limits.file_bytes
        ),
        readable=readable,
        writable=() if output is None else (output,),
        path=(tree, tree / "gguf-py"),
        log=log,
        preload=mode != "match",  # which is llama.cpp's alone
    )
    status: dict[str, Any] = {}
    done = False
    n_written = 0
    with sandbox.Child(child_job) as child:
        for message in child.messages():
            if message is not None and isinstance(message.get("facts"), dict):
                status.update({k: v for k, v in message["facts"].items() if k not in _ENDS})
            elif message is not None:
                done = "value" in message or message.get("exit") == 0
                status.update({k: str(message[k])[:_MOST_WORDS] for k in _ENDS if k in message})
                if message.get("exit"):
                    status["error"] = "SystemExit"
            elif progress is not None and output is not None:
                total = status.get("total")
                total = total if type(total) is int else 0
                n_bytes = min(os.lstat(output).st_size, total)
                if n_bytes > n_written:  # the child goes on for a while after its last byte
                    n_written = n_bytes
                    progress(n_written, total)
    if made is not None and output is not None:
        _check(output, made)
        if done and progress is not None and output.is_file():
            # A small file is written between two looks at it: its end is told in any case.
            n_bytes = output.stat().st_size
            progress(n_bytes, n_bytes)
    return Outcome(child.ended, limits, status, done)


def _make(output: Path) -> tuple[int, int]:
    """An empty file, new or not. Returns what it is known by."""
    output.unlink(missing_ok=True)
    descriptor = os.open(output, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o666)
    found = os.fstat(descriptor)
    os.close(descriptor)
    return found.st_dev, found.st_ino


def _check(output: Path, made: tuple[int, int]) -> None:
    """Raises QuantkitError when `output` is not the very file that was made."""
    try:
        found = os.lstat(output)
    except OSError:
        return  # it failed: the reason is in the outcome
    if (found.st_dev, found.st_ino) != made or not stat.S_ISREG(found.st_mode):
        output.unlink()
        raise QuantkitError(
            f"{output.name} was replaced while the model was converted.",
            "Convert again; the model may try to attack the converter.",
        )
