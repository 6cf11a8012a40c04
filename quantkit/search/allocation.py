"""Allocations and their exact size: which choice every tensor has, and how large the file becomes.

An allocation is a vector of choice numbers, one per searched tensor; a tensor's choices are sorted
by bytes. Sizes are integers of bytes of the whole file: header, padding and the tensors that are
not searched are in `fixed_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from quantkit.ggml.types import QuantType
from quantkit.tensors import Candidate, CandidateKey

T = TypeVar("T")
Choices = npt.NDArray[np.int64]
"""One choice number per tensor: an allocation."""


@dataclass(frozen=True)
class SearchSpace:
    """The tensors that are searched, what each can be, and the budget.

    `candidates[i]` are the choices of tensor i, by rising bytes. `slot_bytes[i][k]` is what choice
    k takes in the file, padding included.
    """

    tensors: tuple[str, ...]
    candidates: tuple[tuple[Candidate, ...], ...]
    slot_bytes: tuple[tuple[int, ...], ...]
    fixed_bytes: int
    limit_bytes: int

    @cached_property
    def padded_bytes(self) -> npt.NDArray[np.int64]:
        """`slot_bytes` side by side, 0 where a tensor has fewer choices."""
        width = max(map(len, self.slot_bytes))
        table = np.zeros((len(self.tensors), width), np.int64)
        for row, sizes in zip(table, self.slot_bytes, strict=True):
            row[: len(sizes)] = sizes
        return table

    @cached_property
    def n_choices(self) -> Choices:
        return np.array([len(c) for c in self.candidates], np.int64)

    def n_bytes(self, choices: Choices) -> int:
        """Return the exact size of the file with these choices."""
        return self.fixed_bytes + int(
            self.padded_bytes[np.arange(len(self.tensors)), choices].sum()
        )

    def fits(self, choices: Choices) -> bool:
        return self.n_bytes(choices) <= self.limit_bytes

    @property
    def smallest(self) -> Choices:
        return np.zeros(len(self.tensors), np.int64)

    @property
    def largest(self) -> Choices:
        return self.n_choices - 1

    def step_bytes(self, tensor: int, old: int, new: int) -> int:
        """Return how much the file grows when a tensor goes from one choice to another."""
        return self.slot_bytes[tensor][new] - self.slot_bytes[tensor][old]

    def upgrades(self, choices: Choices) -> Iterator[tuple[int, int]]:
        """Return (tensor, next larger choice) for every tensor that can still grow within the
        budget.
        """
        free = self.limit_bytes - self.n_bytes(choices)
        for tensor, choice in enumerate(choices.tolist()):
            for larger in range(choice + 1, len(self.candidates[tensor])):
                if self.step_bytes(tensor, choice, larger) <= free:
                    yield tensor, larger

    def keys(self, choices: Choices) -> dict[str, CandidateKey]:
        """Return the allocation by tensor name."""
        return {
            name: self.candidates[i][k].key
            for i, (name, k) in enumerate(zip(self.tensors, choices.tolist(), strict=True))
        }


def in_order(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Return the candidates of one tensor by rising bytes, the best first among equal bytes."""
    return tuple(sorted(candidates, key=lambda c: (c.n_bytes, c.error, c.key)))


def prune(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Return the candidates of one tensor that no candidate of at most their bytes beats, by rising
    bytes.
    """
    kept: list[Candidate] = []
    for candidate in in_order(candidates):
        if not kept or candidate.error < kept[-1].error:
            kept.append(candidate)
    return tuple(kept)


def pruned(space: SearchSpace) -> SearchSpace:
    """Return the space without choices that others of their tensor beat."""
    return keeping(space, [[row.index(c) for c in prune(row)] for row in space.candidates])


def keeping(space: SearchSpace, kept: Sequence[Sequence[int]]) -> SearchSpace:
    """Return the space with these choices of its tensors alone."""

    def of(table: Sequence[Sequence[T]]) -> tuple[tuple[T, ...], ...]:
        return tuple(tuple(row[k] for k in ks) for row, ks in zip(table, kept, strict=True))

    return replace(space, candidates=of(space.candidates), slot_bytes=of(space.slot_bytes))


def choices_of(space: SearchSpace, types: Mapping[str, QuantType]) -> Choices | None:
    """Return the allocation of a pruned space nearest to these types: every tensor's largest choice
    of at most the bytes of its type, which is that type unless another beats it or it is no level.
    None where a tensor has no such choice, or no type.
    """
    found = []
    for name, candidates in zip(space.tensors, space.candidates, strict=True):
        wanted = types.get(name)
        at = [k for k, c in enumerate(candidates) if wanted and c.qtype.bpw <= wanted.bpw]
        if not at:
            return None
        found.append(at[-1])
    return np.array(found, np.int64)
