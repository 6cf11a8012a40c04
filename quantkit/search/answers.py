"""Keep the result of a search: by names and numbers that outlive the process."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from quantkit.config.budgets import Budget
from quantkit.files import replacing
from quantkit.ggml.types import QuantType
from quantkit.run.artifacts import Artifacts
from quantkit.run.folder import read_as
from quantkit.search.allocation import Choices, SearchSpace
from quantkit.search.optimizer import Step
from quantkit.search.unspent import Unspent, unspent
from quantkit.tensors import CandidateKey, to_json


@dataclass(frozen=True)
class Answer:
    """What the report says of the file for a budget, and of what the types could make."""

    target: str
    limit_bytes: int
    n_bytes: int
    smallest_bytes: int
    largest_bytes: int
    unspent: Unspent | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Given(Answer):
    """Nothing was left to search."""

    searched: bool = field(default=False, init=False)
    reason: str = field(default="every tensor's type is given", init=False)


@dataclass(frozen=True)
class Searched(Answer):
    """What a search came to."""

    searched: bool = field(default=True, init=False)
    generations: int
    tokens: int
    proposal_kl: float
    kl: float
    kl_stderr: float
    expects_tuning: bool


def answer(
    budget: Budget, space: SearchSpace, choices: Choices, step: Step | None, expects_tuning: bool
) -> Given | Searched:
    """Sum up what was chosen within a budget, and the last step of the search, if there was one."""
    least, most = space.n_bytes(space.smallest), space.n_bytes(space.largest)
    sizes = budget.target, budget.limit_bytes, space.n_bytes(choices), least, most
    left = unspent(space, choices)
    if step is None:
        return Given(*sizes, unspent=left)
    kl = step.trace[0][2], step.kl, step.stderr
    n_tokens = step.n_tokens
    return Searched(*sizes, step.number, n_tokens, *kl, expects_tuning, unspent=left)


@dataclass(frozen=True)
class Choice:
    """How a tensor is stored."""

    qtype: QuantType
    method: str


def by_name(space: SearchSpace, choices: Choices) -> dict[str, Choice]:
    """Return the type and the method of every tensor."""
    return {name: Choice(key.qtype, key.method) for name, key in space.keys(choices).items()}


def fingerprint(space: SearchSpace) -> str:
    """Return the sha256 of all that the numbers of choices stand for: candidates and bytes."""
    rows = [[to_json(c.key), c.n_bytes] for of_tensor in space.candidates for c in of_tensor]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def write_trace(path: Path, step: Step) -> Path:
    """Write the KL after every step: JSON, an object a line."""
    with replacing(path) as partial:
        names = ("generation", "tokens", "kl", "stderr")
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in to_json(step.trace)]
        partial.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def load_allocation(artifacts: Artifacts, limit_bytes: int) -> dict[str, CandidateKey]:
    """Return the allocation for one budget, of a run whose search stage is finished."""
    table = read_as(dict[str, Choice], artifacts.answer(limit_bytes) / "allocation.json")
    return {name: CandidateKey(name, row.qtype, row.method) for name, row in table.items()}


def load_searched(artifacts: Artifacts, limit_bytes: int) -> Searched | None:
    """Return what the search for one budget came to, of a run whose search stage is finished; None
    where nothing was left to search.
    """
    path = artifacts.answer(limit_bytes) / "budget.json"
    found = read_as(cast(Any, Given | Searched), path)
    return found if isinstance(found, Searched) else None
