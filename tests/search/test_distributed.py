"""What every rank does of a judgment: together all of it, each part once, and the same parts for
the parent as for its children.
"""

from __future__ import annotations

import itertools

import pytest

from quantkit.search.distributed import _Asked, _Share, share_of
from quantkit.search.fitness import part_of

SIZES = (1, 2, 3, 8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("n_unit", [1, 2])
@pytest.mark.parametrize("first, last", [(0, 2), (2, 10), (10, 32), (8, 32), (0, 33)])
def test_parts_lie_side_by_side(size: int, n_unit: int, first: int, last: int) -> None:
    parts = [part_of(rank, size, first, last, n_unit) for rank in range(size)]
    assert parts[0][0] == first and parts[-1][1] == last
    assert all(one[1] == other[0] for one, other in itertools.pairwise(parts))
    assert all(part[0] % n_unit == 0 for part in parts if part[0] < last)
    n_units = [-(-(end - start) // n_unit) for start, end in parts]
    assert max(n_units) - min(n_units) <= 1


def shares(size: int, n_candidates: int, first: int, last: int) -> list[_Share]:
    asked = _Asked(tuple((i,) for i in range(n_candidates)), first, last)
    return [share_of(rank, size, asked, n_batch=8, n_unit=1) for rank in range(size)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("first, last", [(0, 8), (8, 32)])
@pytest.mark.parametrize("n_candidates", [2, 5, 12])
def test_everything_is_judged_once(size: int, first: int, last: int, n_candidates: int) -> None:
    judged = [
        (i, sequence)
        for share in shares(size, n_candidates, first, last)
        for i in share.candidates
        for sequence in range(share.first, share.last)
    ]
    everything = itertools.product(range(n_candidates), range(first, last))
    assert sorted(judged) == list(everything)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("first, last", [(0, 8), (8, 32)])
def test_the_parent_is_judged_where_its_states_are_read(size: int, first: int, last: int) -> None:
    parent, children = shares(size, 1, first, last), shares(size, 2 * size, first, last)
    for own, of_children in zip(parent, children, strict=True):
        assert own.candidates == (0,)
        assert (own.first, own.last) == (of_children.first, of_children.last)
