"""The converter's jobs in the sandbox (quantkit.sandbox): one of entry.py's functions in a child
that may read the model's copy and the converter, and write the output's file and nothing else.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import sandbox
from quantkit.errors import QuantkitError
from quantkit.sandbox import untrusted

Progress = Callable[[int, int], None]

_WITHOUT_TENSORS = 4 * 2**30  # libraries, and tokenizers of any size that is known
_ELEMENT_BYTES = 24  # as it is stored, in float32, moved, and as it is written
_LEAST = 2 * 2**30  # less is not tried: the end would come from the machine, without a sentence


def limits_for(
    weight_bytes: int, output_bytes: int, largest: int = 0, free: int | None = None
) -> sandbox.Limits:
    """Room for converting `weight_bytes` into a file of at most `output_bytes`, where the largest
    tensor has so many elements and the machine so many bytes of memory left. Weights that are only
    mapped are no memory.

    Measured: the imports take 10 CPU seconds, conversion about 6 seconds per GB; the converter
    holds one tensor at a time in several types.
    """
    memory = _WITHOUT_TENSORS + _ELEMENT_BYTES * largest
    gigabytes = 1 + weight_bytes // 10**9
    return sandbox.Limits(
        cpu_seconds=1800 + 120 * gigabytes,
        wall_seconds=3600 + 240 * gigabytes,  # a disk can be slow
        memory_bytes=memory if free is None else min(memory, max(free, _LEAST)),
        file_bytes=256 * 2**20 + output_bytes,
    )


@dataclass(frozen=True)
class Tables:
    """What the converter has: of text models the GGUF architecture by Hugging Face's, of projectors
    Hugging Face's.
    """

    text: dict[str, str]
    mmproj: tuple[str, ...]
    made_with: str = ""  # versions


@dataclass(frozen=True)
class Said:
    """What the jobs of entry.py report, each a part of it: a stranger's words of these types."""

    total: int = 0  # bytes that the output will have
    tokens: Any = None  # for `tokens.judged`, to whom another shape is an answer, too
    missed_ends: tuple[str, ...] = ()
    # how a tokenizer that the converter does not know splits the probes
    probes: tuple[str, ...] = ()
    plain: tuple[tuple[int, ...], ...] = ()
    special: tuple[tuple[int, ...], ...] = ()
    composes: bool = False
    # the pre-tokenizer that splits as it does
    matching: str | None = None
    same_special: bool = False
    tables: Tables | None = None


@dataclass(frozen=True)
class Outcome:
    """How a child ended, and what it said: a stranger's words."""

    ended: sandbox.Ended
    limits: sandbox.Limits
    said: Said
    end: sandbox.Message

    @property
    def is_done(self) -> bool:
        return self.end.kind == "value" or (self.end.kind == "exit" and self.end.content == 0)

    @property
    def error(self) -> str:
        """Return the name of the exception that it ended by."""
        return str(self.end.content)[:100] if self.end.kind == "error" else ""

    @property
    def ok(self) -> bool:
        return self.is_done and self.ended.why is None and self.ended.status == 0


def run(
    mode: str,
    tree: Path,
    log: Path,
    limits: sandbox.Limits,
    *,
    readable: Sequence[Path] = (),
    output: Path | None = None,
    progress: Progress | None = None,
    **job: Any,
) -> Outcome:
    """Run one function of entry.py with `job` and wait for it. Its log goes to `log`; `progress` is
    called with the bytes of `output` and the bytes it will have. `output` is made, empty, before.

    Raises QuantkitError when it says something else than entry.py does.
    """
    made = None if output is None else _make(output)
    child_job = sandbox.Job(
        f"quantkit.llamacpp.converter.entry:{mode}",
        job,
        limits,
        readable=readable,
        writable=() if output is None else (output,),
        path=(tree, tree / "gguf-py"),
        log=log,
        preload=mode != "match",  # which is llama.cpp's alone
    )
    said, end, n_written = Said(), sandbox.Message(), 0
    with sandbox.Child(child_job) as child:
        for message in child.messages():
            if message is not None and message.kind == "facts":
                said = _updated(said, message.content)
            elif message is not None:
                end = message
            elif progress is not None and output is not None:
                n_bytes = min(os.lstat(output).st_size, said.total)
                if n_bytes > n_written:  # the child goes on for a while after its last byte
                    n_written = n_bytes
                    progress(n_written, said.total)
    outcome = Outcome(child.ended, limits, said, end)
    if made is not None and output is not None:
        _check(output, made)
        if outcome.is_done and progress is not None and output.is_file():
            # A small file is written between two looks at it: its end is told in any case.
            n_bytes = output.stat().st_size
            if n_written < n_bytes:
                progress(n_bytes, n_bytes)
    return outcome


def _updated(said: Said, facts: Any) -> Said:
    try:
        return untrusted.updated(said, facts)
    except untrusted.Damaged:
        raise QuantkitError(
            "The converter gave an answer of another kind than was asked for.",
            "Check where the model came from; it may try to attack the converter.",
        ) from None


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
