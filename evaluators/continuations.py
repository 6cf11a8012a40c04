"""Continue many prompts side by side, greedily or by drawing tokens, until a stop text, the model's
own end or a limit.

Every prompt has a sequence of its own; the tokens that come next are decoded together, one of each,
and where an answer ends the next prompt takes its place. With `share` prompts come in the order of
their tokens, and one that begins like another that is being continued takes over what that has
computed.

llama.cpp sums up a row of a batch in another way when it has three neighbors than when it is alone,
and rounds its activations otherwise for quantized weights: enough for other answers (dev/LOG.md).
So a batch always has the same number of rows, a multiple of four, of which those of empty places
are thrown away: an answer then does not depend on what else is asked, and when that ends. It may
where prompts share, since what is shared was computed beside other tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evaluators.errors import EvaluationError
from evaluators.llama_runtime import MAX_STEP, Context, Model
from evaluators.pair_scores import Ids, in_order
from evaluators.perplexity import check_finite

_MOST_SIDE_BY_SIDE = 16
_ROWS_TOGETHER = 4  # that llama.cpp's products take at once
_MOST_CELLS = 16_384  # of keys and values: 2 GB of an 8B model
_CELLS = 256  # llama.cpp rounds a sequence's cells up to a multiple of these
_LEAST_SHARED = 16  # tokens that are worth a copy


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; greedily at temperature 0. `top_k` 0 and `top_p` 1 leave none
    out.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


@dataclass(frozen=True)
class Prompt:
    """What is continued, by at most `n_tokens` tokens, and up to the first of `stops`."""

    ids: Ids
    n_tokens: int
    stops: tuple[str, ...] = ()
    sampling: Sampling = GREEDY


@dataclass(frozen=True)
class Continuation:
    """What was said. `ended` is "stop" (by one of the texts, which `text` lacks), "end" (by a token
    that ends answers, the last of `tokens`, and not in `text`) or "limit".
    """

    text: str
    tokens: tuple[int, ...]
    ended: str


@dataclass
class _Sequence:
    """An answer that grows at a place."""

    index: int
    prompt: Prompt
    stop_tokens: frozenset[int]
    generator: np.random.Generator
    said: list[int] = field(default_factory=list)


def continue_all(
    model: Model,
    prompts: Sequence[Prompt],
    done: Callable[[int, Continuation], None],
    share: bool = False,
    n_places: int = 0,
) -> None:
    """Call `done(index, continuation)` for every prompt, as they end.

    Args:
        share: compute what prompts begin with in common once, where the model can.
        n_places: how many are continued side by side, whatever their number; 0: as many as fit.

    Raises:
        EvaluationError: a prompt without tokens, or one that leaves no room for its answer; logits
            that are not finite.
    """
    if not prompts:
        return
    if any(len(prompt.ids) < 1 or prompt.n_tokens < 1 for prompt in prompts):
        raise EvaluationError("A prompt has no tokens, or asks for none.", "Leave it out.")
    longest = max(len(prompt.ids) + prompt.n_tokens for prompt in prompts)
    model.check_context(longest)
    n_cells = -(-longest // _CELLS) * _CELLS
    if not n_places:
        n_places = min(_MOST_SIDE_BY_SIDE, len(prompts), _MOST_CELLS // n_cells)
        n_places = max(1, -(-n_places // _ROWS_TOGETHER)) * _ROWS_TOGETHER
    with Context(
        model, n_places * n_cells, min(MAX_STEP, n_cells), n_places, n_places, apart=True
    ) as context:
        table = _Table(context, prompts, n_places, n_cells, share and not model.is_recurrent)
        table.run(done)


class _Table:
    """Places at which answers grow."""

    def __init__(
        self,
        context: Context,
        prompts: Sequence[Prompt],
        n_places: int,
        n_cells: int,
        share: bool,
    ) -> None:
        self._context, self._model = context, context.model
        self._prompts, self._n_cells, self._share = prompts, n_cells, share
        self._ends = self._model.ends()
        order: Sequence[int] = range(len(prompts))
        if share:
            order = sorted(order, key=lambda i: in_order(prompts[i].ids))
        self._left = list(order)[::-1]  # taken from the end
        self._at: dict[int, _Sequence] = {}
        self._free = list(range(n_places))[::-1]
        self._idle = [0] * n_places  # tokens that went to waste at a place since it became free
        self._stop_tokens = {stop: self._one_token(stop) for p in prompts for stop in p.stops}

    def run(self, done: Callable[[int, Continuation], None]) -> None:
        while self._left or self._at:
            taken = [self._seat(self._left.pop()) for _ in self._free[: len(self._left)]]
            self._go_on(taken, done)
            if self._at:
                self._go_on(self._step(), done)

    def _one_token(self, stop: str) -> int:
        """The special token that a stop is the name of, -1 if it is none."""
        ids = self._model.tokenize(stop, add_special=False, parse_special=True)
        return int(ids[0]) if len(ids) == 1 and not self._model.text_of(ids.tolist()) else -1

    def _seat(self, index: int) -> tuple[int, int]:
        """Read a prompt at a free place. Gives the place and its first token."""
        place, context, prompt = self._free.pop(), self._context, self._prompts[index]
        self._clear(place)
        ids, first = prompt.ids, self._take_over(place, prompt.ids)
        stop_tokens = frozenset(self._stop_tokens[stop] for stop in prompt.stops)
        generator = np.random.default_rng(prompt.sampling.seed)
        self._at[place] = _Sequence(index, prompt, stop_tokens, generator)
        for start in range(first, len(ids), context.n_step):
            part = ids[start : start + context.n_step]
            wanted = np.zeros(len(part), np.int8)
            wanted[-1] = start + len(part) == len(ids)
            positions = np.arange(start, start + len(part), dtype=np.int32)
            logits = context.decode(part, positions, wanted, [[place]] * len(part))
        return place, self._next(place, logits[0])

    def _take_over(self, place: int, ids: Ids) -> int:
        """Copy the beginning of a prompt from the sequence that has most of it. Gives how many
        tokens that are; the last one has to be decoded by whoever wants its logits.
        """
        best, n_best = -1, 0
        for other, sequence in self._at.items() if self._share else ():
            n = min(len(ids) - 1, len(sequence.prompt.ids))
            same = sequence.prompt.ids[:n] == ids[:n]
            n = n if same.all() else int(same.argmin())
            if n > n_best:
                best, n_best = other, n
        if n_best < _LEAST_SHARED:
            return 0
        self._context.copy(best, place)
        self._context.forget(place, n_best)
        return n_best

    def _step(self) -> list[tuple[int, int]]:
        """Decode the last token of every answer, and one that nobody reads at every other place.
        Gives places and their next tokens.
        """
        n = len(self._idle)
        tokens, positions = np.zeros(n, np.int32), np.zeros(n, np.int32)
        for place in range(n):
            sequence = self._at.get(place)
            if sequence is not None:
                tokens[place] = sequence.said[-1]
                positions[place] = len(sequence.prompt.ids) + len(sequence.said) - 1
                continue
            if self._idle[place] == self._n_cells:
                self._clear(place)
            tokens[place], positions[place] = self._prompts[0].ids[0], self._idle[place]
            self._idle[place] += 1
        sequences = [[place] for place in range(n)]
        logits = self._context.decode(tokens, positions, np.ones(n, np.int8), sequences)
        return [(place, self._next(place, logits[place])) for place in sorted(self._at)]

    def _clear(self, place: int) -> None:
        self._context.forget(place)
        self._idle[place] = 0

    def _next(self, place: int, logits: NDArray[np.float32]) -> int:
        sequence = self._at[place]
        token = int(logits.argmax())
        check_finite(logits[token : token + 1].astype(np.float64), self._model.path)
        if sequence.prompt.sampling.temperature > 0:
            token = sample(logits, sequence.prompt.sampling, sequence.generator)
        return token

    def _go_on(
        self, taken: Sequence[tuple[int, int]], done: Callable[[int, Continuation], None]
    ) -> None:
        """Append the tokens that were taken; give the places away where answers end."""
        ended: dict[int, str] = {}
        for place, token in taken:
            sequence = self._at[place]
            sequence.said.append(token)
            if token in self._ends:
                ended[place] = "end"
            elif token in sequence.stop_tokens:
                ended[place] = "stop"
        going = [place for place, _ in taken if place not in ended]
        for place, tail in zip(going, self._tails(going), strict=True):
            prompt = self._at[place].prompt
            if any(stop in tail for stop in prompt.stops):
                ended[place] = "stop"
            elif len(self._at[place].said) == prompt.n_tokens:
                ended[place] = "limit"
        if not ended:
            return
        whole = [self._at[place] for place in ended]
        plain = [
            s.said[:-1] if how == "end" else s.said
            for s, how in zip(whole, ended.values(), strict=True)
        ]
        texts = self._model.texts_of(plain)
        for (place, how), sequence, text in zip(ended.items(), whole, texts, strict=True):
            del self._at[place]
            self._free.append(place)
            self._clear(place)
            text = _cut(text, sequence.prompt.stops)
            done(sequence.index, Continuation(text, tuple(sequence.said), how))

    def _tails(self, places: Sequence[int]) -> list[str]:
        """The end of what was said: every token has a letter at least, but for parts of one."""
        sequences = [self._at[place] for place in places]
        if not any(sequence.prompt.stops for sequence in sequences):
            return [""] * len(sequences)
        asked = []
        for sequence in sequences:
            n = 8 + 4 * max((len(stop) for stop in sequence.prompt.stops), default=0)
            asked.append(sequence.said[-n:])
        return self._model.texts_of(asked)


def sample(logits: NDArray[np.float32], sampling: Sampling, generator: np.random.Generator) -> int:
    """Draw a token: of the `top_k` most likely ones the fewest that have `top_p` of the
    probability together.
    """
    n = sampling.top_k or len(logits)
    order = np.argsort(-logits, kind="stable")[:n]
    scaled = logits[order].astype(np.float64) / sampling.temperature
    p = np.exp(scaled - scaled[0])
    p /= p.sum()
    before = np.cumsum(p) - p
    p[before >= sampling.top_p] = 0
    return int(generator.choice(order, p=p / p.sum()))


def _cut(text: str, stops: Sequence[str]) -> str:
    """What stands before the first of `stops`."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
