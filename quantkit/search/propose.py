"""Starting points: an additive model of the damage, solved exactly enough as a knapsack over bytes.

The damage of one tensor at one type is estimated (see `sensitivity`); the sum over tensors is
minimized under the byte budget by Lagrangian relaxation on the convex hull of every tensor's
choices, then the bytes that are left are spent greedily. The answer only proposes: full-model KL
decides, and uniform files are always in the first population, because the additive answer can lose
to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from quantkit.search.allocation import Choices, SearchSpace

Costs = Sequence[npt.NDArray[np.float64]]
"""Estimated damage of every choice of every tensor."""


def knapsack(space: SearchSpace, costs: Costs) -> Choices:
    """The choices of least total cost within the budget.

    Bisects the price of a byte: at a given price every tensor takes its own best choice; the
    dearest price that fits leaves some bytes over, which `spend` uses up.
    """
    return spend(space, _solve(space, _table(space, costs)), costs)


def nearby(space: SearchSpace, parent: Choices, costs: Costs, n_moves: int) -> Choices:
    """The knapsack's answer that moves at most about `n_moves` tensors away from `parent`.

    Staying is made worth a bonus, which is bisected.
    """
    table = _table(space, costs)
    here = (np.arange(len(parent)), parent)

    def with_bonus(bonus: float) -> Choices:
        biased = table.copy()
        biased[here] -= bonus
        return _solve(space, biased)

    found = with_bonus(0.0)
    if int((found != parent).sum()) > n_moves:
        low, high = 0.0, float(np.abs(table[np.isfinite(table)]).max())
        found = parent
        for _ in range(16):
            middle = (low + high) / 2
            child = with_bonus(middle)
            if int((child != parent).sum()) > n_moves:
                low = middle
            else:
                high, found = middle, child
    return spend(space, found, costs)


def _table(space: SearchSpace, costs: Costs) -> npt.NDArray[np.float64]:
    """Costs side by side, (n_tensors, most choices), infinite where a tensor has fewer choices."""
    table = np.full((len(costs), int(space.n_choices.max())), np.inf)
    for row, cost in zip(table, costs, strict=True):
        row[: len(cost)] = cost
    return table


def _solve(space: SearchSpace, table: npt.NDArray[np.float64]) -> Choices:
    """The best choices at the dearest price of a byte that fits."""
    sizes = space.padded_bytes.astype(np.float64)

    def at_price(price: float) -> Choices:
        # Ties go to the smaller choice, so that a high price always ends at the smallest file.
        return np.argmin(table + price * sizes, 1).astype(np.int64)

    if space.fits(at_price(0.0)):
        return at_price(0.0)
    low, high = 0.0, 1e-12
    while not space.fits(at_price(high)):
        low, high = high, high * 4
        if high > 1e12:
            return space.smallest
    for _ in range(50):
        middle = (low + high) / 2
        if space.fits(at_price(middle)):
            high = middle
        else:
            low = middle
    return at_price(high)


def spend(space: SearchSpace, choices: Choices, costs: Costs) -> Choices:
    """Use what the budget leaves: the upgrade with the best gain per byte, again and again, until
    none fits.
    """
    choices = choices.copy()
    while True:
        upgrades = list(space.upgrades(choices))
        if not upgrades:
            return choices

        def gain(upgrade: tuple[int, int]) -> float:
            tensor, larger = upgrade
            old = int(choices[tensor])
            saved = costs[tensor][old] - costs[tensor][larger]
            return float(saved / max(space.step_bytes(tensor, old, larger), 1))

        tensor, larger = max(upgrades, key=lambda u: (gain(u), -u[0], -u[1]))
        choices[tensor] = larger


def uniform(space: SearchSpace, costs: Costs) -> list[Choices]:
    """Every allocation that is as uniform as the budget allows: all tensors at one level, the rest
    of the bytes spent.

    Level k puts every tensor on its k-th choice, or its largest when it has fewer.
    """
    found = []
    for level in range(int(space.n_choices.max())):
        choices = np.minimum(level, space.n_choices - 1)
        if space.fits(choices):
            found.append(spend(space, choices, costs))
    return found
