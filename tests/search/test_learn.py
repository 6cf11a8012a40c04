"""What the search learns from compared children: against plain regression, on planted truths."""

from __future__ import annotations

import numpy as np
import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from search_spaces import make_space

from quantkit.search.learn import Outcome, posterior_of
from quantkit.search.mutate import mutate

N = 12
COSTS = [4.0 ** -np.arange(4.0)] * N


def outcomes(
    factors: np.ndarray, pairs: dict[tuple[int, int], float], n: int, stderr: float, seed: int = 0
) -> list[Outcome]:
    """Children that move a few tensors each, as the truth would have them."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        before = rng.integers(0, 4, N)
        after = before.copy()
        moved = rng.choice(N, 4, replace=False)
        after[moved] = (before[moved] + rng.integers(1, 4, 4)) % 4
        changes = np.array([c[b] - c[a] for c, a, b in zip(COSTS, before, after, strict=True)])
        change = float(factors @ changes)
        for (i, j), strength in pairs.items():
            both = changes[i] * changes[j]
            change += strength * float(np.sign(both) * np.sqrt(abs(both)))
        found.append(Outcome.of(before, after, change + stderr * rng.standard_normal(), stderr))
    return found


def test_nothing_is_believed_without_outcomes() -> None:
    posterior = posterior_of(COSTS, [])
    assert posterior.costs is COSTS and not posterior.partners
    assert len(set(posterior.deviation.tolist())) == 1


def test_the_factors_are_found() -> None:
    """Estimates that are off by a factor of up to three come right; deviation goes down."""
    factors = np.exp(np.random.default_rng(1).uniform(-1, 1, N))
    posterior = posterior_of(COSTS, outcomes(factors, {}, 80, 1e-3))
    found = np.array([b[0] / c[0] for b, c in zip(posterior.costs, COSTS, strict=True)])
    assert np.abs(np.log(found / factors)).max() < 0.1
    assert posterior.deviation.max() < 0.2 < posterior_of(COSTS, []).deviation.min()


def test_a_tensor_that_never_moved_keeps_its_doubt() -> None:
    posterior = posterior_of(COSTS, [Outcome(((0, 0, 1),), -1.5, 1e-4)])
    fresh = posterior_of(COSTS, []).deviation
    assert posterior.deviation[0] < 0.1 * fresh[0] and np.allclose(
        posterior.deviation[1:], fresh[1:]
    )
    assert posterior.costs[0][0] == pytest.approx(
        2.0, rel=0.05
    )  # 1.5 saved where 0.75 was promised
    assert posterior.costs[1] is not None and np.array_equal(posterior.costs[1], COSTS[1])


def test_noise_teaches_little() -> None:
    """Outcomes whose error is ten times what they could say leave the estimates nearly alone."""
    posterior = posterior_of(COSTS, outcomes(np.full(N, 3.0), {}, 10, 30.0))
    found = np.array([b[0] / c[0] for b, c in zip(posterior.costs, COSTS, strict=True)])
    assert np.abs(np.log(found)).max() < 0.3


@pytest.mark.parametrize(("strength", "way"), [(-0.8, 1), (0.8, -1)])
def test_pairs_that_interact_are_found_and_others_are_not(strength: float, way: int) -> None:
    posterior = posterior_of(COSTS, outcomes(np.ones(N), {(2, 7): strength}, 300, 1e-3))
    assert posterior.partners[2] == (7, way) and posterior.partners[7] == (2, way)
    assert len(posterior.partners) <= 4
    assert not posterior_of(COSTS, outcomes(np.ones(N), {}, 300, 1e-3)).partners


def test_partners_move_together() -> None:
    sizes = [[100, 200, 300]] * 6
    space = make_space(sizes, make_space(sizes).n_bytes(np.ones(6, np.int64)))
    costs = [np.array([3.0, 2.0, 1.0])] * 6
    rng = np.random.default_rng(0)
    parent = np.ones(6, np.int64)
    for way in (1, -1):
        children = [mutate(space, parent, costs, rng, 1, {0: (1, way)}) for _ in range(300)]
        raised = [child for child in children if child[0] == 2]
        assert len(raised) > 20 and all(child[1] == 1 + way for child in raised)
        assert all(space.fits(child) for child in children)


@examples(50)
@given(st.integers(0, 2**32 - 1), st.floats(1e-12, 1e6), st.integers(1, 30))
def test_the_unit_of_the_damages_does_not_matter(seed: int, unit: float, n: int) -> None:
    told = outcomes(np.ones(N) * 2, {(0, 1): 0.5}, n, 0.01, seed)
    scaled = [Outcome(o.moves, o.change * unit, o.stderr * unit) for o in told]
    here, there = posterior_of(COSTS, told), posterior_of([c * unit for c in COSTS], scaled)
    for one, other in zip(here.costs, there.costs, strict=True):
        assert np.allclose(one * unit, other, rtol=1e-6)
    assert np.allclose(here.deviation, there.deviation, rtol=1e-5)
    assert np.isfinite(here.deviation).all() and all(np.isfinite(c).all() for c in here.costs)


def test_drawn_costs_scatter_as_doubted() -> None:
    posterior = posterior_of(COSTS, outcomes(np.ones(N), {}, 40, 1e-3))
    rng = np.random.default_rng(0)
    drawn = np.array([[c[0] for c in posterior.drawn(rng)] for _ in range(2000)])
    assert np.allclose(np.log(drawn).std(0), posterior.deviation, rtol=0.1)
