"""Keep the result of a search: by names and numbers that outlive the process."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from quantkit.files import replacing
from quantkit.ggml.types import QuantType
from quantkit.run.artifacts import Artifacts
from quantkit.run.folder import read_json
from quantkit.search.allocation import Choices, SearchSpace
from quantkit.search.optimizer import Step
from quantkit.tensors import CandidateKey, to_json


def summary(step: Step) -> dict[str, Any]:
    """Return what the report says of a search."""
    return {
        "searched": True,
        "generations": step.number,
        "tokens": step.n_tokens,
        "proposal_kl": step.trace[0][2],
        "kl": step.kl,
        "kl_stderr": step.stderr,
    }


def by_name(space: SearchSpace, choices: Choices) -> dict[str, dict[str, str]]:
    """Return the type and the method of every tensor."""
    keys = space.keys(choices)
    return {name: {"qtype": str(k.qtype), "method": k.method} for name, k in keys.items()}


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
    table = read_json(artifacts.answer(limit_bytes) / "allocation.json")
    return {
        name: CandidateKey(name, QuantType(row["qtype"]), row["method"])
        for name, row in table.items()
    }
