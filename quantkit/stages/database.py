"""database: an index of every way to store every tensor. No weight is copied.

Writes `database.json`: (tensor, type, method) -> (level file, offset, bytes, error). A type that
falls back to the same other type at two levels is indexed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantkit.files import write_json
from quantkit.ggml.types import QuantType
from quantkit.gguf_file.read import GgufFile
from quantkit.run.folder import RunDir, read_json
from quantkit.run.stage import StageResult
from quantkit.tensors import Candidate, CandidateKey, to_json

if TYPE_CHECKING:
    from quantkit.run.stage import Run

NAME = "database"
VERSION = 1
FIELDS: tuple[str, ...] = ()


@dataclass(frozen=True)
class Database:
    """All candidates, by tensor in file order."""

    candidates: dict[str, tuple[Candidate, ...]]

    def find(self, key: CandidateKey) -> Candidate:
        return next(c for c in self.candidates[key.tensor] if c.key == key)


def execute(run: Run) -> StageResult:
    """Index the level files of the quantize stage."""
    levels = run.dir.stage_dir("quantize")
    errors = read_json(levels / "errors.json")["errors"]
    candidates: dict[str, dict[CandidateKey, Candidate]] = {}
    for path in sorted(levels.glob("*.gguf")):
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
    path = write_json(run.dir.stage_dir(NAME) / "database.json", {"schema": 1, "candidates": rows})
    return StageResult([path], {"n_candidates": len(rows), "n_tensors": len(candidates)})


def _row(candidate: Candidate) -> dict[str, Any]:
    row = to_json(candidate)
    return {**row.pop("key"), **row}


def load(directory: RunDir) -> Database:
    """The index of a run whose database stage is finished."""
    found: dict[str, list[Candidate]] = {}
    for row in read_json(directory.stage_dir(NAME) / "database.json")["candidates"]:
        key = CandidateKey(row["tensor"], QuantType(row["qtype"]), row["method"])
        candidate = Candidate(
            key, row["file"], row["offset"], row["n_bytes"], row["error"], row["nats"]
        )
        found.setdefault(key.tensor, []).append(candidate)
    return Database({tensor: tuple(candidates) for tensor, candidates in found.items()})
