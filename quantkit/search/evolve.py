"""EvoPress: evolve an allocation within the budget, judged by KL on growing numbers of tokens.

Follows Sieberling et al. 2024 (arXiv:2410.14649), with the choices that design and log explain: the
first population is not random but proposed (knapsack, uniform levels, stock mixes); offspring and
parent are compared on the same sequences; survivors of a round meet more sequences in the next; the
parent defends its place on every token that decides. The state is saved after every generation;
evolving on from a saved state gives what an uninterrupted run gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from quantkit.search.allocation import Choices, SearchSpace
from quantkit.search.mutate import mutate
from quantkit.search.propose import Costs


class Evaluator(Protocol):
    """Where candidates are judged: in this process, or on many devices."""

    n_tokens: int

    @property
    def n_sequences(self) -> int: ...

    @property
    def n_ctx(self) -> int: ...

    def kl(self, choices: Choices, first: int, last: int) -> np.ndarray: ...

    def set_parent(self, choices: Choices) -> None: ...


@dataclass(frozen=True)
class Plan:
    """How the tokens of the search are spent."""

    n_tokens: int  # evaluated in all
    n_offspring: int = 12
    rounds: tuple[int, ...] = (2, 8)  # sequences per candidate in each round of a generation
    n_kept: tuple[int, ...] = (3, 1)  # candidates that survive each round
    max_raised: int = 3  # tensors raised by one mutation


@dataclass(frozen=True)
class Member:
    """One allocation and its KL on the sequences that decide."""

    choices: tuple[int, ...]
    kl: float
    stderr: float
    origin: str


@dataclass(frozen=True)
class SearchState:
    """All that the next generation depends on."""

    generation: int
    best: Member
    n_tokens: int
    rng: dict[str, Any]
    history: tuple[tuple[int, int, float, float], ...]  # generation, tokens, KL, stderr

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SearchState:
        best = Member(**{**value["best"], "choices": tuple(value["best"]["choices"])})
        history = tuple(tuple(row) for row in value["history"])
        return cls(value["generation"], best, value["n_tokens"], value["rng"], history)


def _mean(kl: np.ndarray) -> tuple[float, float]:
    """Mean and standard error over sequences."""
    error = float(kl.std(ddof=1) / np.sqrt(len(kl))) if len(kl) > 1 else float("nan")
    return float(kl.mean()), error


def _select(
    evaluator: Evaluator,
    plan: Plan,
    candidates: Sequence[tuple[Choices, str]],
    parent: Choices | None,
) -> Member:
    """The best of the candidates by rounds of growing size; the parent, when given, takes part in
    the last round.
    """
    left = list(candidates)
    first = 0
    for n, n_kept in zip(plan.rounds, plan.n_kept, strict=True):
        last_round = n == plan.rounds[-1]
        if last_round and parent is not None:
            left.append((parent, "parent"))
        n = min(n, evaluator.n_sequences)
        scores = [evaluator.kl(choices, first, n) for choices, _ in left]
        order = sorted(range(len(left)), key=lambda i: float(scores[i].mean()))
        if last_round:
            best = order[0]
            kl, stderr = _mean(scores[best])
            return Member(tuple(left[best][0].tolist()), kl, stderr, left[best][1])
        left = [left[i] for i in order[:n_kept]]
    raise AssertionError("a plan has at least one round")


def begin(
    evaluator: Evaluator, plan: Plan, proposals: Sequence[tuple[Choices, str]], seed: int
) -> SearchState:
    """Generation 0: the best of the proposals."""
    unique = {tuple(choices.tolist()): (choices, origin) for choices, origin in reversed(proposals)}
    best = _select(evaluator, replace(plan, n_kept=(5, 1)), list(reversed(unique.values())), None)
    rng = np.random.default_rng(seed).bit_generator.state
    history = ((0, evaluator.n_tokens, best.kl, best.stderr),)
    return SearchState(0, best, evaluator.n_tokens, dict(rng), history)


def evolve(
    space: SearchSpace,
    evaluator: Evaluator,
    costs: Costs,
    plan: Plan,
    state: SearchState,
    on_generation: Callable[[SearchState], None],
) -> SearchState:
    """Run generations until the plan's tokens are used; `on_generation` is called with the state
    after each.
    """
    while state.n_tokens < plan.n_tokens:
        rng = np.random.default_rng()
        rng.bit_generator.state = state.rng
        parent = np.array(state.best.choices, np.int64)
        evaluator.set_parent(parent)
        seen = {state.best.choices}
        offspring = []
        for _ in range(plan.n_offspring * 4):
            n_raised = 1 + min(int(rng.geometric(0.6)) - 1, plan.max_raised - 1)
            child = mutate(space, parent, costs, rng, n_raised)
            key = tuple(child.tolist())
            if key not in seen:
                seen.add(key)
                offspring.append((child, "offspring"))
            if len(offspring) == plan.n_offspring:
                break
        if not offspring:
            return state
        before = evaluator.n_tokens
        best = _select(evaluator, plan, offspring, parent)
        n_tokens = state.n_tokens + evaluator.n_tokens - before
        row = (state.generation + 1, n_tokens, best.kl, best.stderr)
        state = SearchState(
            state.generation + 1,
            best,
            n_tokens,
            dict(rng.bit_generator.state),
            (*state.history, row),
        )
        on_generation(state)
    return state
