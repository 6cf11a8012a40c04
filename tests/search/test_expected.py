"""A search before tuning: what it expects, and that it spends bytes where tuning does not help."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_spaces import Toy, make_space, spaces, total

from quantkit.search.allocation import SearchSpace
from quantkit.search.evopress import Schedule, begin, evolve
from quantkit.search.expected import LEFT, AfterTuning, costs_after
from quantkit.search.propose import Costs, knapsack, knapsacks


def named(space: SearchSpace, n_outside: int) -> SearchSpace:
    """The space with its last tensors outside of blocks."""
    n = len(space.tensors)
    inside = n - min(n_outside, n)
    names = [f"blk.{i}.x" for i in range(inside)] + [f"table.{i}" for i in range(n - inside)]
    return replace(space, tensors=tuple(names))


@given(spaces(), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_what_adds_up_is_foreseen(drawn: tuple, n_outside: int, seed: int) -> None:
    """Where KL is the sum of the costs, the expected KL is the sum of what tuning leaves."""
    space, costs = named(drawn[0], n_outside), drawn[1]
    space = replace(space, limit_bytes=space.n_bytes(space.largest))
    toy = Toy(space, costs)
    toy.pairs[:] = 0
    toy.weights[:] = 1
    choices = np.random.default_rng(seed).integers(0, space.n_choices)
    (score,) = AfterTuning(toy, space, costs).kl_of([choices], 0, 3)
    assert score.shape == (3, 1)
    assert score == pytest.approx(total(costs_after(space, costs), choices), rel=1e-9)


def test_nothing_outside_changes_nothing_but_the_scale() -> None:
    space = named(make_space([[100, 200]] * 5), 0)
    costs = [np.array([2.0, 1.0])] * 5
    toy = Toy(space, costs)
    (plain,) = toy.kl_of([space.smallest], 0, 4)
    (seen,) = AfterTuning(toy, space, costs).kl_of([space.smallest], 0, 4)
    assert np.allclose(seen, LEFT * plain)


def problem() -> tuple[SearchSpace, Costs]:
    """Twenty tensors and a table: untuned, the bytes are best spent on the tensors."""
    bits = np.array([4.0, 6.0, 8.0])
    sizes = [(96 * bits).astype(int).tolist()] * 20 + [(1920 * bits).astype(int).tolist()]
    costs = [4.0**-bits for _ in range(20)] + [17 * 4.0**-bits]
    whole = named(make_space(sizes), 1)
    middle = np.array([1] * 20 + [0])
    return replace(whole, limit_bytes=whole.n_bytes(middle)), costs


def test_the_search_spends_where_tuning_does_not_help() -> None:
    space, costs = problem()
    told = costs_after(space, costs)
    plan = Schedule.of(n_tokens=4000, n_sequences=12, batch=1)

    def found(expects: bool) -> np.ndarray:
        toy = Toy(space, costs)
        toy.pairs[:] = 0
        judge = AfterTuning(toy, space, costs) if expects else toy
        known = told if expects else costs
        first = [(c, "knapsack") for c in [knapsack(space, known), *knapsacks(space, known)]]
        state = begin(judge, plan, first, 0)
        return np.array(
            evolve(space, judge, known, plan, state, lambda _: None).best.choices, np.int64
        )

    blind, seeing = found(False), found(True)
    assert blind[-1] == 0 and seeing[-1] == 1
    assert total(costs, blind) < total(costs, seeing)
    assert total(told, seeing) < total(told, blind)
