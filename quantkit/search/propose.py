"""Starting points: an additive model of the damage, solved exactly enough as a knapsack over bytes.

The damage of one tensor at one type is estimated (see `sensitivity`); the sum over tensors is
minimized under the byte budget by Lagrangian relaxation on the convex hull of every tensor's
choices, then the bytes that are left are spent greedily. One price of a byte for all cannot say
whether a tensor that is a fifth of the file goes up a type: for the widest tensors, a table of
embeddings and an output head, choice after choice is tried as long as it can be better (branch and
bound). The answer only proposes: full-model KL decides, and uniform files are always in the first
population, because the additive answer can lose to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import numpy.typing as npt

from quantkit.search.allocation import Choices, SearchSpace

_WIDE = 0.02  # of the bytes that can be chosen at all: what a wide tensor's own choices span
_MOST_WIDE = 2

Costs = Sequence[npt.NDArray[np.float64]]
"""Estimated damage of every choice of every tensor."""


def estimated_costs(space: SearchSpace) -> Costs:
    """Return the estimated nats per token of every choice. Tensors without an estimate get the
    median rate of the others.
    """
    known = [
        c.nats / c.error
        for cs in space.candidates
        for c in cs
        if c.nats is not None and c.error > 0
    ]
    rate = float(np.median(known)) if known else 1.0
    return [
        np.array([c.error * rate if c.nats is None else c.nats for c in cs])
        for cs in space.candidates
    ]


def knapsack(space: SearchSpace, costs: Costs) -> Choices:
    """Return the choices of least total cost within the budget.

    Bisects the price of a byte: at a given price every tensor takes its own best choice; the
    dearest price that fits leaves some bytes over, which `spend` uses up. Then the same with the
    wide tensors held at each of their choices whose bound at that price (Lagrangian relaxation)
    lies below the best so far.
    """
    return _best(space, costs, _table(space, costs))


def knapsacks(space: SearchSpace, costs: Costs) -> list[Choices]:
    """Return the knapsack's answers for each choice of the widest tensor; none where no tensor is
    wide. The estimate of that tensor decides more than any other, and can be off.
    """
    tensors = _wide(space)
    if not tensors:
        return []
    table, widest = _table(space, costs), tensors[0]
    held = [_held(table, (widest,), (k,)) for k in range(int(space.n_choices[widest]))]
    return [_best(space, costs, t) for t in held if space.fits(_smallest(t))]


def _best(space: SearchSpace, costs: Costs, table: npt.NDArray[np.float64]) -> Choices:
    """The knapsack's answer among the choices that are finite in `table`; what is left over may be
    spent on others.
    """
    found, price = _solve(space, table)
    found = spend(space, found, costs)
    tensors = _wide(space)
    priced = table + price * space.padded_bytes
    above = priced - priced.min(1, keepdims=True)
    bound = float(priced.min(1).sum()) - price * (space.limit_bytes - space.fixed_bytes)

    def least(choices: tuple[int, ...]) -> float:
        return bound + float(sum(above[i, k] for i, k in zip(tensors, choices, strict=True)))

    for choices in sorted(product(*(range(space.n_choices[i]) for i in tensors)), key=least):
        if least(choices) >= _total(costs, found):
            break
        held = _held(table, tensors, choices)
        if space.fits(_smallest(held)):
            other = spend(space, _solve(space, held)[0], costs)
            found = min(found, other, key=lambda c: _total(costs, c))
    return found


def _wide(space: SearchSpace) -> tuple[int, ...]:
    """The tensors whose choices lie furthest apart in bytes, the widest first."""
    spans = space.padded_bytes.max(1) - space.padded_bytes[:, 0]
    widest = np.argsort(-spans, kind="stable")[:_MOST_WIDE]
    return tuple(int(i) for i in widest if spans[i] > _WIDE * spans.sum())


def _held(
    table: npt.NDArray[np.float64], tensors: tuple[int, ...], choices: tuple[int, ...]
) -> npt.NDArray[np.float64]:
    """The table with these tensors at these choices alone."""
    held = table.copy()
    held[tensors, :] = np.inf
    held[tensors, choices] = table[tensors, choices]
    return held


def _smallest(table: npt.NDArray[np.float64]) -> Choices:
    """The smallest choices that are finite in `table`."""
    return np.argmax(np.isfinite(table), 1).astype(np.int64)


def _total(costs: Costs, choices: Choices) -> float:
    return float(sum(cost[k] for cost, k in zip(costs, choices.tolist(), strict=True)))


def nearby(space: SearchSpace, parent: Choices, costs: Costs, n_moves: int) -> Choices:
    """Return the knapsack's answer that moves at most about `n_moves` tensors away from `parent`.

    Staying is made worth a bonus, which is bisected.
    """
    table = _table(space, costs)
    here = (np.arange(len(parent)), parent)

    def with_bonus(bonus: float) -> Choices:
        biased = table.copy()
        biased[here] -= bonus
        return _solve(space, biased)[0]

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


def _solve(space: SearchSpace, table: npt.NDArray[np.float64]) -> tuple[Choices, float]:
    """The best choices at the dearest price of a byte that fits, and that price, in costs."""
    sizes = space.padded_bytes.astype(np.float64)

    def at_price(price: float) -> Choices:
        # Ties go to the smaller choice, so that a high price always ends at the smallest file.
        return np.argmin(table + price * sizes, 1).astype(np.int64)

    if space.fits(at_price(0.0)):
        return at_price(0.0), 0.0
    low, high = 0.0, 1e-12
    while not space.fits(at_price(high)):
        low, high = high, high * 4
        if high > 1e12:
            return _smallest(table), high
    for _ in range(50):
        middle = (low + high) / 2
        if space.fits(at_price(middle)):
            high = middle
        else:
            low = middle
    return at_price(high), high


def spend(space: SearchSpace, choices: Choices, costs: Costs) -> Choices:
    """Use what the budget leaves: the upgrade with the best gain per byte, again and again, until
    none fits.
    """
    choices, table, sizes = choices.copy(), _table(space, costs), space.padded_bytes
    rows, columns = np.arange(len(choices)), np.arange(sizes.shape[1])
    while True:
        steps = sizes - sizes[rows, choices][:, None]
        is_larger = (columns > choices[:, None]) & (columns < space.n_choices[:, None])
        fits = is_larger & (steps <= space.limit_bytes - space.n_bytes(choices))
        if not fits.any():
            return choices
        saved = table[rows, choices][:, None] - table
        gains = np.where(fits, saved / np.maximum(steps, 1), -np.inf)
        tensor, larger = np.unravel_index(gains.argmax(), gains.shape)  # the first of equal ones
        choices[tensor] = larger


def uniform(space: SearchSpace, costs: Costs) -> list[Choices]:
    """Return every allocation that is as uniform as the budget allows: all tensors at one level,
    the rest of the bytes spent.

    Level k puts every tensor on its k-th choice, or its largest when it has fewer.
    """
    found = []
    for level in range(int(space.n_choices.max())):
        choices = np.minimum(level, space.n_choices - 1)
        if space.fits(choices):
            found.append(spend(space, choices, costs))
    return found
