"""EvoPress: evolve an allocation within the budget, judged by KL on growing numbers of tokens.

Follows Sieberling et al. 2024 (arXiv:2410.14649), with the choices that design and log explain: the
first population is not random but proposed (knapsack, uniform levels, stock mixes); half of the
offspring solve the knapsack again, near the parent, at costs drawn from what is believed of them;
the others are mutations whose odds follow the posterior, which every compared child corrects; all
are compared with their parent on the same tokens; who is clearly behind leaves early, who is left
meets more tokens; a child takes its parent's place only when it is better by more than the noise of
the comparison; the search is over when its tokens no longer bring enough. The state is saved after
every generation; evolving on from a saved state gives what an uninterrupted run gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quantkit.sandbox.untrusted import build
from quantkit.search.allocation import Choices, SearchSpace
from quantkit.search.learn import Outcome, Posterior, posterior_of
from quantkit.search.mutate import mutate
from quantkit.search.optimizer import MOST_SEQUENCES, Evaluator, Problem, Step
from quantkit.search.propose import Costs, knapsack, nearby
from quantkit.tensors import to_json

_CLEARLY_BEHIND = 2.5  # standard errors of the paired difference: leaves the race
_ENOUGH_SAMPLES = 8  # for a standard error to be trusted
_BETTER = 1.0  # standard errors by which a child must beat its parent


class EvoPress:
    """The optimizer."""

    unit = "generation"

    def run(self, problem: Problem, state: Any, on_step: Callable[[Step], None]) -> Step:
        """Begin with the best of the proposals, or go on from a saved state."""
        evaluator = problem.evaluator
        schedule = Schedule.of(problem.n_tokens, evaluator.n_sequences, evaluator.n_batch)
        if state is None:
            now = begin(evaluator, schedule, problem.proposals(), problem.seed)
            on_step(_step(now))
        else:
            now = build(SearchState, state)
        rest = problem.costs, schedule, now, lambda state: on_step(_step(state))
        return _step(evolve(problem.space, evaluator, *rest))

    def step_of(self, state: Any) -> Step:
        return _step(build(SearchState, state))


@dataclass(frozen=True)
class Schedule:
    """How the tokens of the search are spent. Sequences are counted from the first."""

    n_tokens: int  # evaluated in all: whole passes and partial ones alike
    rounds: tuple[int, ...]  # sequences that a candidate has met after each round of a race
    n_kept: tuple[int, ...]  # candidates that survive each round
    n_offspring: int = 12
    patience: int = 4  # generations over which the gain is looked at
    least_gain: float = 0.02  # share of the KL that a million tokens must bring, or it is over
    max_raised: int = 3  # tensors raised by one mutation

    @classmethod
    def of(cls, n_tokens: int, n_sequences: int, batch: int) -> Schedule:
        """Return a schedule for this many sequences, in whole batches."""

        def whole(n: int) -> int:
            return max(batch, n // batch * batch)

        deciding = whole(min(n_sequences, MOST_SEQUENCES))
        rounds = tuple(sorted({whole(2), whole(deciding // 3), deciding}))
        return cls(n_tokens, rounds, (5, 2, 1)[-len(rounds) :])


@dataclass(frozen=True)
class Member:
    """One allocation, its KL on the sequences that decide, and since which generation it leads."""

    choices: tuple[int, ...]
    kl: float
    stderr: float
    origin: str
    generation: int


@dataclass(frozen=True)
class SearchState:
    """All that the next generation depends on."""

    generation: int
    best: Member
    n_tokens: int
    rng: dict[str, object]  # NumPy's own word for where its generator stands
    history: tuple[tuple[int, int, float, float], ...]  # generation, tokens, KL, stderr
    outcomes: tuple[Outcome, ...] = ()  # of all compared children


def _step(state: SearchState) -> Step:
    best = state.best
    return Step(best.choices, best.kl, best.stderr, best.origin, state.history, to_json(state))


@dataclass
class _Racer:
    choices: Choices
    origin: str
    scores: np.ndarray

    def behind(self, other: _Racer) -> float:
        """Return by how many standard errors this one's KL is above the other's, on the same
        tokens; 0 if that is not known.
        """
        if self.scores.size < _ENOUGH_SAMPLES:
            return 0.0
        mean, error = _mean(self.scores - other.scores)
        return mean / error if error > 0 else float(np.sign(mean)) * np.inf

    def outcome(self, parent: _Racer) -> Outcome | None:
        """Compare this one with its parent on the tokens that both have met; None if that says
        nothing.
        """
        both = min(len(self.scores), len(parent.scores))
        differences = self.scores[:both] - parent.scores[:both]
        if differences.size < _ENOUGH_SAMPLES:
            return None
        change, error = _mean(differences)
        return Outcome.of(parent.choices, self.choices, change, error) if error > 0 else None


def _mean(samples: np.ndarray) -> tuple[float, float]:
    """Mean and standard error, NaN of a single sample."""
    error = samples.std(ddof=1) / np.sqrt(samples.size) if samples.size > 1 else np.nan
    return float(samples.mean()), float(error)


def _race(
    evaluator: Evaluator,
    schedule: Schedule,
    candidates: Sequence[tuple[Choices, str]],
    parent: Choices | None,
) -> tuple[_Racer, int, list[Outcome]]:
    """The best of the candidates, the tokens it took, and what all of them tell. The parent, when
    given, takes part in every round, and stays the best unless a child is better by more than
    noise.
    """
    empty = np.zeros((0, 0))
    everyone = left = [_Racer(choices, origin, empty) for choices, origin in candidates]
    defender = None if parent is None else _Racer(parent, "parent", empty)
    met = n_tokens = 0
    for n, n_kept in zip(schedule.rounds, schedule.n_kept, strict=True):
        running = left if defender is None else [defender, *left]
        # The parent first and alone: its hidden states serve the others.
        for group in (running[: len(running) - len(left)], left):
            scores = evaluator.kl_of([racer.choices for racer in group], met, n) if group else []
            for racer, new in zip(group, scores, strict=True):
                racer.scores = np.concatenate([racer.scores, new]) if met else new
        n_tokens += len(running) * (n - met) * evaluator.n_ctx
        met = n
        leader = min(running, key=lambda r: float(r.scores.mean()))
        left = [r for r in left if r is leader or r.behind(leader) < _CLEARLY_BEHIND]
        left = sorted(left, key=lambda r: float(r.scores.mean()))[:n_kept]
        if not left:
            break
    if defender is not None and (not left or left[0].behind(defender) >= -_BETTER):
        winner = defender
    else:
        winner = left[0]
    beside = defender or winner
    found = [racer.outcome(beside) for racer in everyone if racer is not beside]
    return winner, n_tokens, [outcome for outcome in found if outcome is not None]


def _member(racer: _Racer, generation: int) -> Member:
    kl, stderr = _mean(racer.scores)
    return Member(tuple(racer.choices.tolist()), kl, stderr, racer.origin, generation)


def begin(
    evaluator: Evaluator, schedule: Schedule, proposals: Sequence[tuple[Choices, str]], seed: int
) -> SearchState:
    """Make generation 0: the best of the proposals."""
    unique = {tuple(choices.tolist()): (choices, origin) for choices, origin in reversed(proposals)}
    winner, n_tokens, outcomes = _race(evaluator, schedule, list(reversed(unique.values())), None)
    best = _member(winner, 0)
    rng = dict(np.random.default_rng(seed).bit_generator.state)
    history = ((0, n_tokens, best.kl, best.stderr),)
    return SearchState(0, best, n_tokens, rng, history, tuple(outcomes))


def evolve(
    space: SearchSpace,
    evaluator: Evaluator,
    costs: Costs,
    schedule: Schedule,
    state: SearchState,
    on_generation: Callable[[SearchState], None],
) -> SearchState:
    """Run generations until the schedule's tokens are used or bring too little; `on_generation` is
    called with the state after each.

    `costs` are the estimated costs of every choice by itself.
    """
    while state.n_tokens < schedule.n_tokens and not is_over(schedule, state):
        parent = np.array(state.best.choices, np.int64)
        evaluator.set_parent(parent)
        rng = np.random.default_rng()
        rng.bit_generator.state = state.rng
        posterior = posterior_of(costs, state.outcomes)
        offspring = list(_offspring(space, parent, posterior, schedule, rng))
        if not offspring:
            return state
        winner, used, outcomes = _race(evaluator, schedule, offspring, parent)
        generation, n_tokens = state.generation + 1, state.n_tokens + used
        best = state.best if winner.origin == "parent" else _member(winner, generation)
        row = (generation, n_tokens, best.kl, best.stderr)
        state = replace(
            state,
            generation=generation,
            best=best,
            n_tokens=n_tokens,
            rng=dict(rng.bit_generator.state),
            history=(*state.history, row),
            outcomes=(*state.outcomes, *outcomes),
        )
        on_generation(state)
    return state


def is_over(schedule: Schedule, state: SearchState) -> bool:
    """Return whether the last generations brought too little for their tokens."""
    if state.generation < schedule.patience:
        return False
    _, tokens_before, kl_before, _ = state.history[-1 - schedule.patience]
    share = (kl_before - state.best.kl) / max(state.best.kl, 1e-30)
    return share * 1e6 <= schedule.least_gain * (state.n_tokens - tokens_before)


def _offspring(
    space: SearchSpace,
    parent: Choices,
    posterior: Posterior,
    schedule: Schedule,
    rng: np.random.Generator,
) -> Iterator[tuple[Choices, str]]:
    """Different children: the knapsack at the believed costs, then half by the knapsack near the
    parent at drawn costs, half by mutation.
    """
    seen = {tuple(parent.tolist())}
    n_found = 0
    for attempt in range(4 * schedule.n_offspring):
        if attempt == 0:
            child, origin = knapsack(space, posterior.costs), "knapsack"
        elif attempt % 2:
            n_raised = 1 + min(int(rng.geometric(0.6)) - 1, schedule.max_raised - 1)
            child = mutate(space, parent, posterior.costs, rng, n_raised, posterior.partners)
            origin = "mutation"
        else:
            n_moves = int(rng.integers(2, max(3, len(parent) // 4)))
            child = nearby(space, parent, posterior.drawn(rng), n_moves)
            origin = "knapsack"
        key = tuple(child.tolist())
        if key not in seen:
            seen.add(key)
            n_found += 1
            yield child, origin
        if n_found == schedule.n_offspring:
            return
