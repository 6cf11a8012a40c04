"""A sandboxed process that answers questions, a line of JSON each, as long as somebody asks."""

from __future__ import annotations

import json
import os
import select
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit import sandbox
from quantkit.llamacpp.place import Sandboxed
from quantkit.sandbox import untrusted

SECONDS = 90.0  # for an answer, with the start of the process


class Answering:
    """The process and the two pipes to it. It ends with this object.

    `function` ("package.module:name") is called with `arguments` and the descriptors `requests` and
    `answers`; an answer has at most `most_bytes` as JSON.
    """

    def __init__(
        self,
        function: str,
        arguments: Mapping[str, Any],
        limits: sandbox.Limits,
        most_bytes: int,
        readable: Sequence[Path] = (),
        preload: bool = False,
    ) -> None:
        self._most_bytes = most_bytes
        theirs, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        os.set_blocking(self._requests, False)
        given = {"requests": theirs, "answers": answers, **arguments}
        try:
            ends = (theirs, answers)
            job = sandbox.Job(function, given, limits, readable, inherited=ends, preload=preload)
            process = Sandboxed(job)
        finally:
            os.close(theirs)
            os.close(answers)
        self._end = process.end
        self._close = weakref.finalize(self, _close, self._requests, self._answers)

    def ask(self, question: Sequence[Any], shape: Any) -> Any:
        """Return the answer, of type `shape` (`untrusted.typed`). Raise Damaged for one of another
        type, OSError or ValueError when there is none.
        """
        deadline = time.monotonic() + SECONDS
        left = memoryview(json.dumps(list(question)).encode() + b"\n")
        while left:
            _wait([], [self._requests], deadline)
            left = left[os.write(self._requests, left) :]
        said = bytearray()
        while not said.endswith(b"\n"):
            _wait([self._answers], [], deadline)
            data = os.read(self._answers, 2**20)
            said += data
            if not data or len(said) > self._most_bytes:
                raise ValueError("no answer")
        return untrusted.typed(shape, json.loads(said))

    def close(self) -> str:
        """End it. Return how it did, as a clause."""
        self._close()
        return self._end()


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)  # which ends the process


def _wait(reading: list[int], writing: list[int], deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0 or not any(select.select(reading, writing, [], left)):
        raise TimeoutError("no answer in time")
