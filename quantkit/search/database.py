"""The database: an index of every way to store every tensor. No weight is copied.

`database.json`: (tensor, type, method) -> (level file, offset, bytes, error). A type that
falls back to the same other type at two levels is indexed once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from quantkit.files import write_json
from quantkit.ggml.types import QuantType
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
    def of(cls, rows: Iterable[_Row]) -> Database:
        found: dict[str, list[Candidate]] = {}
        for row in rows:
            found.setdefault(row.tensor, []).append(row.candidate)
        return cls({tensor: tuple(candidates) for tensor, candidates in found.items()})

    def find(self, key: CandidateKey) -> Candidate:
        return next(c for c in self.candidates[key.tensor] if c.key == key)


@dataclass(frozen=True)
class _Row:
    """A candidate as it is kept."""

    tensor: str
    qtype: str
    method: str
    file: str
    offset: int
    n_bytes: int
    error: float
    nats: float | None

    @property
    def candidate(self) -> Candidate:
        key = CandidateKey(self.tensor, QuantType(self.qtype), self.method)
        return Candidate(key, self.file, self.offset, self.n_bytes, self.error, self.nats)


@dataclass(frozen=True)
class _Table:
    schema: int = field(default=1, init=False)
    candidates: tuple[_Row, ...]


def write_database(artifacts: Artifacts, errors: Errors) -> Database:
    """Index the finished level files. Return what was written."""
    found: dict[str, dict[tuple[str, str], _Row]] = {}
    for path in sorted(artifacts.levels.glob("*.gguf")):
        for tensor in GgufFile(path).tensors.values():
            if tensor.name not in errors.errors:
                continue
            qtype = str(tensor.qtype)
            solved = errors.errors[tensor.name][qtype]
            error = solved.errors[solved.method]
            place = path.name, tensor.offset, tensor.n_bytes
            row = _Row(tensor.name, qtype, solved.method, *place, error.relative, error.nats)
            found.setdefault(tensor.name, {}).setdefault((qtype, solved.method), row)
    rows = tuple(row for own in found.values() for row in own.values())
    write_json(artifacts.database, _Table(rows))
    return Database.of(rows)


def load_database(artifacts: Artifacts) -> Database:
    """Return the index of a run whose quantize stage is finished."""
    return Database.of(read_as(_Table, artifacts.database).candidates)
