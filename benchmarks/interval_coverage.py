"""How often 95 % intervals over documents hold the true mean, by the number of documents and by how
skewed the means of documents are.

    python benchmarks/interval_coverage.py [--draws 4000]

Documents have 60 to 200 tokens. Their means are drawn from a law whose mean is known; the interval
is `evaluators.stats.ratio_interval`, beside it Student's t over the same documents and the
percentile bootstrap, as most write them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from evaluators.stats import ratio_interval, student_t_quantile

Array = NDArray[np.float64]
Law = Callable[[np.random.Generator, int], Array]

LAWS: dict[str, Law] = {  # of mean 1
    "normal, deviation 0.2": lambda rng, n: rng.normal(1, 0.2, n),
    "lognormal, sigma 0.5": lambda rng, n: np.exp(0.5 * rng.standard_normal(n) - 0.125),
    "lognormal, sigma 0.8": lambda rng, n: np.exp(0.8 * rng.standard_normal(n) - 0.32),
    "lognormal, sigma 1": lambda rng, n: np.exp(rng.standard_normal(n) - 0.5),
    "exponential": lambda rng, n: rng.exponential(1, n),
    "Student t of 3, around 1": lambda rng, n: 1 + 0.2 * rng.standard_t(3, n),
    "Pareto of 3 (no third moment)": lambda rng, n: (rng.pareto(3, n) + 1) / 1.5,
}


def by_t(sums: Array, counts: Array) -> tuple[float, float]:
    """Student's t over documents."""
    n, value = len(sums), sums.sum() / counts.sum()
    error = math.sqrt(n / (n - 1) * ((sums - value * counts) ** 2).sum()) / counts.sum()
    reach = student_t_quantile(0.975, n - 1) * error
    return value - reach, value + reach


def by_percentiles(sums: Array, counts: Array, rng: np.random.Generator) -> tuple[float, float]:
    """The percentile bootstrap."""
    drawn = rng.integers(0, len(sums), (1000, len(sums)))
    low, high = np.quantile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), (0.025, 0.975))
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--draws", type=int, default=2000)
    n_draws = parser.parse_args().draws
    print(f"{'':32}{'n':>4}{'ours':>8}{'width':>8}{'t':>8}{'percentiles':>13}")
    for name, law in LAWS.items():
        for n in (8, 20, 80):
            rng = np.random.default_rng(n)
            held, width = np.zeros(3), []
            for _ in range(n_draws):
                counts = rng.integers(60, 200, n).astype(float)
                sums = law(rng, n) * counts
                ours = ratio_interval(sums, counts)
                assert ours is not None
                width.append(ours[1] - ours[0])
                found = (ours, by_t(sums, counts), by_percentiles(sums, counts, rng))
                held += [low <= 1 <= high for low, high in found]
            ours_, t, percentiles = 100 * held / n_draws
            print(f"{name:32}{n:4}{ours_:8.1f}{np.median(width):8.3f}{t:8.1f}{percentiles:13.1f}")


if __name__ == "__main__":
    main()
