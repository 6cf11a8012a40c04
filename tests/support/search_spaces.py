"""Random search spaces for hypothesis, and a toy evaluator that answers at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from hypothesis import strategies as st

from quantkit.ggml.types import QUANTIZED
from quantkit.search.allocation import Choices, SearchSpace
from quantkit.search.propose import Costs
from quantkit.tensors import Candidate

ALIGNMENT = 32


def padded(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def make_space(
    sizes: list[list[int]], limit_bytes: int | None = None, fixed_bytes: int = 1000
) -> SearchSpace:
    """A space whose tensors have choices of these many bytes; by default the largest file fits."""
    candidates = tuple(
        tuple(
            Candidate(
                f"t{i}",
                QUANTIZED[k],
                "gptq",
                f"{QUANTIZED[k]}.gguf",
                0,
                n_bytes,
                1.0 / (k + 1),
                None,
            )
            for k, n_bytes in enumerate(row)
        )
        for i, row in enumerate(sizes)
    )
    slots = tuple(tuple(padded(n) for n in row) for row in sizes)
    largest = fixed_bytes + sum(row[-1] for row in slots)
    limit = largest if limit_bytes is None else limit_bytes
    return SearchSpace(
        tuple(f"t{i}" for i in range(len(sizes))), candidates, slots, fixed_bytes, limit
    )


@st.composite
def spaces(
    draw: st.DrawFn, max_tensors: int = 8, max_choices: int = 5
) -> tuple[SearchSpace, list[np.ndarray]]:
    """A space and its costs. Tensors of very different sizes, some with one choice, some with two
    of equal bytes in the file; costs fall with size, or in a tenth of the cases do what they like.
    The budget lies anywhere between the smallest and the largest file.
    """
    sizes, costs = [], []
    for _ in range(draw(st.integers(1, max_tensors))):
        n = draw(st.integers(1, max_choices))
        scale = draw(st.sampled_from([1, 37, 1000, 250_000]))
        steps = draw(st.lists(st.integers(1, 60), min_size=n, max_size=n))
        sizes.append([scale * s for s in itertools.accumulate(steps)])
        own = draw(st.lists(st.floats(1e-6, 10), min_size=n, max_size=n))
        costs.append(np.array(own if draw(st.integers(0, 9)) == 0 else sorted(own, reverse=True)))
    whole = make_space(sizes)
    low, high = whole.n_bytes(whole.smallest), whole.n_bytes(whole.largest)
    return make_space(sizes, draw(st.integers(low, high))), costs


def everything(space: SearchSpace) -> Iterator[Choices]:
    """Every allocation, within the budget or not."""
    for choices in itertools.product(*(range(len(c)) for c in space.candidates)):
        yield np.array(choices, np.int64)


def total(costs: Costs, choices: Choices) -> float:
    return float(sum(c[k] for c, k in zip(costs, choices.tolist(), strict=True)))


class Toy:
    """An evaluator: costs add up, pairs of neighbors interact, sequences differ a little.

    Counts tokens as a search does, and notes which allocations it was asked for.
    """

    n_ctx = 16
    n_batch = 1

    def __init__(self, space: SearchSpace, costs: Costs, seed: int = 0, n_sequences: int = 12):
        rng = np.random.default_rng(seed)
        self.space, self.costs = space, costs
        self.n_sequences = n_sequences
        self.n_tokens = 0
        self.pairs = rng.random(max(len(costs) - 1, 1)) * 0.3
        self.weights = 1 + 0.2 * rng.standard_normal((n_sequences, len(costs)))
        self.calls: list[tuple[tuple[int, ...], int, int]] = []
        self.parent: tuple[int, ...] | None = None

    def kl(self, choices: Choices, first: int, last: int) -> np.ndarray:
        assert self.space.fits(choices), "a candidate above the budget was evaluated"
        self.n_tokens += (last - first) * self.n_ctx
        self.calls.append((tuple(choices.tolist()), first, last))
        return self._kl(choices, first, last)[:, None]

    def _kl(self, choices: Choices, first: int, last: int) -> np.ndarray:
        own = np.array([c[k] for c, k in zip(self.costs, choices.tolist(), strict=True)])
        pair = self.pairs[: len(own) - 1] * own[1:] * own[:-1]
        return self.weights[first:last] @ own + pair.sum()

    def kl_of(self, candidates: Sequence[Choices], first: int, last: int) -> list[np.ndarray]:
        return [self.kl(choices, first, last) for choices in candidates]

    def set_parent(self, choices: Choices) -> None:
        self.parent = tuple(choices.tolist())
