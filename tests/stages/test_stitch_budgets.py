"""Which of several sizes get a file of their own."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from search_spaces import Toy, spaces

from quantkit.config.budgets import Budget
from quantkit.files import write_json
from quantkit.ggml.types import QUANTIZED, QuantType
from quantkit.run.folder import RunDir
from quantkit.search.answers import Given, Searched, load_searched
from quantkit.search.evopress import EvoPress
from quantkit.search.optimizer import Problem, Step
from quantkit.search.propose import knapsack, spend, uniform
from quantkit.stages.stitch import without_worse
from quantkit.tensors import CandidateKey

SIZES = tuple(Budget(f"{n} MB", n * 1_000_000) for n in (10, 20, 30, 40))


def allocation(name: str) -> dict[str, CandidateKey]:
    return {"a": CandidateKey("a", QuantType(name), "gptq")}


TYPES = [allocation(name) for name in ("Q3_K", "Q4_K", "Q5_K", "Q6_K")]


def test_a_larger_file_is_never_worse() -> None:
    found = list(zip(SIZES, TYPES, (0.4, 0.2, 0.3, 0.1), strict=True))
    kept, (worse,) = without_worse(found)
    assert kept == [SIZES[0], SIZES[1], SIZES[3]]
    assert worse.limit_bytes == SIZES[2].limit_bytes
    assert worse.refusal == (
        "the smaller file for 20 MB is closer to the original (KL 0.20000 against 0.30000)"
    )


def test_one_file_for_two_sizes() -> None:
    found = list(zip(SIZES, [TYPES[0], TYPES[0], *TYPES[1:3]], (0.4, None, 0.3, 0.3), strict=True))
    kept, (same,) = without_worse(found)
    assert kept == [SIZES[0], *SIZES[2:]] and "the same file" in same.refusal


def test_files_that_nobody_judged_all_stay() -> None:
    found = [(size, types, None) for size, types in zip(SIZES, TYPES, strict=True)]
    assert without_worse(found) == (list(SIZES), [])


def test_what_the_search_said_is_read_back(tmp_path: Path) -> None:
    artifacts = RunDir(tmp_path).artifacts
    sizes = 100, 90, 50, 200
    searched = Searched("100 B", *sizes, 4, 4096, 0.3, 0.2, 0.01, False)
    for limit, answer in ((100, searched), (200, Given("200 B", *sizes))):
        artifacts.answer(limit).mkdir(parents=True)
        write_json(artifacts.answer(limit) / "budget.json", answer)
    assert load_searched(artifacts, 100) == searched
    assert load_searched(artifacts, 200) is None


@given(st.lists(st.tuples(st.sampled_from(QUANTIZED), st.none() | st.floats(0, 9)), max_size=9))
def test_every_size_has_the_best_file_of_at_most_its_bytes(
    drawn: list[tuple[QuantType, float | None]],
) -> None:
    found = [
        (Budget(f"{i} MB", i), {"a": CandidateKey("a", qtype, "gptq")}, kl)
        for i, (qtype, kl) in enumerate(drawn)
    ]
    kept, left_out = without_worse(found)
    every = [*kept, *left_out]
    assert sorted(b.limit_bytes for b in every) == list(range(len(found)))
    assert not any(b.refusal for b in kept) and all(b.refusal for b in left_out)
    served = [kl for i, (_, _, kl) in enumerate(found) if found[i][0] in kept and kl is not None]
    assert served == sorted(served, reverse=True)
    for budget in left_out:
        _, types, kl = found[budget.limit_bytes]
        smaller = [row for row in found[: budget.limit_bytes] if row[0] in kept]
        same = any(t == types for _, t, _ in found[: budget.limit_bytes])
        assert smaller and (same or min(k for _, _, k in smaller if k is not None) < (kl or 0))


@examples(20)
@given(spaces(max_tensors=6), st.integers(0, 99))
def test_a_larger_searched_file_is_never_worse(drawn: tuple, seed: int) -> None:
    """As the search stage goes from size to size; judged anew, on the sequences that decide."""
    whole, costs = drawn
    rng = np.random.default_rng(seed)
    estimates = [cost * 10 ** rng.uniform(-1, 1) for cost in costs]  # what the search is told
    least, most = whole.n_bytes(whole.smallest), whole.n_bytes(whole.largest)
    limits = sorted({int(n) for n in np.linspace(least, most, 5)})
    before: np.ndarray | None = None
    found, found_choices = [], {}
    for limit in limits:
        space = replace(whole, limit_bytes=limit)
        toy = Toy(space, costs, seed)
        first = [knapsack(space, estimates), *uniform(space, estimates)]
        first += [] if before is None else [spend(space, before, estimates)]
        problem = Problem(space, toy, estimates, lambda f=first: [(c, "") for c in f], 20_000, seed)
        steps: list[Step] = []
        step = EvoPress().run(problem, None, steps.append)
        before = found_choices[limit] = np.array(step.choices, np.int64)
        found.append((Budget(f"{limit}", limit), space.keys(before), step.kl))
    kept, left_out = without_worse(found)
    judge = Toy(replace(whole, limit_bytes=most), costs, seed)
    kl = [float(judge.kl(found_choices[b.limit_bytes], 0, 12).mean()) for b in kept]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(kl))
    assert len(kept) + len(left_out) == len(limits)
