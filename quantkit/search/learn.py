"""Learn from the search's own candidates how far the estimates were off, and which tensors
interact.

A child that was compared with its parent tells what all its moves did together. The true change is
taken as the sum of the estimated changes, each times a factor of its tensor, plus a term for every
pair of moved tensors. Both are normally distributed beforehand, so that Bayesian linear regression
on the outcomes so far (Gaussian process regression, in its dual form: there are fewer outcomes than
pairs) gives what is believed of them. No outcome is thrown away: one of few tokens has a large
standard error and says little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from quantkit.search.allocation import Choices
from quantkit.search.propose import Costs

_PRIOR_DEVIATION = 0.7  # of an estimated damage, as the deviation of its logarithm: dev/LOG.md
_PAIR = 0.1  # deviation of a pair's term, as a share of the root of both changes' product
_SURE = 2.0  # deviations by which a pair's term must be off zero to count as found
_RANGE = (0.1, 10.0)  # of a factor


@dataclass(frozen=True)
class Outcome:
    """A child compared with its parent on the same tokens."""

    moves: tuple[tuple[int, int, int], ...]  # tensor, its choice before, its choice after
    change: float  # the child's KL less the parent's, nats
    stderr: float  # of the change, paired; above 0

    @classmethod
    def of(cls, parent: Choices, child: Choices, change: float, stderr: float) -> Outcome:
        moved = np.flatnonzero(parent != child).tolist()
        return cls(tuple((i, int(parent[i]), int(child[i])) for i in moved), change, stderr)


@dataclass(frozen=True)
class Posterior:
    """The current beliefs about the costs. `deviation` is each tensor's, of the logarithm of its
    costs. `partners` has, for tensors found to interact, the one each does so with most, and
    whether both should go the same way (+1) or opposite ways (-1).
    """

    costs: Costs
    deviation: npt.NDArray[np.float64]
    partners: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    def drawn(self, rng: np.random.Generator) -> Costs:
        """Draw costs from the posterior (Thompson sampling)."""
        factors = rng.lognormal(0.0, self.deviation)
        return [cost * factor for cost, factor in zip(self.costs, factors, strict=True)]


def posterior_of(costs: Costs, outcomes: Sequence[Outcome]) -> Posterior:
    """Return the posterior after the outcomes; without any, the estimates `costs` as they are."""
    deviation = np.full(len(costs), _PRIOR_DEVIATION)
    if not outcomes:
        return Posterior(costs, deviation)
    estimated = np.zeros((len(outcomes), len(costs)))
    for row, outcome in zip(estimated, outcomes, strict=True):
        for tensor, before, after in outcome.moves:
            row[tensor] = costs[tensor][after] - costs[tensor][before]
    scale = float(np.abs(estimated).max()) or 1.0  # changes are of any size: 1e-9 nats, 1 nat
    estimated /= scale
    roots = np.sign(estimated) * np.sqrt(np.abs(estimated))
    change = np.array([o.change for o in outcomes]) / scale
    noise = np.array([o.stderr for o in outcomes]) / scale

    prior = float(np.expm1(_PRIOR_DEVIATION**2))  # variance of a factor
    singles = estimated @ estimated.T
    pairs = ((roots @ roots.T) ** 2 - np.abs(estimated) @ np.abs(estimated).T) / 2
    covariance = prior * singles + _PAIR**2 * pairs + np.diag(noise**2)
    covariance += 1e-9 * np.trace(covariance) / len(outcomes) * np.eye(len(outcomes))
    inverse = np.linalg.inv(covariance)
    weights = inverse @ (change - estimated.sum(1))

    factors = np.clip(1 + prior * estimated.T @ weights, *_RANGE)
    explained = np.einsum("ai,ab,bi->i", estimated, inverse, estimated)
    variances = np.maximum(prior - prior**2 * explained, 0.0)
    return Posterior(
        [cost * factor for cost, factor in zip(costs, factors, strict=True)],
        np.minimum(np.sqrt(np.log1p(variances / factors**2)), _PRIOR_DEVIATION),
        _partners(roots, weights, inverse),
    )


def _partners(
    roots: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
    inverse: npt.NDArray[np.float64],
) -> dict[int, tuple[int, int]]:
    """The surest partner of every tensor whose pair term is surely not zero."""
    terms = _PAIR**2 * (roots.T * weights) @ roots
    np.fill_diagonal(terms, 0.0)
    found: dict[int, tuple[int, int]] = {}
    # The largest terms first; the variance of each takes a product of its own.
    rows, columns = np.triu_indices(len(terms), 1)
    order = np.argsort(-np.abs(terms[rows, columns]), kind="stable")[: 2 * len(terms)]
    for i, j in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        together = roots[:, i] * roots[:, j]
        variance = _PAIR**2 - _PAIR**4 * float(together @ inverse @ together)
        if abs(terms[i, j]) < _SURE * np.sqrt(max(variance, 0.0)):
            continue
        # Below zero: both moved the same way do better than the sum of their changes.
        way = 1 if terms[i, j] < 0 else -1
        found.setdefault(i, (j, way))
        found.setdefault(j, (i, way))
    return found
