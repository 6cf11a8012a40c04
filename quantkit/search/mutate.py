"""EvoPress's level-switch mutation, on integers of bytes: raise some tensors, lower others until
the budget holds.

Follows Sieberling et al. 2024 (arXiv:2410.14649): offspring differ from their parent by a few
swaps. Which tensors are raised and lowered is drawn with odds that follow the believed gain per
byte, flattened so that everything stays possible; tensors found to interact move together.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from quantkit.search.allocation import Choices, SearchSpace
from quantkit.search.propose import Costs, spend

_FLATNESS = 0.5  # exponent on the odds: 0 draws uniformly, 1 in proportion to the estimated gain
_UNIFORM_SHARE = 0.1  # of the odds, whatever is estimated: no tensor is ever out of reach


def mutate(
    space: SearchSpace,
    parent: Choices,
    costs: Costs,
    rng: np.random.Generator,
    n_raised: int,
    partners: Mapping[int, tuple[int, int]] | None = None,
) -> Choices:
    """Return a neighbor of `parent` within the budget: `n_raised` tensors go up a step, others come
    down to pay for it. Each one raised takes its partner along (`learn.Posterior`): up a step too,
    or down.

    Whatever is left over then is spent. May return a copy of the parent when no swap is possible.
    """
    choices = parent.copy()
    can_rise = np.flatnonzero(choices < space.n_choices - 1)
    if len(can_rise) == 0:
        return choices
    odds = _odds(space, choices, costs, can_rise, +1)
    raised = rng.choice(can_rise, size=min(n_raised, len(can_rise)), replace=False, p=odds)
    choices[raised] += 1
    moved = {int(i) for i in raised}
    for tensor in raised.tolist():
        partner, way = (partners or {}).get(tensor, (tensor, 0))
        if partner not in moved and 0 <= choices[partner] + way < space.n_choices[partner]:
            choices[partner] += way
            moved.add(partner)
    while not space.fits(choices):
        can_fall = np.setdiff1d(np.flatnonzero(choices > 0), list(moved))
        if len(can_fall) == 0:
            return parent.copy()
        odds = _odds(space, choices, costs, can_fall, -1)
        choices[rng.choice(can_fall, p=odds)] -= 1
    return spend(space, choices, costs)


def _odds(
    space: SearchSpace, choices: Choices, costs: Costs, tensors: np.ndarray, step: int
) -> np.ndarray:
    """Odds of moving each of `tensors` one step: up by the damage saved per byte, down by the bytes
    saved per damage.
    """
    rates = []
    for tensor in tensors.tolist():
        old = int(choices[tensor])
        n_bytes = abs(space.step_bytes(tensor, old, old + step)) or 1
        damage = abs(float(costs[tensor][old] - costs[tensor][old + step])) + 1e-30
        rates.append(damage / n_bytes if step > 0 else n_bytes / damage)
    weights = np.array(rates, np.float64) ** _FLATNESS
    odds = (1 - _UNIFORM_SHARE) * weights / weights.sum() + _UNIFORM_SHARE / len(weights)
    return odds / odds.sum()
