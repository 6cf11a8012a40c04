"""Cut text into windows of tokens, and choose the logits that are scored: the two protocols.

`llama.cpp` (what `llama-perplexity` does): windows of `n_ctx` tokens one after the other; the first
token of each is replaced by BOS where the vocabulary adds one; the logits of the second half are
scored, so every scored token has at least n_ctx/2 tokens before it. n_ctx = 512 by default.

`gptq` (GPTQ, SparseGPT, AQLM, EvoPress and their descendants): windows of 2048 tokens cut from the
whole text, nothing replaced, every token but the first of a window scored.

Both drop the tail that does not fill a window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluators.errors import EvaluationError
from evaluators.llama_runtime import MAX_STEP, Context, Model

PROTOCOLS = {"llama.cpp": 512, "gptq": 2048}  # name -> default n_ctx
_MIN_CTX = 4  # below it the second half of a window scores nothing
_OUTPUT_BYTES = 320 << 20  # of logits in one step: 512 rows of a 160k vocabulary


@dataclass(frozen=True)
class Windows:
    """`tokens` [n_windows, n_ctx]; the logits at positions first .. n_ctx - 2 are scored."""

    tokens: NDArray[np.int32]
    first: int

    @property
    def n_windows(self) -> int:
        return self.tokens.shape[0]

    @property
    def n_ctx(self) -> int:
        return self.tokens.shape[1]

    @property
    def n_scored(self) -> int:
        """Return the scored tokens of one window."""
        return n_scored(self.n_ctx, self.first)

    def picked(self, which: Sequence[int]) -> Windows:
        """Return some of the windows, by their numbers. Raises EvaluationError where one is not
        there.
        """
        if not which or not all(0 <= i < self.n_windows for i in which):
            raise EvaluationError(
                f"The text has {self.n_windows} windows, not those that are asked for.",
                "Count them from 0.",
            )
        return Windows(self.tokens[list(which)], self.first)

    def sha256(self) -> str:
        """Return the hex sha256 of the token ids, 32-bit little-endian, window after window."""
        return hashlib.sha256(self.tokens.astype("<i4").tobytes()).hexdigest()


def n_scored(n_ctx: int, first: int) -> int:
    """Return the scored tokens of a window: the last one has no target."""
    return n_ctx - 1 - first


def first_scored(protocol: str, n_ctx: int) -> int:
    """Return the position of the first logits that count."""
    return n_ctx // 2 if protocol == "llama.cpp" else 0


def cut_windows(
    model: Model,
    text: str,
    protocol: str = "llama.cpp",
    n_ctx: int = 512,
    max_windows: int | None = None,
) -> Windows:
    """Tokenize `text` and cut it by `protocol`.

    Raises EvaluationError for a text shorter than one window, a context longer than the model's, an
    unknown protocol, or settings that leave nothing to score.
    """
    if protocol not in PROTOCOLS:
        raise EvaluationError(
            f"There is no protocol {protocol!r}.", f"Use one of {', '.join(PROTOCOLS)}."
        )
    if n_ctx < _MIN_CTX:
        raise EvaluationError(
            f"A context of {n_ctx} tokens leaves nothing to score.",
            f"Use --ctx {_MIN_CTX} or more.",
        )
    if max_windows is not None and max_windows < 1:
        raise EvaluationError(
            f"{max_windows} windows leave nothing to score.", "Use --chunks 1 or more."
        )
    model.check_context(n_ctx)
    ids = model.tokenize(text)
    n_windows = len(ids) // n_ctx
    if n_windows == 0:
        raise EvaluationError(
            f"The text has {len(ids)} tokens, fewer than one window of {n_ctx}.",
            "Give a longer text or a smaller --ctx.",
        )
    if max_windows is not None:
        n_windows = min(n_windows, max_windows)
    tokens = ids[: n_windows * n_ctx].reshape(n_windows, n_ctx)
    if protocol == "llama.cpp" and model.adds_bos:
        tokens[:, 0] = model.bos
    return Windows(tokens, first_scored(protocol, n_ctx))


def window_context(model: Model, n_ctx: int, first: int) -> Context:
    """Return a context that decodes one window at a time, in steps whose logits stay under
    320 MiB.
    """
    n_rows = max(32, _OUTPUT_BYTES // (4 * model.n_vocab))
    # Only the scored part of a window leaves logits, so a step may be longer than n_rows as long as
    # the window has no more scored tokens than that.
    n_step = min(n_ctx, MAX_STEP)
    if min(n_step, n_scored(n_ctx, first)) > n_rows:
        n_step = n_rows
    return Context(model, n_ctx, n_step, n_outputs=min(n_step, n_scored(n_ctx, first)))


def scored_logits(
    context: Context, window: NDArray[np.int32], first: int
) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.int32]]]:
    """Decode one window from an empty memory, step by step.

    Args:
        window: token ids, [n_ctx].
        first: position of the first scored logits.

    Yields:
        (index of the first row among the window's scored tokens, logits [n, n_vocab], the tokens
        they should have predicted [n]). The logits are only valid until the next step.
    """
    n_ctx = len(window)
    positions = np.arange(n_ctx, dtype=np.int32)
    wanted = ((positions >= first) & (positions < n_ctx - 1)).astype(np.int8)
    context.clear()
    for start in range(0, n_ctx, context.n_step):
        step = slice(start, start + context.n_step)
        logits = context.decode(window[step], positions[step], wanted[step])
        if len(logits):
            begin = max(start, first)
            yield begin - first, logits, window[begin + 1 : begin + 1 + len(logits)]
