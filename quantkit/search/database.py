"""The database: an index of every way to store every tensor. No weight is copied.

`database.json`: (tensor, type, method) -> (level file, offset, bytes, error). A type that
falls back to the same other type at two levels is indexed once; what is in the type in which
base.gguf has it (16 bits that were asked for or fallen back to, or in which it may stay) is indexed
there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from quantkit.files import write_json
from quantkit.ggml.types import QuantType
from quantkit.gguf_file.read import GgufFile
from quantkit.gptq.errors import Errors
from quantkit.run.artifacts import Artifacts
from quantkit.run.folder import read_as
from quantkit.tensors import UNCHANGED, Candidate, CandidateKey


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


def write_database(
    artifacts: Artifacts, errors: Errors, kept: Mapping[str, QuantType] = {}
) -> Database:
    """Index the finished level files, and the tensors `kept`, which may stay in the type that
    the base has them in. Return what was written.
    """
    base = GgufFile(artifacts.quantized)
    from_levels = os.path.relpath(artifacts.quantized, artifacts.levels)
    found: dict[str, dict[CandidateKey, Candidate]] = {}

    def unchanged(name: str) -> Candidate:
        stored = base.tensors[name]
        place = from_levels, stored.offset, stored.n_bytes
        return Candidate(name, stored.qtype, UNCHANGED, *place, error=0.0, nats=0.0)

    for path in sorted(artifacts.levels.glob("*.gguf")):
        for tensor in GgufFile(path).tensors.values():
            if tensor.name not in errors.errors:
                continue
            if tensor.qtype == base.tensors[tensor.name].qtype:
                candidate = unchanged(tensor.name)
            else:
                solved = errors.errors[tensor.name][str(tensor.qtype)]
                error = solved.errors[solved.method]
                candidate = Candidate(
                    tensor.name,
                    tensor.qtype,
                    solved.method,
                    path.name,
                    tensor.offset,
                    tensor.n_bytes,
                    error.relative,
                    error.nats,
                )
            found.setdefault(tensor.name, {}).setdefault(candidate.key, candidate)
    for name in kept:
        candidate = unchanged(name)
        found[name].setdefault(candidate.key, candidate)
    candidates = tuple(candidate for own in found.values() for candidate in own.values())
    write_json(artifacts.database, _Table(candidates))
    return Database.of(candidates)


def load_database(artifacts: Artifacts) -> Database:
    """Return the index of a run whose quantize stage is finished."""
    return Database.of(read_as(_Table, artifacts.database).candidates)
