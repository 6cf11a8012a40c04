"""Parts of tensors between ranks: of every part the errors of all methods, of its rows those of the
best alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from quantkit.ggml.types import QuantType
from quantkit.gptq.errors import Error
from quantkit.gptq.select import Part, best_method
from quantkit.ranks.group import Ranks

Parts = Mapping[int, Sequence[Part]]  # by the index of a piece


def best_rows(parts: Sequence[Part], of: Sequence[Part]) -> list[Part]:
    """Return parts with the rows of the best methods alone, on the CPU. `of` are all parts of the
    tensor: one method is best for all of them.
    """
    types = dict.fromkeys(qtype for part in of for qtype in part.types)
    best = {q: best_method(q, [part for part in of if q in part.types])[0] for q in types}
    return [part.on_cpu([(q, best[q]) for q in part.types]) for part in parts]


def agree(ranks: Ranks, own: Parts, split: Iterable[Sequence[int]]) -> dict[int, list[Part]]:
    """Return this rank's parts with `best_rows` where several ranks have pieces of a tensor:
    `split` are the indices of those, for each tensor.
    """
    tensors = list(split)
    shared = {i for pieces in tensors for i in pieces}
    numbers = {str(i): list(map(_numbers, own[i])) for i in own if i in shared}
    told = ranks.union(numbers) if shared else {}
    found = {i: list(parts) for i, parts in own.items()}
    for pieces in tensors:
        everything = [_without_rows(n) for i in pieces for n in told[str(i)]]
        for i in own.keys() & set(pieces):
            found[i] = best_rows(own[i], everything)
    return found


def gather(ranks: Ranks, own: Parts) -> dict[int, list[Part]]:
    """Return all ranks' parts to rank 0, which are on the CPU; nothing to the others."""
    if ranks.is_alone:
        return {i: list(parts) for i, parts in own.items()}
    parts = [(i, part) for i, found in own.items() for part in found]
    about: list[Any] = [[i, _numbers(part), _keys(part)] for i, part in parts]
    rows = {
        f"{n} {m}": rows.numpy()
        for n, (_, part) in enumerate(parts)
        for m, rows in enumerate(part.packed.values())
    }
    gathered: dict[int, list[Part]] = {}
    for told, arrays in zip(ranks.gather(about), ranks.gather_arrays(rows), strict=True):
        for n, (i, numbers, keys) in enumerate(told):
            packed = {
                (QuantType(qtype), method): torch.from_numpy(arrays[f"{n} {m}"])
                for m, (qtype, method) in enumerate(keys)
            }
            part = _without_rows(numbers)
            gathered.setdefault(i, []).append(Part(part.power, part.errors, packed))
    return gathered


def _keys(part: Part) -> list[list[str]]:
    return [[str(qtype), method] for qtype, method in part.packed]


def _numbers(part: Part) -> list[Any]:
    errors = [[str(q), m, e.relative, e.nats] for (q, m), e in part.errors.items()]
    return [part.power, errors]


def _without_rows(numbers: list[Any]) -> Part:
    power, errors = numbers
    return Part(power, {(QuantType(q), m): Error(r, n) for q, m, r, n in errors}, {})
