"""Let a model answer many prompts greedily, side by side, and see what it would say instead of
given answers.

Every prompt has a sequence of its own; the tokens that come next are decoded together, one of each,
and where an answer ends the next prompt takes its place.

llama.cpp sums up a row of a batch in another way when it has three neighbors than when it is alone,
and rounds its activations otherwise for quantized weights: enough for other answers (dev/LOG.md).
So a batch always has the same number of rows, a multiple of four, of which those of empty places
are thrown away: an answer then does not depend on what else is asked, and when that ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluators.command import Progress
from evaluators.errors import EvaluationError
from evaluators.llama_runtime import MAX_STEP, Context, Model
from evaluators.perplexity import check_finite
from evaluators.windows import scored_logits

I32 = NDArray[np.int32]

_MOST_SIDE_BY_SIDE = 16
_ROWS_TOGETHER = 4  # that llama.cpp's products take at once
_MOST_CELLS = 16_384  # of keys and values: 2 GB of an 8B model
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
    if not prompts:
        return []
    longest = max(map(len, prompts)) + n_new
    model.check_context(longest)
    if min(map(len, prompts)) < 1:
        raise EvaluationError("A prompt has no tokens.", "Leave it out.")
    n_cells = -(-longest // _CELLS) * _CELLS
    n_places = min(_MOST_SIDE_BY_SIDE, len(prompts), _MOST_CELLS // n_cells)
    n_places = max(1, -(-n_places // _ROWS_TOGETHER)) * _ROWS_TOGETHER
    with Context(
        model, n_places * n_cells, min(MAX_STEP, n_cells), n_places, n_places, apart=True
    ) as context:
        return _Table(context, prompts, n_new, n_places, n_cells).run(progress)


class _Table:
    """Places at which answers grow."""

    def __init__(
        self, context: Context, prompts: Sequence[I32], n_new: int, n_places: int, n_cells: int
    ) -> None:
        self._context = context
        self._prompts, self._n_new = prompts, n_new
        self._ends = context.model.ends()
        self._said: list[list[int]] = [[] for _ in prompts]
        self._ended = [False] * len(prompts)
        self._at: dict[int, int] = {}  # place -> prompt
        self._free = list(range(n_places))[::-1]
        self._n_cells = n_cells
        self._idle = [0] * n_places  # tokens that went to waste at a place since it became free

    def run(self, progress: Progress | None) -> list[Answer]:
        left, n_done = list(range(len(self._prompts)))[::-1], 0
        while left or self._at:
            while left and self._free:
                self._seat(left.pop())
            if self._at:
                self._step()
            n_now = len(self._prompts) - len(left) - len(self._at)
            if progress and n_now > n_done:
                progress(n_now, len(self._prompts))
            n_done = n_now
        return [
            Answer(tuple(said), ended) for said, ended in zip(self._said, self._ended, strict=True)
        ]

    def _seat(self, prompt: int) -> None:
        """Read a prompt at a free place and take its first token."""
        place, context, ids = self._free.pop(), self._context, self._prompts[prompt]
        self._clear(place)
        for start in range(0, len(ids), context.n_step):
            part = ids[start : start + context.n_step]
            wanted = np.zeros(len(part), np.int8)
            wanted[-1] = start + len(part) == len(ids)
            positions = np.arange(start, start + len(part), dtype=np.int32)
            logits = context.decode(part, positions, wanted, [[place]] * len(part))
        self._at[place] = prompt
        self._take(place, logits[0])

    def _step(self) -> None:
        """Decode the next token of every answer, and one that nobody reads at every other place."""
        n = len(self._idle)
        tokens, positions = np.zeros(n, np.int32), np.zeros(n, np.int32)
        for place in range(n):
            prompt = self._at.get(place)
            if prompt is not None:
                said = self._said[prompt]
                tokens[place] = said[-1]
                positions[place] = len(self._prompts[prompt]) + len(said) - 1
                continue
            if self._idle[place] == self._n_cells:
                self._clear(place)
            tokens[place], positions[place] = self._prompts[0][0], self._idle[place]
            self._idle[place] += 1
        sequences = [[place] for place in range(n)]
        logits = self._context.decode(tokens, positions, np.ones(n, np.int8), sequences)
        for place in sorted(self._at):
            self._take(place, logits[place])

    def _clear(self, place: int) -> None:
        self._context.forget(place)
        self._idle[place] = 0

    def _take(self, place: int, logits: NDArray[np.float32]) -> None:
        """Append the likeliest token; give the place away where the answer is at its end."""
        prompt = self._at[place]
        token = int(logits.argmax())
        check_finite(logits[token : token + 1].astype(np.float64), self._context.model.path)
        self._said[prompt].append(token)
        self._ended[prompt] = token in self._ends
        if self._ended[prompt] or len(self._said[prompt]) == self._n_new:
            del self._at[place]
            self._free.append(place)
            self._clear(place)


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
