"""Errors, intervals and tests against known values."""

from __future__ import annotations

import numpy as np
import pytest

from evaluators.errors import EvaluationError
from evaluators.stats import (
    mean_stderr,
    paired_difference,
    sign_test,
    student_t_quantile,
    student_t_two_sided,
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
