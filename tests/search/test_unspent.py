"""What a budget leaves unused: the sizes that are named can be spent, and nothing between can."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_spaces import make_space, spaces
from tiny_gguf import Shape, write_llama

from quantkit.config import RunConfig
from quantkit.config.levels import plan_levels
from quantkit.config.targets import FileSize
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.write import data_bytes
from quantkit.planning.plan import check_sizes, made_levels, specs_of
from quantkit.planning.spending import foretold, kinds_of
from quantkit.search.allocation import Choices, SearchSpace
from quantkit.search.propose import knapsack
from quantkit.search.unspent import Unspent, unspent
from quantkit.sizes import parse_bytes, size, size_for


def larger(space: SearchSpace, choices: Choices) -> list[int]:
    """The bytes of every step up, of one tensor each."""
    return [
        space.step_bytes(i, k, other)
        for i, k in enumerate(choices.tolist())
        for other in range(k + 1, len(space.candidates[i]))
        if space.step_bytes(i, k, other)
    ]


@given(spaces())
def test_what_is_named_can_be_spent(drawn: tuple) -> None:
    space, costs = drawn
    choices = knapsack(space, costs)
    found, steps = unspent(space, choices), larger(space, choices)
    unused = space.limit_bytes - space.n_bytes(choices)
    if found is None:
        assert unused < 0.01 * space.limit_bytes or min(steps) <= unused
        return
    assert found.unused_bytes == unused > 0
    assert all(step > unused for step in steps)
    same, *more = found.worth_asking
    assert unspent(replace(space, limit_bytes=same), choices) is None
    assert bool(more) == bool(steps)
    for n_bytes in more:
        assert n_bytes > space.limit_bytes and n_bytes - same == min(steps)
        there = replace(space, limit_bytes=n_bytes)
        up = [(i, k) for i, k in there.upgrades(choices) if there.step_bytes(i, int(choices[i]), k)]
        assert space.tensors.index(found.tensor) in {i for i, _ in up}
        below = replace(space, limit_bytes=n_bytes - 1)
        assert unspent(below, choices) is None or unspent(below, choices) == replace(
            found, limit_bytes=n_bytes - 1
        )


def test_a_table_that_is_most_of_the_file() -> None:
    """By hand: the table takes 600 or 1,200 kB, everything else 100 at most."""
    space = make_space([[600_000, 1_200_000], [40_000, 100_000]], 900_000, fixed_bytes=0)
    found = unspent(space, np.array([0, 1]))
    assert found == Unspent(900_000, 700_000, "t0", 600_000)
    assert found.sentence() == (
        "200 kB of 900 kB stay unused: the next larger type of t0 takes 600 kB more."
        " Sizes worth asking for: 700 kB (the same file) or 1.3 MB."
    )
    assert unspent(space, np.array([0, 0])) is None, "the other tensor can still grow"
    whole = replace(space, limit_bytes=2_000_000)
    found = unspent(whole, whole.largest)
    assert found is not None and found.worth_asking == (1_300_000,)
    assert found.sentence(is_expected=True) == (
        "700 kB of 2.0 MB would stay unused: every tensor has its largest type."
        " Ask for 1.3 MB to get the same file."
    )


@given(st.integers(1000, 10**13))
def test_a_size_that_is_named_has_room(n_bytes: int) -> None:
    shown = size_for(n_bytes)
    assert n_bytes <= parse_bytes(shown) <= max(n_bytes + 1000, 1.1 * n_bytes)
    assert size(parse_bytes(shown)) == shown


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    return GgufFile(write_llama(path, Shape(n_embd=256, n_ff=512, n_layer=2, n_vocab=50_000)))


def test_a_plan_foretells_it(base: GgufFile) -> None:
    """Of real tensors: sizes between two types of the table are told of, and what they name is
    not. Without named levels the rest goes up to 16 bits, and more can be spent.
    """
    specs = specs_of(base)
    config = RunConfig("x", levels=("Q4_K", "Q5_K", "Q6_K", "Q8_0"))
    kinds = kinds_of(base, plan_levels(specs, config))
    assert sum(kind.n_tensors for kind in kinds) == len(plan_levels(specs, config).types)
    assert sum(kind.n_tensors * kind.n_weights for kind in kinds) <= base.n_elements

    def told(limit: int) -> Unspent | None:
        asked = replace(config, targets=(FileSize(str(limit)),))
        made = made_levels(asked, base, specs)
        levels = list(map(str, made.levels.levels))
        found = foretold(kinds, made.sizes.smallest_bytes, levels, [limit])
        return found[0] if found else None

    sizes = check_sizes(
        replace(config, targets=(FileSize("20MB"),)), base, plan_levels(specs, config)
    )
    steps = range(sizes.smallest_bytes, sizes.largest_bytes, 199_999)
    found = [left for limit in steps if (left := told(limit)) is not None]
    assert len(found) > 5, "a table of three quarters of the file has wide steps"
    for left in found:
        assert left.tensor in base.tensors
        for n_bytes in left.worth_asking:
            again = told(min(parse_bytes(size_for(n_bytes)), sizes.largest_bytes))
            assert again is None or again.unused_bytes < left.unused_bytes
    types = {name: t.qtype for name, t in base.tensors.items()} | plan_levels(
        specs, config
    ).smallest
    assert sizes.smallest_bytes - data_bytes(base, types) == pytest.approx(
        min(t.offset for t in base.tensors.values()), abs=5000
    )
