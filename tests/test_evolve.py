"""Evolution, on a toy evaluator that answers at once: budget, elitism, resume to the bit."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from search_spaces import Toy, make_space, spaces

from quantkit.search.allocation import SearchSpace
from quantkit.search.evolve import Plan, SearchState, begin, evolve
from quantkit.search.propose import Costs, knapsack, uniform
from quantkit.tensors import to_json

PLAN = Plan(n_tokens=20_000)


def problem(seed: int = 0, n: int = 14) -> tuple[SearchSpace, Costs]:
    """Tensors of three sizes, five choices each, budget in the middle."""
    rng = np.random.default_rng(seed)
    sizes = [(int(s) * np.arange(2, 7)).tolist() for s in rng.choice([100, 700, 3000], n)]
    whole = make_space(sizes)
    space = make_space(sizes, whole.n_bytes(np.full(n, 2)))
    costs = [rng.lognormal(0, 1.5) * 4.0 ** -np.arange(5.0) for _ in range(n)]
    return space, costs


def search(
    space: SearchSpace, costs: Costs, seed: int = 0, plan: Plan = PLAN
) -> tuple[SearchState, list[SearchState], Toy]:
    """A whole search: final state, all saved states (generation 0 first), the evaluator."""
    toy = Toy(space, costs)
    first = begin(toy, plan, [(c, "uniform") for c in uniform(space, estimated(costs))], seed)
    saved = [first]
    final = evolve(space, toy, estimated(costs), plan, first, saved.append)
    return final, saved, toy


def estimated(costs: Costs) -> Costs:
    """What the search is told: the costs, off by a factor of up to ten each way."""
    rng = np.random.default_rng(99)
    return [c * 10 ** rng.uniform(-1, 1) for c in costs]


def same(one: SearchState, other: SearchState) -> bool:
    return json.dumps(to_json(one)) == json.dumps(to_json(other))


@examples(40)
@given(spaces(max_tensors=6), st.integers(0, 2**32 - 1))
def test_no_candidate_exceeds_the_budget(drawn: tuple, seed: int) -> None:
    """The toy refuses any that does; the winner leaves less than the smallest upgrade unused."""
    space, costs = drawn
    toy = Toy(space, costs)
    proposals = [(knapsack(space, costs), "knapsack"), *((c, "u") for c in uniform(space, costs))]
    plan = Plan(n_tokens=4000, n_offspring=4)
    state = evolve(space, toy, costs, plan, begin(toy, plan, proposals, seed), lambda _: None)
    best = np.array(state.best.choices)
    assert space.fits(best) and not list(space.upgrades(best))


def test_it_never_gets_worse_and_here_gets_better() -> None:
    space, costs = problem()
    final, _, _ = search(space, costs)
    kl = [row[2] for row in final.history]
    assert all(later <= earlier for earlier, later in zip(kl, kl[1:], strict=False))
    assert kl[-1] < 0.8 * kl[0]
    assert final.generation == len(kl) - 1 > 5


def test_it_beats_the_estimates_alone() -> None:
    """With estimates that are off, measuring pays: better than the knapsack on those estimates."""
    for seed in range(3):
        space, costs = problem(seed)
        toy = Toy(space, costs)
        start = knapsack(space, estimated(costs))
        alone = float(toy.kl(start, 0, 8).mean())
        plan = replace(PLAN, n_tokens=40_000)
        first = begin(toy, plan, [(start, "knapsack")], seed)
        final = evolve(space, toy, estimated(costs), plan, first, lambda _: None)
        assert final.best.kl < alone


def test_the_parent_defends_its_place_on_the_tokens_that_decide() -> None:
    space, costs = problem()
    _, saved, toy = search(space, costs)
    last = PLAN.rounds[-1]
    deciding = [choices for choices, first, n in toy.calls if (first, n) == (0, last)]
    for before, after in zip(saved, saved[1:], strict=False):
        assert before.best.choices in deciding
        assert after.best.kl <= before.best.kl
        if after.best.choices == before.best.choices:
            assert after.best.kl == before.best.kl


def test_candidates_meet_more_tokens_in_each_round() -> None:
    """All offspring on two sequences, three of them and the parent on eight."""
    space, costs = problem()
    _, saved, toy = search(space, costs)
    per_generation = PLAN.n_offspring * 2 + (PLAN.n_kept[0] + 1) * 8
    for before, after in zip(saved, saved[1:], strict=False):
        assert after.n_tokens - before.n_tokens == per_generation * toy.n_ctx


def test_tokens_are_counted_and_the_plan_is_kept() -> None:
    space, costs = problem()
    final, saved, toy = search(space, costs)
    assert final.n_tokens == toy.n_tokens == sum((n - f) * toy.n_ctx for _, f, n in toy.calls)
    assert saved[-2].n_tokens < PLAN.n_tokens <= final.n_tokens
    assert [row[1] for row in final.history] == [s.n_tokens for s in saved]


def test_the_same_seed_gives_the_same_search() -> None:
    space, costs = problem()
    assert same(search(space, costs, 5)[0], search(space, costs, 5)[0])
    assert not same(search(space, costs, 5)[0], search(space, costs, 6)[0])


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_resumed_from_any_state_it_ends_the_same(seed: int) -> None:
    """Through JSON and with a fresh evaluator, as after kill -9: every later state is equal."""
    space, costs = problem(seed)
    final, saved, _ = search(space, costs, seed)
    assert len(saved) > 6
    for at, state in enumerate(saved):
        loaded = SearchState.from_json(json.loads(json.dumps(to_json(state))))
        assert same(loaded, state)
        again: list[SearchState] = []
        end = evolve(space, Toy(space, costs), estimated(costs), PLAN, loaded, again.append)
        assert same(end, final)
        assert all(same(a, b) for a, b in zip(again, saved[at + 1 :], strict=True))


def test_the_first_population() -> None:
    """Equal proposals are evaluated once and keep their first name; the best of all wins."""
    space, costs = problem()
    toy = Toy(space, costs)
    found = uniform(space, costs)
    best = min(found, key=lambda c: Toy(space, costs).kl(c, 0, 8).mean())
    proposals = [(c, f"u{i}") for i, c in enumerate(found)]
    proposals += [(c.copy(), "again") for c in found]
    state = begin(toy, PLAN, proposals, 0)
    assert len({c for c, _, _ in toy.calls}) == len({tuple(c.tolist()) for c in found})
    assert state.best.choices == tuple(best.tolist()) and state.best.origin.startswith("u")
    assert state.best.kl == pytest.approx(float(Toy(space, costs).kl(best, 0, 8).mean()))
    assert state.history == ((0, toy.n_tokens, state.best.kl, state.best.stderr),)


def test_one_proposal_and_few_sequences() -> None:
    space, costs = problem()
    toy = Toy(space, costs, n_sequences=3)
    state = begin(toy, PLAN, [(space.smallest, "smallest")], 0)
    final = evolve(space, toy, costs, replace(PLAN, n_tokens=3000), state, lambda _: None)
    assert max(n for _, _, n in toy.calls) == 3
    assert final.best.kl <= state.best.kl


def test_where_nothing_can_be_changed_it_ends() -> None:
    space = make_space([[100, 200], [100, 200]])  # the largest file fits
    costs = [np.array([1.0, 0.1])] * 2
    toy = Toy(space, costs)
    state = begin(toy, PLAN, [(space.largest, "largest")], 0)
    assert same(evolve(space, toy, costs, PLAN, state, lambda _: None), state)


def test_the_best_allocation_of_a_small_space_is_found() -> None:
    """Five tensors, three choices: 243 allocations. Three seeds end at the best of them."""
    rng = np.random.default_rng(3)
    sizes = [[100, 200, 300]] * 5
    space = make_space(sizes, make_space(sizes).n_bytes(np.ones(5, np.int64)))
    costs = [np.sort(rng.random(3))[::-1] for _ in range(5)]
    toy = Toy(space, costs)
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 5), -1).reshape(-1, 5)
    best = min(float(toy.kl(c, 0, 8).mean()) for c in grid if space.fits(c))
    for seed in range(3):
        final, _, _ = search(space, costs, seed)
        assert final.best.kl == pytest.approx(best)
