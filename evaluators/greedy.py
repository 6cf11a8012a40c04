"""Let a model answer many prompts greedily, and see what it would say instead of given answers.

An answer must not depend on what else is asked. llama.cpp computes a row in other ways when it is
alone in a batch or one of few, and rounds it otherwise: enough for other answers of a quantized
file (dev/LOG.md). So answers are always twelve side by side. Whether rows leave each other alone is
tried first; where not, or where memory is short for so many, one comes after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluators.command import Progress
from evaluators.continuations import Continuation, Prompt, continue_all
from evaluators.llama_runtime import MAX_STEP, Context, Model
from evaluators.perplexity import check_finite
from evaluators.windows import scored_logits

I32 = NDArray[np.int32]

_SIDE_BY_SIDE = 12  # a multiple of the four rows that llama.cpp's products take at once
_TRIED, _TRIED_TOKENS = 8, 24  # prompts, and the last tokens of each
_MOST_CELLS = 32_768  # of keys and values: 4 GB of an 8B model
_CELLS = 256  # llama.cpp rounds a sequence's cells up to a multiple of these
_OUTPUT_BYTES = 256 << 20  # of logits in one step


@dataclass(frozen=True)
class Answer:
    """The tokens of an answer; the last is the one that ended it, if it `ended`."""

    tokens: tuple[int, ...]
    ended: bool


def answer_all(
    model: Model, prompts: Sequence[I32], n_new: int, progress: Progress | None = None
) -> list[Answer]:
    """Return the greedy answers to prompts of token ids, each of at most `n_new` tokens.

    Args:
        progress: called with (answers done, answers in all).

    Raises:
        EvaluationError: a prompt without tokens, or one that leaves no room for `n_new`; logits
            that are not finite.
    """
    found: dict[int, Answer] = {}

    def done(index: int, said: Continuation) -> None:
        found[index] = Answer(said.tokens, said.ended == "end")
        if progress:
            progress(len(found), len(prompts))

    n_cells = -(-(max(map(len, prompts), default=0) + n_new) // _CELLS) * _CELLS
    fits = len(prompts) >= _TRIED and _SIDE_BY_SIDE * n_cells <= _MOST_CELLS
    n_places = _SIDE_BY_SIDE if fits and rows_are_independent(model, prompts) else 1
    continue_all(model, [Prompt(ids, n_new) for ids in prompts], done, n_places=n_places)
    return [found[i] for i in range(len(prompts))]


def rows_are_independent(model: Model, prompts: Sequence[I32]) -> bool:
    """Return whether the rows of a batch leave each other alone: eight sequences that are decoded
    together give the same logits, to the bit, in other orders.
    """
    tried = [ids[-_TRIED_TOKENS:] for ids in prompts[:_TRIED]]
    with Context(model, len(tried) * _CELLS, _CELLS, len(tried), len(tried), apart=True) as context:
        found = []
        n = len(tried)
        for step in (1, 3, n - 1):  # others before and behind each, at other places
            context.clear()
            at = [i * step % n for i in range(n)]
            order = [tried[i] for i in at]
            for place, ids in enumerate(order):
                if len(ids) > 1:
                    positions = np.arange(len(ids) - 1, dtype=np.int32)
                    none = np.zeros(len(ids) - 1, np.int8)
                    context.decode(ids[:-1], positions, none, [[place]] * (len(ids) - 1))
            logits = context.decode(
                np.array([ids[-1] for ids in order], np.int32),
                np.array([len(ids) - 1 for ids in order], np.int32),
                np.ones(len(order), np.int8),
                [[place] for place in range(len(order))],
            )
            found.append(logits[np.argsort(at)])
    return all(np.array_equal(found[0], other, equal_nan=True) for other in found[1:])


def choices(
    model: Model,
    prompts: Sequence[I32],
    answers: Sequence[Answer],
    progress: Progress | None = None,
) -> list[I32]:
    """Return the likeliest token at every place of given answers, the model having read the prompt
    and the answer up to there [n_tokens].

    Two models that read the same answers are compared token by token so, without what follows from
    a first difference. They need not be what greedy decoding found: prompts are summed up in
    another order than single tokens, and a near tie may fall otherwise.
    """
    found: list[I32] = []
    with documents_context(
        model,
        [len(p) + len(a.tokens) for p, a in zip(prompts, answers, strict=True)],
        max((len(answer.tokens) for answer in answers), default=1),
    ) as context:
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids = np.concatenate([prompt, np.array(answer.tokens, np.int32)])
            chosen = np.empty(len(answer.tokens), np.int32)
            for row, logits, _ in scored_logits(context, ids, len(prompt) - 1):
                check_finite(logits.max(axis=1).astype(np.float64), model.path)
                chosen[row : row + len(logits)] = logits.argmax(axis=1)
            found.append(chosen)
            if progress:
                progress(i + 1, len(answers))
    return found


def shortfalls(
    model: Model, prompts: Sequence[I32], answers: Sequence[Answer]
) -> list[NDArray[np.float64]]:
    """Return by how many nats each token of given answers is less likely than the likeliest there,
    the model having read the prompt and the answer up to it [n_tokens]: 0 for what greedy decoding
    finds, little for near ties that fell otherwise.
    """
    found = []
    lengths = [len(p) + len(a.tokens) for p, a in zip(prompts, answers, strict=True)]
    most = max((len(answer.tokens) for answer in answers), default=1)
    with documents_context(model, lengths, most) as context:
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = np.concatenate([prompt, np.array(answer.tokens, np.int32)])
            short = np.empty(len(answer.tokens))
            for row, logits, targets in scored_logits(context, ids, len(prompt) - 1):
                said = np.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
                short[row : row + len(logits)] = logits.max(axis=1) - said
            check_finite(short, model.path)
            found.append(short)
    return found


def documents_context(model: Model, n_tokens: Sequence[int], n_scored: int) -> Context:
    """Return a context that decodes documents of so many tokens one after the other, of which at
    most the last `n_scored` leave logits, in steps whose logits stay under 256 MiB.
    """
    longest = max(n_tokens, default=1)
    model.check_context(longest)
    n_rows = max(32, _OUTPUT_BYTES // (4 * model.n_vocab))
    n_step = min(longest, MAX_STEP)
    if min(n_step, n_scored) > n_rows:
        n_step = n_rows
    return Context(model, longest, n_step, n_outputs=min(n_step, n_scored))
