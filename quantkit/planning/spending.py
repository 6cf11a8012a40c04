"""Foretell which budgets cannot be spent: the search's own knapsack over the levels that a run
would make, with the errors that types usually have.

Which tensors a model is sensitive to is not known before it is calibrated, so all weights count
alike, and each further bit halves a weight's error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import pairwise

import numpy as np

from quantkit.config.levels import LevelPlan
from quantkit.ggml.types import QuantType
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.write import slot_bytes
from quantkit.planning.nouns import Alike
from quantkit.search.allocation import SearchSpace
from quantkit.search.caps import cap_types
from quantkit.search.propose import Costs, knapsack
from quantkit.search.unspent import Unspent, unspent, worth_saying
from quantkit.tensors import UNCHANGED, Candidate


def kinds_of(base: GgufFile, levels: LevelPlan) -> tuple[Alike, ...]:
    """Return the tensors that a search chooses types for, those that are alike together."""
    found: dict[tuple[object, ...], list[str]] = {}
    for name, of_level in levels.types.items():
        shape = base.tensors[name].shape
        key = shape, tuple(of_level.items()), levels.kept.get(name)
        found.setdefault(key, []).append(name)
    return tuple(
        _alike(base, names, levels.types[names[0]], levels.kept.get(names[0]))
        for names in found.values()
    )


def _alike(
    base: GgufFile,
    names: list[str],
    of_level: Mapping[QuantType, QuantType],
    kept: QuantType | None,
) -> Alike:
    shape = base.tensors[names[0]].shape
    types = {*of_level.values(), *([kept] if kept else [])}
    return Alike(
        names[0],
        len(names),
        int(np.prod(shape)),
        {str(level): str(qtype) for level, qtype in of_level.items()},
        str(kept) if kept else None,
        {str(qtype): slot_bytes(base, qtype.n_bytes(shape)) for qtype in sorted(types)},
    )


def foretold(
    kinds: Collection[Alike],
    smallest_bytes: int,
    levels: Collection[str],
    limits: Iterable[int],
    max_types: int | None = None,
) -> tuple[Unspent, ...]:
    """Return what files of at most `limits` bytes are expected to leave unused, of those that leave
    something. `levels` are those that are made, `smallest_bytes` the smallest file of all levels.
    """
    limits = tuple(limits)
    if not kinds:
        return ()
    fixed = smallest_bytes - sum(kind.n_tensors * min(kind.n_bytes.values()) for kind in kinds)
    space = _space(kinds, levels, fixed)
    if max_types is not None:
        capped = cap_types(space, _costs, limits, max_types)
        if capped is None:  # the search says so
            return ()
        space = capped
    return tuple(_of_all(space, limits))


def _of_all(space: SearchSpace, limits: Iterable[int]) -> Iterator[Unspent]:
    for limit in limits:
        asked = SearchSpace(
            space.tensors, space.candidates, space.slot_bytes, space.fixed_bytes, limit
        )
        if _may_stay(asked):
            left = unspent(asked, knapsack(asked, _costs(asked)))
            if left is not None:
                yield left


def _may_stay(space: SearchSpace) -> bool:
    """Whether a file could leave bytes worth a sentence: what can always grow by less has its
    largest type then. The knapsack takes seconds where there are hundreds of tensors.
    """
    if not space.fits(space.smallest):
        return False
    most = [max(b - a for a, b in pairwise([*row[:1], *row])) for row in space.slot_bytes]
    room = worth_saying(space.limit_bytes)
    grown = np.where(np.array(most) <= room, space.largest, space.smallest)
    return space.n_bytes(grown) <= space.limit_bytes - room


def _space(kinds: Iterable[Alike], levels: Collection[str], fixed_bytes: int) -> SearchSpace:
    rows = [_candidates(kind, levels) for kind in kinds for _ in range(kind.n_tensors)]
    slots = tuple(tuple(candidate.n_bytes for candidate in row) for row in rows)
    largest = fixed_bytes + sum(row[-1] for row in slots)
    return SearchSpace(
        tuple(row[0].tensor for row in rows), tuple(rows), slots, fixed_bytes, largest
    )


def _candidates(kind: Alike, levels: Collection[str]) -> tuple[Candidate, ...]:
    """What a tensor can be, by rising bytes; of types of the same bytes one."""
    types = {qtype for level, qtype in kind.types.items() if level in levels}
    by_bytes = {
        kind.n_bytes[qtype]: qtype for qtype in sorted(types | {*filter(None, [kind.kept])})
    }
    return tuple(
        Candidate(
            kind.tensor,
            QuantType(qtype),
            UNCHANGED if qtype == kind.kept else "",
            "",
            0,
            n_bytes,
            error := 0.0
            if qtype == kind.kept
            else kind.n_weights * 4 ** -(8 * n_bytes / kind.n_weights),
            error,
        )
        for n_bytes, qtype in sorted(by_bytes.items())
    )


def _costs(space: SearchSpace) -> Costs:
    return [np.array([c.error for c in of_tensor]) for of_tensor in space.candidates]
