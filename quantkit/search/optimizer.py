"""The interface of the search: what judges candidates, and what looks for better ones.

Another search is a class with `run`; `stages/search.py` names the one that is used. What a
generation is, only `evopress` knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from quantkit.search.allocation import Choices, SearchSpace
from quantkit.search.propose import Costs

MOST_SEQUENCES = 32  # that decide


class Evaluator(Protocol):
    """Where candidates are judged (`DistributedEvaluator`)."""

    @property
    def n_sequences(self) -> int: ...

    @property
    def n_ctx(self) -> int: ...

    @property
    def n_batch(self) -> int:
        """Sequences that are evaluated together; parts of a batch are refused."""

    def kl_of(self, candidates: Sequence[Choices], first: int, last: int) -> list[np.ndarray]:
        """Return the KL of each candidate on the sequences first..last: float64 (last - first,
        samples of each), in nats per token.
        """

    def set_parent(self, choices: Choices) -> None:
        """Say what the next candidates are changes of; it is evaluated by itself, before them."""


@dataclass(frozen=True)
class Problem:
    """The problem to solve: find the allocation of least KL within the budget of `space`."""

    space: SearchSpace
    evaluator: Evaluator
    costs: Costs  # the estimated damage of every choice by itself
    proposals: Callable[[], Sequence[tuple[Choices, str]]]  # where to begin, and what each is
    n_tokens: int  # to be evaluated in all, about
    seed: int


@dataclass(frozen=True)
class Step:
    """How far a search has come. `trace` has a row a step: its number, tokens evaluated, the best
    KL by then and its standard error; the first row is of the best proposal.
    """

    choices: tuple[int, ...]
    kl: float
    stderr: float
    origin: str  # of the best allocation, in a word or two
    trace: tuple[tuple[int, int, float, float], ...]
    state: Any  # as JSON: a search goes on from it, whichever process does

    @property
    def number(self) -> int:
        return self.trace[-1][0]

    @property
    def n_tokens(self) -> int:
        return self.trace[-1][1]


class Optimizer(Protocol):
    """A way to search. The same problem gives the same answer, interrupted or not."""

    unit: str  # what a step is called, for people

    def run(self, problem: Problem, state: Any, on_step: Callable[[Step], None]) -> Step:
        """Search to the end, from a step's `state` or, where that is None, from the proposals.
        `on_step` is called after every step, the one with the best proposal included.
        """

    def step_of(self, state: Any) -> Step:
        """Return the step whose state was saved."""
