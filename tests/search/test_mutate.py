"""Mutations: neighbors within the budget, nothing left over, what is fixed stays."""

from __future__ import annotations

import numpy as np
import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from search_spaces import make_space, spaces

from quantkit.search.allocation import Choices, SearchSpace
from quantkit.search.mutate import mutate
from quantkit.search.propose import Costs, knapsack, spend


def start(space: SearchSpace, costs: Costs, seed: int) -> Choices:
    """Some full allocation within the budget."""
    rng = np.random.default_rng(seed)
    if seed % 2:
        return knapsack(space, costs)
    choices = rng.integers(0, space.n_choices)
    while not space.fits(choices):
        choices[rng.choice(np.flatnonzero(choices > 0))] -= 1
    return spend(space, choices, costs)


def swap_exists(space: SearchSpace, parent: Choices) -> bool:
    """Whether raising some tensor by a step can be paid for by lowering others."""
    for raised in np.flatnonzero(parent < space.n_choices - 1):
        lowest = np.zeros_like(parent)
        lowest[raised] = parent[raised] + 1
        if space.fits(lowest):
            return True
    return False


@examples(200)
@given(spaces(), st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_children_keep_the_budget_and_use_it(drawn: tuple, seed: int, n_raised: int) -> None:
    space, costs = drawn
    parent = start(space, costs, seed)
    kept = parent.copy()
    child = mutate(space, parent, costs, np.random.default_rng(seed), n_raised)
    assert np.array_equal(parent, kept), "the parent was written to"
    assert space.fits(child) and not list(space.upgrades(child))
    assert bool((child >= 0).all()) and bool((child < space.n_choices).all())
    assert bool((child == parent)[space.n_choices == 1].all()), "a pinned tensor moved"


@examples(100)
@given(spaces(max_choices=4), st.integers(0, 2**32 - 1))
def test_something_changes_where_a_swap_is_possible(drawn: tuple, seed: int) -> None:
    """However unlikely the estimates make it: an eightieth of the odds is left to each tensor."""
    space, costs = drawn
    parent = start(space, costs, seed)
    rng = np.random.default_rng(seed)
    possible = swap_exists(space, parent)
    children = (mutate(space, parent, costs, rng, 1) for _ in range(2000 if possible else 20))
    moved = any(not np.array_equal(child, parent) for child in children)
    assert moved == possible


def test_a_swap_is_found() -> None:
    """Two equal tensors, room for one to be large: the child is the other way round."""
    space = make_space([[100, 200], [100, 200]], 1000 + 128 + 224)
    costs = [np.array([1.0, 0.1]), np.array([1.0, 0.1])]
    parent = np.array([1, 0])
    child = mutate(space, parent, costs, np.random.default_rng(0), 1)
    assert child.tolist() == [0, 1]


def test_mutations_reach_most_of_a_small_space() -> None:
    """From the knapsack's answer, by chains of mutations: full allocations are not cut off."""
    rng = np.random.default_rng(0)
    sizes = [[100, 200, 300]] * 5
    space = make_space(sizes, make_space(sizes).n_bytes(np.ones(5, np.int64)) + 10)
    costs = [np.sort(rng.random(3))[::-1] for _ in range(5)]
    full = {
        (a, b, c, d, e)
        for a in range(3)
        for b in range(3)
        for c in range(3)
        for d in range(3)
        for e in range(3)
        if not list(space.upgrades(np.array([a, b, c, d, e])))
        and space.fits(np.array([a, b, c, d, e]))
    }
    seen = {tuple(knapsack(space, costs).tolist())}
    frontier = list(seen)
    for _ in range(400):
        parent = np.array(frontier[rng.integers(len(frontier))])
        child = tuple(mutate(space, parent, costs, rng, int(rng.integers(1, 3))).tolist())
        if child not in seen:
            seen.add(child)
            frontier.append(child)
    assert seen <= full and len(seen) >= 0.9 * len(full)


def test_the_largest_file_has_no_neighbor() -> None:
    space = make_space([[100, 200], [100, 200]])
    child = mutate(space, space.largest, [np.ones(2)] * 2, np.random.default_rng(0), 2)
    assert np.array_equal(child, space.largest)


def test_odds_follow_the_estimated_gain() -> None:
    """Of two tensors of one size, the one whose upgrade saves 100 times as much is raised about ten
    times as often (the odds are flattened by a square root); the other still gets its turn.
    """
    sizes = [[100, 200], [100, 200], [100, 200]]
    space = make_space(sizes, make_space(sizes).n_bytes(np.array([0, 0, 1])))
    costs = [np.array([100.0, 0.0]), np.array([1.0, 0.0]), np.array([1.0, 0.0])]
    rng = np.random.default_rng(0)
    children = [tuple(mutate(space, np.array([0, 0, 1]), costs, rng, 1)) for _ in range(600)]
    n = [children.count((1, 0, 0)), children.count((0, 1, 0))]
    assert sum(n) == 600 and 5 < n[0] / n[1] < 20


def test_the_generator_decides() -> None:
    sizes = [[100, 200, 300]] * 12
    space = make_space(sizes, make_space(sizes).n_bytes(np.ones(12, np.int64)))
    costs = [np.array([3.0, 2.0, 1.0])] * 12
    parent = knapsack(space, costs)

    def children(seed: int) -> list[list[int]]:
        rng = np.random.default_rng(seed)
        return [mutate(space, parent, costs, rng, 2).tolist() for _ in range(5)]

    assert children(1) == children(1) != children(2)


@pytest.mark.parametrize("cost", [0.0, 1e-300, 1e300])
def test_costs_at_the_edges(cost: float) -> None:
    """Estimates of zero, of next to nothing and of far too much still give odds."""
    sizes = [[100, 200, 300]] * 4
    space = make_space(sizes, make_space(sizes).n_bytes(np.ones(4, np.int64)))
    costs = [np.array([cost, 1.0, 0.0])] * 3 + [np.array([1.0, 1.0, 1.0])]
    for seed in range(20):
        child = mutate(space, np.ones(4, np.int64), costs, np.random.default_rng(seed), 2)
        assert space.fits(child)
