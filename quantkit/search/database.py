"""The database: an index of every way to store every tensor. No weight is copied.

`database.json`: (tensor, type, method) -> (level file, offset, bytes, error). A type that
falls back to the same other type at two levels is indexed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantkit.files import write_json
from quantkit.ggml.types import QuantType
from quantkit.gguf_file.read import GgufFile
from quantkit.run.artifacts import Artifacts
from quantkit.run.folder import read_json
from quantkit.tensors import Candidate, CandidateKey, to_json


@dataclass(frozen=True)
class Database:
    """All candidates, by tensor in file order."""

    candidates: dict[str, tuple[Candidate, ...]]

    def find(self, key: CandidateKey) -> Candidate:
        return next(c for c in self.candidates[key.tensor] if c.key == key)


def write_database(artifacts: Artifacts) -> Database:
    """Index the finished level files. Return what was written."""
    errors = read_json(artifacts.errors)["errors"]
    candidates: dict[str, dict[CandidateKey, Candidate]] = {}
    for path in sorted(artifacts.levels.glob("*.gguf")):
        for tensor in GgufFile(path).tensors.values():
            if tensor.name not in errors:
                continue
            solved = errors[tensor.name][str(tensor.qtype)]
            key = CandidateKey(tensor.name, tensor.qtype, solved["method"])
            error = solved["errors"][solved["method"]]
            found = Candidate(
                key, path.name, tensor.offset, tensor.n_bytes, error["relative"], error["nats"]
            )
            candidates.setdefault(tensor.name, {}).setdefault(key, found)
    rows = [_row(c) for of_tensor in candidates.values() for c in of_tensor.values()]
    write_json(artifacts.database, {"schema": 1, "candidates": rows})
    return Database({name: tuple(own.values()) for name, own in candidates.items()})


def _row(candidate: Candidate) -> dict[str, Any]:
    row = to_json(candidate)
    return {**row.pop("key"), **row}


def load_database(artifacts: Artifacts) -> Database:
    """Return the index of a run whose quantize stage is finished."""
    found: dict[str, list[Candidate]] = {}
    for row in read_json(artifacts.database)["candidates"]:
        key = CandidateKey(row["tensor"], QuantType(row["qtype"]), row["method"])
        candidate = Candidate(
            key, row["file"], row["offset"], row["n_bytes"], row["error"], row["nats"]
        )
        found.setdefault(key.tensor, []).append(candidate)
    return Database({tensor: tuple(candidates) for tensor, candidates in found.items()})
