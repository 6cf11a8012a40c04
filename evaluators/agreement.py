"""Check that another implementation of the same weights computes what llama.cpp computes.

The caller brings the logits, from PyTorch or anything else, for tokens that it was given here; KL
and the share of equal most likely tokens say how far llama.cpp's are from them. With a file at F16
only rounding is left (1e-5); a quantized file adds llama.cpp's 8-bit activations (some 1e-3). More
than that means that the file does not hold the weights that it should, or that one of the two
computes another model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluators.errors import EvaluationError
from evaluators.figures import Agreement
from evaluators.llama_runtime import CPU, Context, Model, Runtime
from evaluators.perplexity import check_finite

_BLOCK = 32  # rows in float64 at once
_TRIMMED = 50  # one token of so many is left out of the trimmed mean


def tokens_of(
    file: Path | str, text: str, n_tokens: int, runtime: Runtime = CPU
) -> NDArray[np.int32]:
    """Return the first `n_tokens` of `text` (fewer when it has fewer), as llama.cpp cuts it with
    `file`.

    Raises EvaluationError for a broken file or a text of fewer than two tokens.
    """
    with Model(file, runtime) as model:
        ids = model.tokenize(text)[: min(n_tokens, model.n_ctx_train)]
    if len(ids) < 2:
        raise EvaluationError("The text has fewer than two tokens.", "Give a longer one.")
    return ids


def measure(
    file: Path | str,
    ids: NDArray[np.int32],
    reference: NDArray[np.float32],
    runtime: Runtime = CPU,
) -> Agreement:
    """Compare `reference` [n, n_vocab], the logits at every one of `ids` [n], with llama.cpp's.

    A reference with more columns than the file has tokens (padding of the embedding) is cut.

    Raises:
        EvaluationError: a broken file, a smaller vocabulary, logits that are not finite.
    """
    return compare_logits(file, ids, reference, runtime)[0]


def compare_logits(
    file: Path | str,
    ids: NDArray[np.int32],
    reference: NDArray[np.float32],
    runtime: Runtime = CPU,
) -> tuple[Agreement, NDArray[np.float64]]:
    """Return what `measure` does, and the KL of every token [n]."""
    with Model(file, runtime) as model:
        return compare_model(model, ids, reference)


def compare_model(
    model: Model, ids: NDArray[np.int32], reference: NDArray[np.float32]
) -> tuple[Agreement, NDArray[np.float64]]:
    """Do `compare_logits` of a file that is open."""
    n = len(ids)
    if reference.shape[0] != n or reference.shape[1] < model.n_vocab:
        raise EvaluationError(
            f"The reference is {reference.shape}, but the file needs ({n}, {model.n_vocab}).",
            "Compute it for the same tokens and vocabulary.",
        )
    model.check_context(n)
    kl, same = np.empty(n), np.empty(n, np.bool_)
    with Context(model, n, min(n, 512), n_outputs=min(n, 512)) as context:
        for start in range(0, n, context.n_step):
            step = slice(start, min(n, start + context.n_step))
            count = step.stop - step.start
            positions = np.arange(start, step.stop, dtype=np.int32)
            rows = context.decode(ids[step], positions, np.ones(count, np.int8))
            for first in range(0, count, _BLOCK):
                part = slice(start + first, min(step.stop, start + first + _BLOCK))
                q = _log_softmax(rows[first : first + _BLOCK])
                p = _log_softmax(reference[part, : model.n_vocab])
                kl[part] = (np.exp(p) * (p - q)).sum(axis=1)
                same[part] = p.argmax(axis=1) == q.argmax(axis=1)
    check_finite(kl, model.path)
    trimmed = np.sort(kl)[: n - max(1, n // _TRIMMED)]
    found = Agreement(
        float(kl.mean()), float(trimmed.mean()), float(kl.max()), float(same.mean()), n
    )
    return found, kl


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    values -= np.log(np.exp(values).sum(axis=1, keepdims=True))
    return values
