"""Evaluates the converter's tensors on several threads, ahead of the one that writes them. Runs
inside the sandbox.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

_THREADS = 4  # of torch's operations each uses all cores itself


class Ahead:
    """Hands out tensors in their order. No more are held than have the bytes of the largest: that
    is what the sandbox leaves memory for, in all types that a tensor takes on its way.
    """

    def __init__(self, tensors: Iterable[Checked]) -> None:
        self._waiting = deque(tensors)
        self._most = max((tensor.nbytes for tensor in self._waiting), default=0)
        self._begun: deque[tuple[int, Future[np.ndarray]]] = deque()
        self._held = 0
        self._pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "tensor")
        for tensor in self._waiting:
            tensor.ahead = self

    def next(self, file: Any) -> None:
        """Write the next tensor to `file`."""
        self._begin()
        n_bytes, evaluated = self._begun.popleft()
        evaluated.result().tofile(file)
        del evaluated
        self._held -= n_bytes

    def _begin(self) -> None:
        while self._waiting:
            n_bytes = self._waiting[0].nbytes
            if self._begun and self._held + n_bytes > self._most:
                return
            self._held += n_bytes
            self._begun.append((n_bytes, self._pool.submit(self._waiting.popleft().evaluate)))


class Checked:
    """A tensor that is evaluated shortly before it is written, and refused when a number is not
    finite.
    """

    ahead: Ahead

    def __init__(self, name: str, dtype: str, tensor: Any) -> None:
        self._name, self._dtype, self._tensor = name, dtype, tensor
        self.nbytes = tensor.nbytes

    def evaluate(self) -> np.ndarray:
        """Return the values. Raises ValueError when one is infinite or not a number."""
        data: np.ndarray = type(self._tensor).to_eager(self._tensor)
        self._tensor = None
        # All bits of the exponent set: infinite or not a number.
        exponents = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
        if self._dtype in exponents:
            kind, exponent = exponents[self._dtype]
            bits = data.reshape(-1).view(kind)
            for start in range(0, bits.size, 2**22):
                if (bits[start : start + 2**22] & exponent == exponent).any():
                    raise ValueError(
                        f"{self._name} has a number that is not finite in {self._dtype}"
                    )
        return data

    def tofile(self, file: Any) -> None:
        """Write the values. Tensors are written in the order in which `Ahead` was given them."""
        self.ahead.next(file)
