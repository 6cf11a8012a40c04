"""Which Hessians of a block are summed at once, where memory is short: those of 256 experts of 7168
columns are 105 GB.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from torch import nn

from quantkit.statistics.experts import ExpertCollector, stacked_parameters
from quantkit.statistics.hessian import HessianCollector, is_linear


def hessian_bytes(n_columns: int, n_experts: int = 1) -> int:
    """Return what the Hessians of an input take: train and held-out, of every expert."""
    return 2 * 4 * n_experts * n_columns**2


@dataclass(frozen=True)
class Turn:
    """Groups of linear layers, and experts by groups of stacked weights."""

    linears: Set[str]
    experts: Mapping[str, range]

    def takes(self, group: str) -> bool:
        """Return whether a group of linear layers is summed in this turn."""
        return group in self.linears

    def experts_of(self, group: str, n_experts: int) -> range:
        """Return the experts of a group of stacked weights that are summed in this turn."""
        return self.experts.get(group, range(0))


class Everything(Turn):
    """The only turn, where all Hessians fit."""

    def __init__(self) -> None:
        super().__init__(frozenset(), {})

    def takes(self, group: str) -> bool:
        """Return True."""
        return True

    def experts_of(self, group: str, n_experts: int) -> range:
        """Return all experts."""
        return range(n_experts)


def most_bytes(block: nn.Module) -> int:
    """Return what all Hessians of a block take at most: as if no two modules had an input in
    common, and experts read the longer side of their weight.
    """
    linears = (m.get_parameter("weight") for m in block.modules() if is_linear(m))
    widths = [(1, max(weight.shape)) for weight in linears]
    stacked = stacked_parameters(block, "").values()
    widths += [(len(weight), max(weight.shape[1:])) for weight in stacked]
    return sum(hessian_bytes(width, n_experts) for n_experts, width in widths)


def share_out(linears: HessianCollector, experts: ExpertCollector, room: int) -> list[Turn]:
    """Share the groups that the collectors have seen out over as few turns as `room` bytes allow;
    a turn has one expert or group at least.
    """
    turns: list[tuple[set[str], dict[str, range]]] = [(set(), {})]
    left = room

    def make_room(n_bytes: int) -> None:
        nonlocal left
        if n_bytes > left and any(turns[-1]):
            turns.append((set(), {}))
            left = room

    for group, width in linears.widths.items():
        n_bytes = hessian_bytes(width)
        make_room(n_bytes)
        turns[-1][0].add(group)
        left -= n_bytes
    for group, width in experts.widths.items():
        n_bytes, first = hessian_bytes(width), 0
        while first < experts.n_experts[group]:
            make_room(n_bytes)
            last = min(experts.n_experts[group], first + max(1, left // n_bytes))
            turns[-1][1][group] = range(first, last)
            left -= (last - first) * n_bytes
            first = last
    return [Turn(names, ranges) for names, ranges in turns]
