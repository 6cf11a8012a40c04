"""Log-softmax over rows of logits, and KL against stored base rows, in blocks that fit a cache.

A window of 255 scored tokens and a vocabulary of 150k is 39 million floats: done as whole arrays,
each elementwise step would stream them through memory and need copies of the same size. Here a
worker takes some rows (about half a megabyte), runs all steps on them in its own scratch and moves
on. numpy lets go of the interpreter lock inside, so workers are threads.

Arithmetic is float32 after subtracting each row's maximum; sums of exponentials are float64.

A base row is stored as 16-bit codes, equally spaced from its floor to its top:

    log p_i = low + step * code_i - log Z      (Z makes the decoded row sum to 1 exactly)

The floor is the row's smallest logit, but at most 32 nats under its top: what is cut off had a
probability below 1.3e-14 of the top's. `step` is at most 32/65535 = 4.9e-4 nats, so a log p is off
by at most 2.5e-4, and because the decoded row is a distribution again, its KL against the true one
is about step^2/24, 1e-8 nats.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluators.closing import Closing

FLOOR_NATS = 32.0
_MAX_CODE = 65535
_LEAST_LOG_Q = -1000.0  # nats; no trained model is that sure of anything
_BLOCK_BYTES = 1 << 19  # of one float32 scratch array: three and the logits fit a core's cache

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
U16 = NDArray[np.uint16]


@dataclass(frozen=True)
class BaseRows:
    """What is kept of n base rows, except the codes.

    `low` and `step` [n] decode them; `argmax` [n] is exact, not read back from codes; `nll` [n] is
    -log p of the target, exact.
    """

    low: F32
    step: F32
    argmax: I32
    nll: F64


class RowWorkers(Closing):
    """Threads with scratch arrays [n_rows, n_vocab], and the row arithmetic they do.

    `logits` are [n, n_vocab], `targets` the tokens that came next [n]. NaN in gives NaN out.
    """

    def __init__(self, n_vocab: int, n_threads: int) -> None:
        self._n_vocab = n_vocab
        self._n_rows = max(1, _BLOCK_BYTES // (4 * n_vocab))
        self._scratch = threading.local()
        self._pool = ThreadPoolExecutor(n_threads) if n_threads > 1 else None

    def log_sums(self, logits: F32) -> F64:
        """Log of the sum of exponentials of each row, float64 [n]: log p_i is logit_i less it."""
        return self.log_sums_and_tops(logits)[0]

    def log_sums_and_tops(self, logits: F32) -> tuple[F64, F32]:
        """Return `log_sums`, and the largest logit of each row [n]."""
        sums, tops = np.empty(len(logits)), np.empty(len(logits), np.float32)

        def block(rows: slice) -> None:
            x = logits[rows]
            _, tops[rows], sums[rows] = self._log_sum(x, self._buffers(len(x))[0])

        self._run(block, len(logits))
        return sums, tops

    def nll(self, logits: F32, targets: I32) -> F64:
        """Return -log p of each target, float64 [n]."""
        return self.log_sums(logits) - _picked(logits, targets)

    def encode(self, logits: F32, targets: I32, store: Callable[[int, U16], None]) -> BaseRows:
        """Turn base rows into codes. `store(row, codes [k, n_vocab])` is called from the workers,
        once per block.
        """
        n = len(logits)
        out = BaseRows(
            np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.int32), np.empty(n)
        )

        def block(rows: slice) -> None:
            x = logits[rows]
            shifted, _, codes = self._buffers(len(x))
            argmax, top, log_sum = self._log_sum(x, shifted)
            # A row can hold -inf (masked tokens); only the finite span is worth codes.
            span = np.minimum(top - x.min(axis=1), np.float32(FLOOR_NATS))
            step = np.where(span > 0, span / np.float32(_MAX_CODE), np.float32(1))
            np.subtract(x, (top - span)[:, None], out=shifted)
            np.maximum(shifted, 0, out=shifted)
            shifted *= (1 / step)[:, None]
            np.rint(shifted, out=shifted)
            np.copyto(codes, shifted, casting="unsafe")
            out.low[rows] = top - span - log_sum
            out.step[rows] = step
            out.argmax[rows] = argmax
            out.nll[rows] = log_sum - _picked(x, targets[rows])
            store(rows.start, codes)

        self._run(block, n)
        return out

    def kl(
        self,
        logits: F32,
        targets: I32,
        base: BaseRows,
        load: Callable[[int, U16], None],
    ) -> tuple[F64, F64, NDArray[np.bool_]]:
        """Compare rows with base rows. `load(row, codes [k, n_vocab])` fills a block of codes.

        Returns:
            KL(base || this) in nats [n], -log p of each target [n], and whether both have the same
            most likely token [n].
        """
        n = len(logits)
        divergence, nll, same = np.empty(n), np.empty(n), np.empty(n, np.bool_)

        def block(rows: slice) -> None:
            x = logits[rows]
            this, other, codes = self._buffers(len(x))
            load(rows.start, codes)
            argmax, top, log_sum = self._log_sum(x, this)
            # this = log q, up to the float32 rounding of log_sum, which is put back below
            offset = log_sum.astype(np.float32)
            np.subtract(x, offset[:, None], out=this)
            # Tokens that both models rule out (-inf) sit on the base's floor, not at zero: without
            # a bound here they would weigh 1e-14 times infinity.
            np.maximum(this, np.float32(_LEAST_LOG_Q), out=this)
            np.multiply(codes, base.step[rows, None], out=other)
            other += base.low[rows, None]
            np.subtract(other, this, out=this)  # log p - log q
            np.exp(other, out=other)
            z = other.sum(axis=1, dtype=np.float64)
            this *= other
            total = this.sum(axis=1, dtype=np.float64)
            divergence[rows] = total / z - np.log(z) + (log_sum - offset)
            nll[rows] = log_sum - _picked(x, targets[rows])
            same[rows] = argmax == base.argmax[rows]

        self._run(block, n)
        return divergence, nll, same

    def _log_sum(self, x: F32, scratch: F32) -> tuple[NDArray[np.intp], F32, F64]:
        """argmax [k], maximum [k], log of the sum of exponentials [k]; overwrites `scratch`."""
        argmax = x.argmax(axis=1)
        top = x[np.arange(len(x)), argmax]
        np.subtract(x, top[:, None], out=scratch)
        np.exp(scratch, out=scratch)
        return argmax, top, np.log(scratch.sum(axis=1, dtype=np.float64)) + top

    def _buffers(self, n: int) -> tuple[F32, F32, U16]:
        """This thread's scratch, cut to n rows."""
        if not hasattr(self._scratch, "arrays"):
            shape = (self._n_rows, self._n_vocab)
            self._scratch.arrays = (
                np.empty(shape, np.float32),
                np.empty(shape, np.float32),
                np.empty(shape, np.uint16),
            )
        first, second, codes = self._scratch.arrays
        return first[:n], second[:n], codes[:n]

    def _run(self, block: Callable[[slice], None], n: int) -> None:
        blocks = [slice(i, min(i + self._n_rows, n)) for i in range(0, n, self._n_rows)]

        # NaN and infinities are answers here (the caller checks), not accidents.
        # numpy's error state belongs to a thread, so it is set inside.
        def quiet(rows: slice) -> None:
            with np.errstate(all="ignore"):
                block(rows)

        for _ in self._pool.map(quiet, blocks) if self._pool else map(quiet, blocks):
            pass

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown()


def _picked(x: F32, targets: I32) -> F32:
    return x[np.arange(len(x)), targets]
