"""Allocations: sizes in integers, upgrades, pruning; and the plan's budget against real layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_spaces import everything, make_space, spaces
from tiny_gguf import Shape, write_llama

from quantkit.config import RunConfig
from quantkit.config.levels import plan_levels
from quantkit.config.targets import BitsPerWeight, FileSize, FitsMemory, LikeMix, Target
from quantkit.errors import QuantkitError
from quantkit.ggml.types import QuantType
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.write import slot_bytes
from quantkit.llamacpp.contexts import context_memory
from quantkit.llamacpp.output import lay_out_output
from quantkit.planning.plan import budgets_of, check_sizes, specs_of
from quantkit.run.recipe import Provenance
from quantkit.search.allocation import SearchSpace, choices_of, prune, pruned
from quantkit.tensors import Candidate


@given(spaces(), st.integers(0, 2**32 - 1))
def test_sizes_add_up(drawn: tuple, seed: int) -> None:
    space, _ = drawn
    choices = np.random.default_rng(seed).integers(0, space.n_choices)
    slots = [row[k] for row, k in zip(space.slot_bytes, choices.tolist(), strict=True)]
    assert space.n_bytes(choices) == space.fixed_bytes + sum(slots)
    assert type(space.n_bytes(choices)) is int
    assert space.fits(choices) == (space.n_bytes(choices) <= space.limit_bytes)
    keys = space.keys(choices)
    assert [keys[name] for name in space.tensors] == [
        row[k].key for row, k in zip(space.candidates, choices.tolist(), strict=True)
    ]


@given(spaces(max_tensors=4, max_choices=4))
def test_smallest_and_largest(drawn: tuple) -> None:
    space, _ = drawn
    sizes = [space.n_bytes(choices) for choices in everything(space)]
    assert space.n_bytes(space.smallest) == min(sizes)
    assert space.n_bytes(space.largest) == max(sizes)


@given(spaces(), st.integers(0, 2**32 - 1))
def test_upgrades_are_all_larger_choices_that_fit(drawn: tuple, seed: int) -> None:
    space, _ = drawn
    choices = np.random.default_rng(seed).integers(0, space.n_choices)
    wanted = []
    for tensor in range(len(choices)):
        for larger in range(choices[tensor] + 1, int(space.n_choices[tensor])):
            other = choices.copy()
            other[tensor] = larger
            assert space.n_bytes(other) - space.n_bytes(choices) == space.step_bytes(
                tensor, int(choices[tensor]), larger
            )
            if space.fits(other):
                wanted.append((tensor, larger))
    assert list(space.upgrades(choices)) == wanted


def test_sizes_beyond_32_bits() -> None:
    space = make_space([[3 * 10**10, 9 * 10**10], [5 * 10**10, 10**11]])
    assert space.n_bytes(space.largest) == 1000 + 9 * 10**10 + 10**11


def candidate(name: str, n_bytes: int, error: float, method: str = "gptq") -> Candidate:
    return Candidate("t", QuantType(name), method, "f", 0, n_bytes, error, None)


def test_prune_keeps_what_is_not_beaten() -> None:
    q2, q3, q4 = candidate("Q2_K", 10, 0.5), candidate("Q3_K", 20, 0.6), candidate("Q4_K", 30, 0.2)
    same_size = candidate("Q4_0", 30, 0.3)
    same_error = candidate("Q5_K", 40, 0.2)
    assert prune([q4, same_error, q3, same_size, q2]) == (q2, q4)
    assert prune([q3]) == (q3,)


@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.floats(0, 1), st.sampled_from(["Q2_K", "Q4_K", "Q6_K"])),
        min_size=1,
        max_size=12,
    )
)
def test_prune_is_the_lower_left_hull(rows: list[tuple[int, float, str]]) -> None:
    given_ = [candidate(name, n_bytes, error) for n_bytes, error, name in rows]
    kept = prune(given_)
    assert [c.n_bytes for c in kept] == sorted({c.n_bytes for c in kept})
    assert all(one.error > two.error for one, two in zip(kept, kept[1:], strict=False))
    for c in given_:
        assert any(k.n_bytes <= c.n_bytes and k.error <= c.error for k in kept)
    assert prune(list(reversed(given_))) == kept


def test_choices_of_types() -> None:
    space = make_space([[10, 20, 30], [10, 20]])
    qtypes = [[c.qtype for c in row] for row in space.candidates]
    found = choices_of(space, {"t0": qtypes[0][2], "t1": qtypes[1][0], "other": "x"})
    assert found is not None and found.tolist() == [2, 0]
    assert choices_of(space, {"t0": qtypes[0][2]}) is None


@given(spaces(), st.lists(st.floats(0.1, 1), min_size=1))
def test_a_pruned_space_has_the_same_sizes(drawn: tuple, errors: list[float]) -> None:
    """Whatever is kept costs what it did, and the smallest file is as small."""
    space, _ = drawn
    rows = tuple(
        tuple(replace(c, error=errors[(i + k) % len(errors)]) for k, c in enumerate(row))
        for i, row in enumerate(space.candidates)
    )
    space = replace(space, candidates=rows)
    kept = pruned(space)
    assert kept.candidates == tuple(map(prune, rows))
    assert kept.n_bytes(kept.smallest) == space.n_bytes(space.smallest)
    for row, slots, old, old_slots in zip(
        kept.candidates, kept.slot_bytes, space.candidates, space.slot_bytes, strict=True
    ):
        assert [old_slots[old.index(c)] for c in row] == list(slots)


def test_a_type_that_is_beaten_is_replaced_by_what_beats_it() -> None:
    """Uniform files are proposed though one of their tensors lacks the type."""
    plain = make_space([[10, 20, 30], [10, 20, 30]])
    named = [
        tuple(
            replace(c, qtype=QuantType(name))
            for c, name in zip(row, ("Q4_0", "Q4_1", "Q5_0"), strict=True)
        )
        for row in plain.candidates
    ]
    first, second, third = named[1]
    kept = prune([first, replace(second, error=2 * first.error), third])
    space = replace(plain, candidates=(named[0], kept))
    wanted = {"Q4_0": [0, 0], "Q4_1": [1, 0], "Q5_0": [2, 1], "F32": [2, 1]}
    for name, choices in wanted.items():
        found = choices_of(space, dict.fromkeys(space.tensors, QuantType(name)))
        assert found is not None and found.tolist() == choices
    assert choices_of(space, dict.fromkeys(space.tensors, QuantType("Q2_K"))) is None


LEVELS = ("Q2_K", "Q4_K", "Q6_K")
PROVENANCE = Provenance("0" * 40, ("docs", "code", "prose", "dialogue"), 210, 64)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    return GgufFile(write_llama(tmp_path_factory.mktemp("base") / "base.gguf", Shape(n_ff=512)))


def exact(base: GgufFile, config: RunConfig, at: int) -> int:
    """The size of the file with every tensor at its smallest (0) or largest (-1) type."""
    levels = plan_levels(specs_of(base), config)
    types = {t: levels.choices(t)[at] for t in levels.types}
    return lay_out_output(base, types, PROVENANCE, "Q8_0").n_bytes


def config_of(base: GgufFile, n_bytes: int | None = None) -> RunConfig:
    targets = () if n_bytes is None else (FileSize(f"{n_bytes}B"),)
    return RunConfig("m", targets=targets, levels=LEVELS)


def test_the_plans_smallest_can_be_made(base: GgufFile) -> None:
    """A budget that the plan accepts must not be refused after hours of work."""
    smallest = check_sizes(
        config_of(base), base, plan_levels(specs_of(base), config_of(base))
    ).smallest_bytes
    assert smallest >= exact(base, config_of(base), 0)


def test_the_plans_largest_can_be_reached(base: GgufFile) -> None:
    """'Ask for at most N bytes' names a budget that the search does not refuse as too large."""
    config = config_of(base)
    largest = check_sizes(config, base, plan_levels(specs_of(base), config)).largest_bytes
    ends = exact(base, config, 0), exact(base, config, -1), exact(base, config, -1)
    (budget,), refused = budgets_of(config_of(base, largest), base, *ends)
    assert budget.limit_bytes == largest and not refused


def test_budgets_outside_are_refused(base: GgufFile) -> None:
    levels = plan_levels(specs_of(base), config_of(base))
    for n_bytes, word in ((1, "below the smallest"), (10**12, "above the largest")):
        with pytest.raises(QuantkitError, match=word) as error:
            check_sizes(config_of(base, n_bytes), base, levels)
        assert error.value.remedy


def test_every_kind_of_budget(base: GgufFile) -> None:
    n = base.n_elements

    def limit(*targets: Target, types: tuple[tuple[str, str], ...] = ()) -> list[int]:
        budgets, _ = budgets_of(
            RunConfig("m", targets=targets, types=types), base, 0, 10**12, 10**12
        )
        return [budget.limit_bytes for budget in budgets]

    assert limit(BitsPerWeight("4.5")) == [int(4.5 * n / 8)]
    assert limit(FileSize("1.5MB")) == [1_500_000]
    beside = context_memory(base).n_bytes(64)
    assert limit(FitsMemory("1GB@64")) == [1_000_000_000 - beside]
    (like,) = limit(LikeMix("Q4_K_M"))
    assert [like] == limit(), "the default"
    assert limit(types=(("default", "Q4_0"),)) == []
    q4 = QuantType("Q4_K")
    uniform = sum(
        slot_bytes(base, q4.n_bytes(t.shape) if len(t.shape) == 2 else t.n_bytes)
        for t in base.tensors.values()
    )
    assert like > uniform


def test_several_budgets_are_sorted_and_refused_one_by_one(base: GgufFile) -> None:
    values = ("900kB", "1B", "500kB", "900kB", "90GB")
    config = RunConfig("m", targets=tuple(FileSize(v) for v in values))
    budgets, refused = budgets_of(config, base, 100_000, 2 * 10**6, 10**6)
    assert [b.limit_bytes for b in budgets] == [500_000, 900_000], "each once, smallest first"
    assert [b.target for b in refused] == ["1B", "90GB"]
    assert "below the smallest" in refused[0].refusal and "above" in refused[1].refusal


def test_more_memory_than_the_model_can_use_is_no_mistake(base: GgufFile) -> None:
    config = RunConfig("m", targets=(FitsMemory("80GB@64"),))
    (budget,), refused = budgets_of(config, base, 100_000, 2 * 10**6, 10**6)
    assert budget.limit_bytes == 10**6 and not refused
    config = RunConfig("m", targets=(FitsMemory("100MB@64"),))
    with pytest.raises(QuantkitError, match=r"does not fit in 0\.1 GB with a context of 64"):
        budgets_of(config, base, 100_000, 2 * 10**6, 10**6)


def test_a_search_space_is_a_value(tmp_path: Path) -> None:
    space = make_space([[10, 20]])
    with pytest.raises(AttributeError):
        space.limit_bytes = 3  # type: ignore[misc]
    assert isinstance(space, SearchSpace)
