"""The database: an index of every way to store every tensor. No weight is copied.

`database.json`: (tensor, type, method) -> (level file, offset, bytes, error). A type that
falls back to the same other type at two levels is indexed once; what is in the type in which
base.gguf has it (16 bits that were asked for, or fallen back to) is indexed there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from quantkit.files import write_json
from quantkit.gguf_file.read import GgufFile
from quantkit.gptq.errors import Errors
from quantkit.run.artifacts import Artifacts
from quantkit.run.folder import read_as
from quantkit.tensors import Candidate, CandidateKey


@dataclass(frozen=True)
class Database:
    """All candidates, by tensor in file order."""

    candidates: dict[str, tuple[Candidate, ...]]

    @classmethod
    def of(cls, candidates: Iterable[Candidate]) -> Database:
        found: dict[str, list[Candidate]] = {}
        for candidate in candidates:
            found.setdefault(candidate.tensor, []).append(candidate)
        return cls({tensor: tuple(own) for tensor, own in found.items()})

    def find(self, key: CandidateKey) -> Candidate:
        return next(c for c in self.candidates[key.tensor] if c.key == key)


@dataclass(frozen=True)
class _Table:
    schema: int = field(default=1, init=False)
    candidates: tuple[Candidate, ...]


def write_database(artifacts: Artifacts, errors: Errors) -> Database:
    """Index the finished level files. Return what was written."""
    base = GgufFile(artifacts.base)
    from_levels = os.path.relpath(artifacts.base, artifacts.levels)
    found: dict[str, dict[CandidateKey, Candidate]] = {}
    for path in sorted(artifacts.levels.glob("*.gguf")):
        for tensor in GgufFile(path).tensors.values():
            if tensor.name not in errors.errors:
                continue
            solved = errors.errors[tensor.name][str(tensor.qtype)]
            key = CandidateKey(tensor.name, tensor.qtype, solved.method)
            place, error = (path.name, tensor.offset, tensor.n_bytes), solved.errors[solved.method]
            stored = base.tensors[tensor.name]
            if stored.qtype == tensor.qtype:
                place = (from_levels, stored.offset, stored.n_bytes)
            candidate = Candidate(
                tensor.name, tensor.qtype, solved.method, *place, error.relative, error.nats
            )
            found.setdefault(tensor.name, {}).setdefault(key, candidate)
    candidates = tuple(candidate for own in found.values() for candidate in own.values())
    write_json(artifacts.database, _Table(candidates))
    return Database.of(candidates)


def load_database(artifacts: Artifacts) -> Database:
    """Return the index of a run whose quantize stage is finished."""
    return Database.of(read_as(_Table, artifacts.database).candidates)
