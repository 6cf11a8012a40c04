"""Which rank solves what: rows of tensors by their cost, the largest first, and experts in even
ranges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_WORK = 4  # times the weights: what GPTQ and the descent do for a type, beside a factorization
_LEAST_ROWS = 64  # of a piece: fewer leave a processor idle


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor that one rank solves."""

    tensor: str
    first: int
    last: int
    cost: float  # multiply-adds
    input: int  # which Hessian they need
    set_up: float  # multiply-adds of its factorization, once on every rank that needs it


def cut(
    shapes: Mapping[str, tuple[int, int]],
    n_types: Mapping[str, int],
    inputs: Mapping[str, int],
    n_ranks: int,
) -> list[Piece]:
    """Cut tensors (n_rows, n_columns) into pieces small enough to be shared out evenly, in the
    order of the tensors. For one rank they stay whole.
    """
    costs = {
        name: float(_WORK * n_types[name] * n_rows * n_columns**2)
        for name, (n_rows, n_columns) in shapes.items()
    }
    most = sum(costs.values()) / n_ranks
    pieces = []
    for name, (n_rows, n_columns) in shapes.items():
        n = 1 if n_ranks == 1 else -int(-costs[name] // most) if most else 1
        n = max(1, min(n, n_rows // _LEAST_ROWS))
        for i in range(n):
            first, last = i * n_rows // n, (i + 1) * n_rows // n
            cost = costs[name] * (last - first) / n_rows
            pieces.append(Piece(name, first, last, cost, inputs[name], float(n_columns**3)))
    return pieces


def pack(pieces: Sequence[Piece], n_ranks: int) -> list[list[int]]:
    """Return the indices of every rank's pieces, in their order: the largest first, each goes to
    the rank that would be done with it first.
    """
    done = [0.0] * n_ranks
    known: list[set[int]] = [set() for _ in range(n_ranks)]
    found: list[list[int]] = [[] for _ in range(n_ranks)]
    for index in sorted(range(len(pieces)), key=lambda i: -pieces[i].cost):
        piece = pieces[index]

        def end(rank: int, piece: Piece = piece) -> float:
            new = piece.input not in known[rank]
            return done[rank] + piece.cost + (piece.set_up if new else 0.0)

        rank = min(range(n_ranks), key=end)
        done[rank] = end(rank)
        known[rank].add(piece.input)
        found[rank].append(index)
    return [sorted(indices) for indices in found]


def even(n: int, rank: int, n_ranks: int) -> range:
    """Return a rank's share of `n` things in their order."""
    return range(rank * n // n_ranks, (rank + 1) * n // n_ranks)
