"""Means with their errors, and whether two files really differ.

Two standard errors appear side by side. `stderr` is llama-perplexity's: the scored tokens as if
they were independent. They are not: the tokens of one window share a topic, so a hard passage
raises all of them. `ci95` therefore takes the *window* as the unit: the mean of each window is one
observation, and the interval follows Student's t. Several domains are strata: only the spread
inside each of them counts, since the mix is fixed by the user and not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from evaluators.errors import EvaluationError
from evaluators.figures import PairedTest

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """The mean of all tokens; its standard error and 95 % interval with windows as the unit.

    Both are None when no domain has two windows.
    """

    mean: float
    stderr: float | None
    low: float | None
    high: float | None
    dof: int


def mean_stderr(values: Array) -> float:
    """Return the standard error of a mean of independent values, as llama-perplexity computes
    it.
    """
    return math.sqrt(float(values.var()) / (values.size - 1)) if values.size > 1 else 0.0


def windowed_interval(strata: Sequence[Array]) -> Interval:
    """Return the mean and interval of values [n_windows, n_scored], one array per domain."""
    n_total = sum(values.size for values in strata)
    mean = sum(float(values.sum()) for values in strata) / n_total
    variance, dof = 0.0, 0
    for values in strata:
        n_windows = values.shape[0]
        if n_windows > 1:
            share = values.size / n_total
            variance += share**2 * float(values.mean(axis=1).var(ddof=1)) / n_windows
            dof += n_windows - 1
    # A domain of one window would count as one without error: then there is no interval to give.
    if dof == 0 or any(values.shape[0] < 2 for values in strata):
        return Interval(mean, None, None, None, dof)
    stderr = math.sqrt(variance)
    reach = student_t_quantile(0.975, dof) * stderr
    return Interval(mean, stderr, mean - reach, mean + reach, dof)


def paired_difference(a: Sequence[Array], b: Sequence[Array]) -> PairedTest:
    """Return whether two files differ: values [n_windows, n_scored] of each, one array per domain.

    The same token is measured for both, so what the passages themselves vary in cancels; what is
    left is averaged per window, because neighboring tokens are not independent evidence.

    Raises EvaluationError when they were not measured on the same windows, or on fewer than two of
    each domain.
    """
    if [x.shape for x in a] != [y.shape for y in b]:
        raise EvaluationError(
            "The two files were not measured on the same windows.",
            "Measure both with one text, --ctx and --chunks.",
        )
    interval = windowed_interval([x - y for x, y in zip(a, b, strict=True)])
    if interval.stderr is None or interval.low is None or interval.high is None:
        raise EvaluationError(
            "A paired test needs at least two windows of each text.",
            "Use more --chunks or a longer text.",
        )
    if interval.stderr > 0:
        p_value = student_t_two_sided(interval.mean / interval.stderr, interval.dof)
    else:
        p_value = 1.0 if interval.mean == 0 else 0.0
    return PairedTest(
        difference=interval.mean,
        stderr=interval.stderr,
        ci95=(interval.low, interval.high),
        p_value=p_value,
        n_windows=sum(values.shape[0] for values in a),
        significant=p_value < 0.05,
    )


def student_t_two_sided(t: float, dof: int) -> float:
    """Return P(|T| >= |t|). With T = sqrt(dof) tan(x), the density of x is cos(x)^(dof - 1)."""
    start = math.atan(abs(t) / math.sqrt(dof))
    return _cosine_power(start, dof) / _cosine_power(0.0, dof)


def _cosine_power(start: float, dof: int) -> float:
    """Integral of cos(x)^(dof - 1) from `start` to pi/2. Gauss's nodes crowd at the ends, where
    the whole mass lies when `dof` is large.
    """
    nodes, node_weights = _gauss_nodes()
    half = (math.pi / 2 - start) / 2
    x = start + half * (nodes + 1)
    return half * float((node_weights * np.cos(x) ** (dof - 1)).sum())


@cache
def _gauss_nodes() -> tuple[Array, Array]:
    nodes, node_weights = np.polynomial.legendre.leggauss(200)
    return nodes, node_weights


@cache
def student_t_quantile(probability: float, dof: int) -> float:
    """Return the t with P(T <= t) = probability, for probability > 0.5; by bisection."""
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        if student_t_two_sided(middle, dof) > 2 * (1 - probability):
            low = middle
        else:
            high = middle
    return (low + high) / 2


def sign_test(n_better: int, n_worse: int) -> float:
    """Return the two-sided exact p-value that `n_better` of all changed items is a coin's work
    (McNemar).
    """
    n = n_better + n_worse
    if n == 0:
        return 1.0
    # P(X <= k) of a fair coin with exact integers; n is at most some thousands
    tail = sum(math.comb(n, i) for i in range(min(n_better, n_worse) + 1))
    return min(1.0, 2 * tail / 2**n)


def wilson(n_yes: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share: it stays within 0 and 1, and has a width where
    none or all of `n` say yes.
    """
    if n == 0:
        return 0.0, 1.0
    z = 1.959964
    share = n_yes / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, middle - reach), min(1.0, middle + reach)


N_RESAMPLES = 1000
_LEAST_BOOTSTRAPPED = 8  # documents
_RESAMPLE_SEED = 20_250_101  # the same figures give the same interval


def ratio_interval(
    sums: Array, counts: Array, most: float = math.inf
) -> tuple[float, float] | None:
    """Return the 95 % interval of sum(sums) / sum(counts), with documents as the unit; None of
    fewer than three documents.

    Args:
        sums: of each document, [n]: of KL, of equal tokens, of another's tokens.
        counts: what they are divided by, [n], above zero: tokens.
        most: that the ratio can be, 1 for a share; it is never below zero.

    A studentized bootstrap (Efron and Tibshirani, chapter 12): documents are drawn again with
    replacement, each drawing's error is taken in its own standard errors, by the ratio's
    linearization, and the quantiles of those stand in for Student's t. That follows the skewness
    of means that a few documents make, which percentiles of few documents do not. No side is
    shorter than Student's t makes it, and both are wider by 2/n, because the bootstrap of few
    documents is too sure of itself. Of fewer than eight documents drawings are nearly all alike, so
    there it is Student's t alone, wider by 2/n. `benchmarks/interval_coverage.py` shows how often
    it covers.
    """
    n = len(sums)
    if n < 3:
        return None
    rng = np.random.default_rng(_RESAMPLE_SEED)
    value, error = _ratio(sums, counts)
    drawn = rng.integers(0, n, (N_RESAMPLES, n))
    values, errors = _ratio(sums[drawn], counts[drawn])
    spread = abs(value - values)
    known = errors > 1e-9 * np.maximum(spread, np.abs(value) + 1e-300)
    if not known.any() or error == 0:
        return float(value), float(value)
    off = (values[known] - value) / errors[known]
    low, high = np.quantile(off, (0.025, 0.975)) if n >= _LEAST_BOOTSTRAPPED else (0.0, 0.0)
    t = student_t_quantile(0.975, n - 1)
    wider = 1 + 2 / n
    return (
        max(0.0, float(value - wider * max(t, high) * error)),
        min(most, float(value + wider * max(t, -low) * error)),
    )


def _ratio(sums: Array, counts: Array) -> tuple[Array, Array]:
    """Ratios of sums over the last axis, and their standard errors."""
    n, total = sums.shape[-1], counts.sum(axis=-1)
    value = sums.sum(axis=-1) / total
    residuals = sums - value[..., None] * counts
    error = np.sqrt(n / (n - 1) * (residuals**2).sum(axis=-1)) / total
    return value, error


def quantile_intervals(
    values: Sequence[Array], quantiles: Sequence[float]
) -> list[tuple[float, tuple[float, float] | None]]:
    """Return quantiles of all tokens, and 95 % intervals by a percentile bootstrap over documents;
    None of fewer than three.

    Args:
        values: of each document those of its tokens, [n_tokens].
    """
    every = np.concatenate(values)
    order = np.argsort(every, kind="stable")
    ordered = every[order]
    found = [float(q) for q in np.quantile(ordered, quantiles)]
    n = len(values)
    if n < 3:
        return [(value, None) for value in found]
    document = np.repeat(np.arange(n), [len(of) for of in values])[order]
    rng = np.random.default_rng(_RESAMPLE_SEED)
    drawn = np.empty((N_RESAMPLES // 2, len(quantiles)))
    for i in range(len(drawn)):
        weight = np.bincount(rng.integers(0, n, n), minlength=n)[document].cumsum()
        at = np.searchsorted(weight, np.array(quantiles) * weight[-1])
        drawn[i] = ordered[np.minimum(at, len(ordered) - 1)]
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    return [(v, (float(a), float(b))) for v, a, b in zip(found, low, high, strict=True)]
