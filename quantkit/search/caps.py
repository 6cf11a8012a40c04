"""Limit the number of distinct types in a file, and choose them by the estimated damage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from quantkit.ggml.types import QuantType
from quantkit.search.allocation import SearchSpace, keeping, pruned
from quantkit.search.propose import Costs, knapsack


def cap_types(
    space: SearchSpace,
    estimated_costs: Callable[[SearchSpace], Costs],
    limits: Sequence[int],
    n_types: int,
) -> SearchSpace | None:
    """Prune `space` to the `n_types` types whose knapsacks promise the least damage, over all
    budgets `limits` (bytes); types of tensors without a choice count. `space` need not be pruned
    before: what beats a type can be left out here. None when no such set meets every budget.
    """
    choices = [{c.qtype for c in of_tensor} for of_tensor in space.candidates]
    needed = {next(iter(types)) for types in choices if len(types) == 1}
    free = sorted(set().union(*choices) - needed)
    if len(needed) + len(free) <= n_types:
        return pruned(space)
    best: tuple[float, SearchSpace] | None = None
    for chosen in combinations(free, max(0, n_types - len(needed))):
        capped = _only(space, needed.union(chosen))
        if len(needed) > n_types or capped is None:
            continue
        if any(capped.n_bytes(capped.smallest) > n_bytes for n_bytes in limits):
            continue
        costs = estimated_costs(capped)
        score = sum(_log_damage(capped, costs, n_bytes) for n_bytes in limits)
        if best is None or score < best[0]:
            best = score, capped
    return best[1] if best else None


def _only(space: SearchSpace, types: set[QuantType]) -> SearchSpace | None:
    """The space of these types alone, pruned; None when a tensor has none left."""
    kept = [
        [k for k, c in enumerate(of_tensor) if c.qtype in types] for of_tensor in space.candidates
    ]
    return pruned(keeping(space, kept)) if all(kept) else None


def _log_damage(space: SearchSpace, costs: Costs, n_bytes: int) -> float:
    chosen = knapsack(replace(space, limit_bytes=n_bytes), costs)
    return float(np.log(sum(cost[k] for cost, k in zip(costs, chosen, strict=True)) + 1e-30))
