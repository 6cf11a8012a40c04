"""The caller's side of a process that has a file open in llama.cpp (`evaluators.serve`): requests
and answers one at a time, as lines of JSON, and logits in memory that both see.

The file may be anybody's, so what comes back is a stranger's word: bounded, plain JSON, its texts
cleaned. A process that dies, or does not answer in time, is an EvaluationError.
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from evaluators.errors import EvaluationError, printable

T = TypeVar("T")

_MOST_ANSWERED = 1 << 30
_REMEDY = "Download or make the file again; it may be broken, or need more memory than there is."


WEIGHTS = "weights"  # the descriptor of a file in memory for them

Memory = Callable[[int], NDArray[np.float32]]  # so many numbers that both ends see


class Process(Protocol):
    """A process that was launched."""

    def end(self) -> str:
        """End it if it has not ended, and say how it did, as a clause."""


class Launch(Protocol):
    """Starts `evaluators.serve:serve(**descriptors)` somewhere. The process inherits the
    descriptors, and has to read `readable` and may write into `writable`.
    """

    def __call__(
        self,
        descriptors: dict[str, int],
        readable: Sequence[Path],
        writable: Path | None,
    ) -> Process: ...


class _Plain:
    """A child process like any other."""

    def __init__(self, descriptors: dict[str, int]) -> None:
        # The child must find this package however its parent did.
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._child = subprocess.Popen(
            [sys.executable, "-m", "evaluators.serve", json.dumps(descriptors)],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=tuple(descriptors.values()),
        )
        self._said: deque[bytes] = deque(maxlen=16)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._child.stderr is not None
        while line := self._child.stderr.readline(4096):
            self._said.append(line)

    def end(self) -> str:
        try:
            self._child.wait(1.0)  # it may be about to end by itself, which says more
        except subprocess.TimeoutExpired:
            self._child.kill()
        code = self._child.wait()
        self._reader.join(1.0)
        if self._child.stderr is not None and not self._reader.is_alive():
            self._child.stderr.close()
        how = f"ended by signal {-code}" if code < 0 else f"ended with status {code}"
        return how + last_words(b"".join(self._said).decode("utf-8", "replace"))


def as_it_is(value: Any) -> Any:
    """Return plain JSON that is only shown or kept."""
    return value


def whole_numbers(value: Any) -> list[int]:
    """Return a list of 32-bit integers from JSON. Raises ValueError, TypeError for anything
    else.
    """
    if any(type(number) is not int or abs(number) >= 1 << 31 for number in value):
        raise ValueError("they are no whole numbers")
    return list(value)


def last_words(log: str) -> str:
    """Return ' (the assertion that failed)' or the like, from a process's last output."""
    lines = [line for line in log.splitlines() if line.strip()]
    told = [line for line in lines if "ASSERT" in line or "rror" in line] or lines
    words = printable(told[-1].rsplit("/", 1)[-1])[:300].rstrip(".") if told else ""
    return f" ({words})" if words else ""


def plainly(
    descriptors: dict[str, int], readable: Sequence[Path], writable: Path | None
) -> Process:
    """Launch a child process that may do what its parent may."""
    return _Plain(descriptors)


class _Here:
    """A thread of this very process."""

    def __init__(self, requests: int, answers: int, memory: Memory) -> None:
        serve = importlib.import_module("evaluators.serve")  # which stands above this
        given = os.dup(requests), os.dup(answers), memory
        self._thread = threading.Thread(target=serve.answer_requests, args=given, daemon=True)
        self._thread.start()

    def end(self) -> str:
        self._thread.join()
        return "ended"


class Session:
    """One process and its file. `close` it; it is closed, too, by every failure but a refusal.

    Without a `launch` it is a thread of this very process: for callers that are in one that was
    made for it already, and may neither start others nor have files in memory. `holds_weights`
    gives the process a second file in memory, which it may fill with weights.
    """

    def __init__(
        self,
        path: Path,
        parts: Sequence[Path],
        launch: Launch | None = plainly,
        writable: Path | None = None,
        holds_weights: bool = False,
    ) -> None:
        self._path = path
        self._process: Process | None = None
        self._is_open = True
        self._own = np.empty(0, np.float32)  # what is shared with a thread
        self._logits = None if launch is None else _shared_file()
        theirs, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        os.set_blocking(self._requests, False)
        weights: int | None = None
        try:
            if launch is None or self._logits is None:
                self._process = _Here(theirs, answers, self.share)
            else:
                given = {"requests": theirs, "answers": answers, "logits": self._logits}
                if holds_weights and sys.platform == "linux":
                    given[WEIGHTS] = weights = os.memfd_create(WEIGHTS)
                self._process = launch(given, parts, writable)
        except BaseException:
            self.close()
            raise
        finally:
            for descriptor in (theirs, answers, weights):
                if descriptor is not None:
                    os.close(descriptor)

    @property
    def is_alive(self) -> bool:
        return self._process is not None

    def share(self, n_floats: int) -> NDArray[np.float32]:
        """Return memory for this many numbers, which the process fills. It is the same memory every
        time.
        """
        if self._logits is None:
            if len(self._own) < n_floats:
                self._own = np.empty(n_floats, np.float32)
            return self._own[:n_floats]
        n_bytes = max(4 * n_floats, mmap.PAGESIZE)
        if os.fstat(self._logits).st_size < n_bytes:
            os.ftruncate(self._logits, n_bytes)
        return np.frombuffer(mmap.mmap(self._logits, n_bytes), np.float32, n_floats)

    def ask(
        self, request: str, seconds: float, read: Callable[[Any], T] = as_it_is, **arguments: Any
    ) -> T:
        """Return the answer to a request, as `read` makes it of plain JSON. Raises EvaluationError
        for one that is refused, and when the process dies, does not answer in `seconds`, or answers
        with what `read` cannot take.
        """
        if self._process is None:
            raise EvaluationError(f"{self._path} is no longer open.", "Open it again.")
        deadline = time.monotonic() + seconds
        try:
            self._send(json.dumps({"request": request, **arguments}).encode() + b"\n", deadline)
            answer = json.loads(self._receive(deadline))
            if not isinstance(answer, dict):
                raise ValueError("it is not an object")
            refused = [printable(str(text)) for text in answer.get("error", ())]
            if not refused:
                return read(answer.get("value"))
            message, remedy = refused
        except TimeoutError:
            self.close()
            raise EvaluationError(
                f"llama.cpp did not answer within {seconds:,.0f} seconds with {self._path}.",
                _REMEDY,
            ) from None
        except (
            OSError,
            EOFError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            OverflowError,
            RecursionError,
        ):
            how = self.close()
            raise EvaluationError(
                f"llama.cpp cannot work with {self._path}: its process {how}.", _REMEDY
            ) from None
        except BaseException:  # an interrupt in the middle of an answer
            self.close()
            raise
        raise EvaluationError(message, remedy)

    def _send(self, data: bytes, deadline: float) -> None:
        left = memoryview(data)
        while left:
            # It says something before it has heard all only when it is ending.
            _, ready, _ = select.select([], [self._requests], [], _left(deadline))
            if ready:
                left = left[os.write(self._requests, left) :]

    def _receive(self, deadline: float) -> bytes:
        parts: list[bytes] = []
        n_bytes = 0
        while not (parts and parts[-1].endswith(b"\n")):
            ready, _, _ = select.select([self._answers], [], [], _left(deadline))
            if not ready:
                continue
            data = os.read(self._answers, 1 << 20)
            n_bytes += len(data)
            if not data or n_bytes > _MOST_ANSWERED:
                raise EOFError
            parts.append(data)
        return b"".join(parts)

    def close(self) -> str:
        """End the process and say how it ended."""
        how = ""
        if self._is_open:
            self._is_open = False
            os.close(self._requests)
            os.close(self._answers)
            if self._logits is not None:
                os.close(self._logits)
        if self._process is not None:
            how, self._process = self._process.end(), None
        return how


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return min(left, 3600.0)


def _shared_file() -> int:
    """A file in memory that can grow and never shrink: whoever reads beyond the end of one would be
    killed.
    """
    if sys.platform != "linux":
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())
    import fcntl

    descriptor = os.memfd_create("logits", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return descriptor
