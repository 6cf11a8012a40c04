"""Which of several sizes get a file of their own."""

from __future__ import annotations

from quantkit.config.budgets import Budget
from quantkit.ggml.types import QuantType
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


def test_files_that_are_not_tuned_all_stay() -> None:
    found = [(size, types, None) for size, types in zip(SIZES, TYPES, strict=True)]
    assert without_worse(found) == (list(SIZES), [])
