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
    sizes = [np.array(row, np.float64) for row in space.slot_bytes]

    def at_price(price: float) -> Choices:
        # Ties go to the smaller choice, so that a high price always ends at the smallest file.
        return np.array(
            [int(np.argmin(c + price * s)) for c, s in zip(costs, sizes, strict=True)], np.int64
        )

    low, high = 0.0, 1e-12
    while not space.fits(at_price(high)):
        low, high = high, high * 4
        if high > 1e12:
            return space.smallest
    for _ in range(60):
        middle = (low + high) / 2
        if space.fits(at_price(middle)):
            high = middle
        else:
            low = middle
    return spend(space, at_price(high), costs)


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
