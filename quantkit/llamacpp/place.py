"""Start the processes in which llama.cpp opens untrusted files: quantkit's sandbox.

The evaluators bring a process for every file they open (`evaluators.session`); here it is started
with nothing to read but that file and nothing to write but the folder it is given. A GPU is out of
the sandbox's reach: with layers on one, the process is a plain child.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit import sandbox
from quantkit.machine import room
from quantkit.sandbox.outcome import reason

if TYPE_CHECKING:
    from evaluators.llama_runtime import Runtime

_SERVE = "evaluators.serve:serve"
_MEMORY = 12 * 2**30  # beside twice the file, which is repacked: caches, activations, logits
_SECONDS = 30 * 86_400  # measuring takes what it takes; each request has a limit of its own
_EXPANSION = 16  # a file at F16 beside one of one bit a weight
_WEIGHTS_SHARE = 0.6  # of the free memory that weights at F16 may take


def runtime(n_threads: int = 0, n_gpu_layers: int = 0) -> Runtime:
    """Return the evaluators' runtime whose processes are sandboxed, or on a GPU plain children."""
    from evaluators.llama_runtime import Runtime
    from evaluators.session import plainly

    return Runtime(n_threads, n_gpu_layers, plainly if n_gpu_layers else sandboxed)


def weights_room(free: int) -> int:
    """Return how many bytes of weights at F16 may be in memory of which `free` bytes are free; more
    go to the disk.
    """
    return int(_WEIGHTS_SHARE * free)


def sandboxed(
    descriptors: dict[str, int], readable: Sequence[Path], writable: Path | None
) -> Sandboxed:
    """Start a sandboxed process, as an `evaluators.session.Launch` does."""
    from evaluators.session import WEIGHTS

    n_bytes = sum(path.stat().st_size for path in readable)
    n_cores = os.cpu_count() or 1
    expanded = _EXPANSION * n_bytes + 2**20
    in_memory = min(expanded, room.free().n_bytes) if WEIGHTS in descriptors else 0
    limits = sandbox.Limits(
        cpu_seconds=_SECONDS * n_cores,
        wall_seconds=_SECONDS,
        # What a file in memory holds counts twice: as the file's and, mapped, as the process's.
        memory_bytes=_MEMORY + 2 * n_bytes + 2 * in_memory,
        file_bytes=expanded if writable else in_memory,
        n_processes=64 + 4 * n_cores,
    )
    job = sandbox.Job(
        _SERVE,
        descriptors,
        limits,
        [path.absolute() for path in readable],
        [] if writable is None else [writable.absolute()],
        inherited=tuple(descriptors.values()),
    )
    return Sandboxed(job)


class Sandboxed:
    """A sandboxed process that answers by a pipe; a thread listens to what else it says."""

    def __init__(self, job: sandbox.Job) -> None:
        self._child = sandbox.Child(job)
        self._is_over = threading.Event()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        # Where memory is short nothing is heard any more: the child ends, and who asks is told.
        with suppress(MemoryError), self._child:
            for _ in self._child.messages():
                if self._is_over.is_set():
                    return

    def end(self) -> str:
        """End it if it has not ended, and say how it did, as a clause."""
        from evaluators.session import last_words

        self._listener.join(1.0)  # it may be about to end by itself, which says more
        self._is_over.set()
        self._listener.join()
        ended = self._child.ended
        return reason(self._child.job.limits, ended, sandbox.Message()) + last_words(ended.log)
