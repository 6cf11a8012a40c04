"""At most so many types: the set is the best by estimate, and every tensor still has a choice."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_spaces import make_space, spaces, total

from quantkit.ggml.types import QUANTIZED, QuantType
from quantkit.search.allocation import SearchSpace
from quantkit.search.caps import cap_types
from quantkit.search.propose import Costs, knapsack

SIZES = [[100, 200, 300, 400], [50, 90, 120, 180], [10, 20, 30, 40]]


def errors(space: SearchSpace) -> Costs:
    return [np.array([c.error for c in of_tensor]) for of_tensor in space.candidates]


def types_of(space: SearchSpace) -> set[QuantType]:
    return {c.qtype for of_tensor in space.candidates for c in of_tensor}


@given(spaces(), st.integers(1, 5))
def test_never_more_types_and_never_a_tensor_without(
    drawn: tuple[SearchSpace, Costs], n_types: int
) -> None:
    space, _ = drawn
    capped = cap_types(space, errors, [space.limit_bytes], n_types)
    if capped is None:
        return
    assert len(types_of(capped)) <= n_types
    assert all(capped.candidates) and capped.tensors == space.tensors
    assert capped.n_bytes(capped.smallest) <= space.limit_bytes
    for old, new in zip(space.candidates, capped.candidates, strict=True):
        assert set(new) <= set(old)


def test_the_best_set_of_all() -> None:
    """Against trying every pair of types by hand."""
    space = make_space(SIZES, 1550)
    found = []
    for pair in combinations(range(4), 2):
        sizes = [[row[k] for k in pair] for row in SIZES]
        part = make_space(sizes, 1550)
        costs = [np.array([1 / (k + 1) for k in pair])] * 3
        if part.fits(part.smallest):
            found.append((total(costs, knapsack(part, costs)), {QUANTIZED[k] for k in pair}))
    capped = cap_types(space, errors, [1550], 2)
    assert capped is not None
    assert types_of(capped) == min(found, key=lambda row: row[0])[1]


def test_several_budgets_share_the_types() -> None:
    space = make_space(SIZES)
    smallest, largest = space.n_bytes(space.smallest), space.n_bytes(space.largest)
    capped = cap_types(space, errors, [smallest, largest], 2)
    assert capped is not None and QUANTIZED[0] in types_of(capped), "or the smallest is missed"


def test_too_few_for_the_pins() -> None:
    space = make_space([[100], [100, 200]])
    pinned = replace(space.candidates[0][0], qtype=QUANTIZED[3])
    space = replace(space, candidates=((pinned,), space.candidates[1]))
    assert cap_types(space, errors, [space.limit_bytes], 1) is None
    assert cap_types(space, errors, [space.limit_bytes], 2) is not None


@pytest.mark.parametrize("n_types", [4, 9])
def test_enough_types_change_nothing(n_types: int) -> None:
    space = make_space(SIZES)
    assert cap_types(space, errors, [space.limit_bytes], n_types) == space


def test_a_type_that_a_left_out_one_beats_is_a_choice() -> None:
    """In the second tensor the second type is worse than the first, which is smaller: with one type
    for all it is the best that fits nevertheless.
    """
    space = make_space([[100, 200, 400], [100, 200, 400]], 1000 + 500)
    first, second, third = space.candidates[1]
    beaten = replace(second, error=first.error + 0.1)
    space = replace(space, candidates=(space.candidates[0], (first, beaten, third)))
    capped = cap_types(space, errors, [space.limit_bytes], 1)
    assert capped is not None
    assert types_of(capped) == {second.qtype}
    uncapped = cap_types(space, errors, [space.limit_bytes], 3)
    assert uncapped is not None and len(uncapped.candidates[1]) == 2
