"""Errors, intervals and tests against known values."""

from __future__ import annotations

import numpy as np
import pytest

from evaluators.errors import EvaluationError
from evaluators.stats import (
    mean_stderr,
    paired_difference,
    quantile_intervals,
    ratio_interval,
    sign_test,
    student_t_quantile,
    student_t_two_sided,
    wilson,
    windowed_interval,
)


@pytest.mark.parametrize(
    ("dof", "quantile"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (30, 2.04227), (1000, 1.96234)]
)
def test_student_t_against_the_printed_table(dof: int, quantile: float) -> None:
    assert student_t_quantile(0.975, dof) == pytest.approx(quantile, rel=1e-4)
    assert student_t_two_sided(quantile, dof) == pytest.approx(0.05, rel=1e-3)
    assert student_t_two_sided(-quantile, dof) == pytest.approx(0.05, rel=1e-3)
    assert student_t_two_sided(0.0, dof) == pytest.approx(1.0)


def test_mean_stderr_is_llama_perplexitys() -> None:
    values = np.array([1.0, 2.0, 4.0, 9.0])
    n = len(values)
    expected = np.sqrt(((values**2).mean() - values.mean() ** 2) / (n - 1))
    assert mean_stderr(values) == pytest.approx(expected)
    assert mean_stderr(np.array([3.0])) == 0.0


def test_interval_takes_windows_as_the_unit() -> None:
    rng = np.random.default_rng(0)
    topics = rng.standard_normal((20, 1))
    values = topics + 0.1 * rng.standard_normal((20, 250))
    interval = windowed_interval([values])
    assert interval.mean == pytest.approx(values.mean())
    assert interval.stderr == pytest.approx(values.mean(1).std(ddof=1) / np.sqrt(20))
    assert interval.stderr is not None
    assert interval.stderr > 10 * mean_stderr(values.ravel())  # tokens are not independent
    assert interval.low is not None and interval.high is not None
    assert (interval.high - interval.low) / 2 == pytest.approx(2.0930 * interval.stderr, rel=1e-4)


def test_domains_are_strata() -> None:
    rng = np.random.default_rng(1)
    easy, hard = rng.normal(0, 1, (10, 5)), rng.normal(100, 1, (30, 5))
    interval = windowed_interval([easy, hard])
    assert interval.mean == pytest.approx(75, abs=1)
    parts = [0.25**2 * easy.mean(1).var(ddof=1) / 10, 0.75**2 * hard.mean(1).var(ddof=1) / 30]
    assert interval.stderr == pytest.approx(np.sqrt(sum(parts)))  # being 100 apart adds no error
    assert interval.dof == 38


def test_one_window_has_no_interval() -> None:
    assert windowed_interval([np.ones((1, 9))]).stderr is None
    assert windowed_interval([np.ones((1, 9)), np.ones((5, 9))]).low is None


def test_paired_difference_sees_what_unpaired_errors_hide() -> None:
    rng = np.random.default_rng(2)
    passages = rng.gamma(1.0, 1.0, (25, 100))
    a = passages + 0.01 + 0.02 * rng.standard_normal((25, 100))
    test = paired_difference([a], [passages])
    assert test.significant and test.difference == pytest.approx(0.01, abs=0.002)
    assert test.ci95[0] < test.difference < test.ci95[1]
    assert mean_stderr(a.ravel()) > abs(test.difference)  # side by side it could not be told
    assert test.n_windows == 25
    back = paired_difference([passages], [a])
    assert back.difference == pytest.approx(-test.difference)
    assert back.p_value == pytest.approx(test.p_value)


def test_paired_difference_keeps_its_error_rate_with_correlated_tokens() -> None:
    rng = np.random.default_rng(3)
    wrong = 0
    for _ in range(400):
        noise = rng.standard_normal((12, 1)) + 0.1 * rng.standard_normal((12, 50))
        wrong += paired_difference([noise], [np.zeros((12, 50))]).significant
    assert 6 <= wrong <= 38  # 5 % of 400 is 20; by tokens it would be over 300


def test_identical_files_do_not_differ() -> None:
    values = np.random.default_rng(4).random((5, 8))
    test = paired_difference([values], [values])
    assert (test.difference, test.p_value, test.significant) == (0.0, 1.0, False)


def test_paired_difference_needs_the_same_windows_and_two_of_them() -> None:
    with pytest.raises(EvaluationError, match="same windows"):
        paired_difference([np.ones((3, 4))], [np.ones((2, 4))])
    with pytest.raises(EvaluationError, match="two windows"):
        paired_difference([np.ones((1, 4))], [np.zeros((1, 4))])


def test_sign_test() -> None:
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 5) == 1.0
    assert sign_test(0, 5) == pytest.approx(2 / 32)
    assert sign_test(10, 2) == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert sign_test(2000, 2400) < 1e-6  # exact integers, no overflow


def test_wilson_against_known_values() -> None:
    """Newcombe 1998, table I."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("n", [8, 20, 80])
def test_intervals_over_documents_cover(n: int) -> None:
    """What they say they do, where the means of documents are skewed: 300 draws of each kind, so
    within 2.5 points of what `benchmarks/interval_coverage.py` finds with more.
    """
    rng = np.random.default_rng(n)
    for sigma in (0.5, 1.0):
        covered = 0
        for _ in range(300):
            tokens = rng.integers(60, 200, n).astype(float)
            means = np.exp(sigma * rng.standard_normal(n) - sigma**2 / 2)
            interval = ratio_interval(means * tokens, tokens)
            assert interval is not None
            covered += interval[0] <= 1 <= interval[1]
        assert 0.905 < covered / 300 < 0.995


def test_intervals_know_their_bounds() -> None:
    ones = np.ones(12)
    assert ratio_interval(ones[:2], ones[:2]) is None
    assert ratio_interval(3 * ones, ones) == (3.0, 3.0)
    share = ratio_interval(np.array([9.0] * 11 + [1.0]), 10 * ones, most=1.0)
    assert share is not None and share[1] == 1.0 and share[0] < 0.83
    four = ratio_interval(np.array([1.0, 1.1, 1.2, 4.0]), ones[:4])
    assert four is not None and four[1] < 10, "drawings of four documents are mostly alike"
    few = ratio_interval(np.array([0.0] * 11 + [1.0]), ones)
    assert few is not None and few[0] == 0.0
    rng = np.random.default_rng(1)
    sums, counts = rng.exponential(size=30), rng.uniform(1, 2, 30)
    once = ratio_interval(sums, counts)
    assert once is not None and once == ratio_interval(sums, counts), "the same every time"
    ten = ratio_interval(10 * sums, counts)
    assert ten is not None and ten == pytest.approx((10 * once[0], 10 * once[1]))
    wide = once[1] - sums.sum() / counts.sum()
    assert wide > sums.sum() / counts.sum() - once[0], "skewed as the documents are"


def test_quantiles_over_documents() -> None:
    rng = np.random.default_rng(2)
    documents = [rng.normal(level, 0.1, 50) for level in rng.normal(0, 1, 30)]
    every = np.concatenate(documents)
    (median, of_median), (high, of_high) = quantile_intervals(documents, (0.5, 0.99))
    assert median == np.quantile(every, 0.5) and high == np.quantile(every, 0.99)
    assert of_median is not None and of_median[0] < median < of_median[1]
    assert of_median[1] - of_median[0] > 0.3, "documents differ, tokens of one hardly do"
    assert of_high is not None and of_high[0] <= high <= of_high[1]
    assert quantile_intervals(documents[:2], (0.5,))[0][1] is None
