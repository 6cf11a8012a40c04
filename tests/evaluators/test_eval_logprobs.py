"""Row arithmetic against float64, and the error of storing base rows as 16-bit codes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from eval_fixtures import log_softmax
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.logprobs import FLOOR_NATS, BaseRows, RowWorkers


class Codes:
    """Stands in for the file: keeps the codes in memory."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.array = np.zeros(shape, np.uint16)

    def store(self, row: int, codes: np.ndarray) -> None:
        self.array[row : row + len(codes)] = codes

    def load(self, row: int, codes: np.ndarray) -> None:
        codes[...] = self.array[row : row + len(codes)]


def random_logits(n: int, n_vocab: int, spread: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, n_vocab)) * spread + rng.uniform(-30, 30)).astype(np.float32)


def kl_of(
    base: np.ndarray, other: np.ndarray, n_threads: int = 2
) -> tuple[np.ndarray, np.ndarray, np.ndarray, BaseRows]:
    targets = np.arange(len(base), dtype=np.int32) % base.shape[1]
    codes = Codes(base.shape)
    with RowWorkers(base.shape[1], n_threads) as workers:
        rows = workers.encode(base, targets, codes.store)
        return (*workers.kl(other, targets, rows, codes.load), rows)


def exact_kl(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    p, q = log_softmax(base), log_softmax(other)
    terms = np.exp(p) * (p - q)
    return np.where(np.exp(p) > 0, terms, 0).sum(axis=1)


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("n_vocab", [2, 1000, 152_064])
def test_nll_equals_float64(n_vocab: int, n_threads: int) -> None:
    logits = random_logits(37, n_vocab, 4.0, seed=1)
    targets = np.random.default_rng(2).integers(0, n_vocab, 37).astype(np.int32)
    with RowWorkers(n_vocab, n_threads) as workers:
        nll = workers.nll(logits, targets)
    expected = -log_softmax(logits)[np.arange(37), targets]
    assert np.abs(nll - expected).max() < 1e-5


@given(
    spread=st.floats(0.01, 30),
    change=st.floats(0, 3),
    n_vocab=st.integers(2, 3000),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_kl_through_codes_equals_float64(
    spread: float, change: float, n_vocab: int, seed: int
) -> None:
    base = random_logits(9, n_vocab, spread, seed)
    other = base + random_logits(9, n_vocab, change, seed + 1)
    kl, nll, same, rows = kl_of(base, other)
    expected = exact_kl(base, other)
    # a log p read from its code is off by up to step/2 = 2.5e-4, weighted by how far q is from p
    assert np.all(np.abs(kl - expected) < 2e-4 + 1e-3 * expected)
    assert np.abs((kl - expected).mean()) < 1e-4 + 3e-4 * expected.mean()
    assert np.array_equal(same, base.argmax(1) == other.argmax(1))
    targets = np.arange(9) % n_vocab
    assert np.abs(nll + log_softmax(other)[np.arange(9), targets]).max() < 1e-4
    assert np.abs(rows.nll + log_softmax(base)[np.arange(9), targets]).max() < 1e-4


def test_mean_kl_of_many_rows_is_exact_to_a_hundred_thousandth() -> None:
    base = random_logits(300, 20_000, 3.0, seed=5)
    other = base + random_logits(300, 20_000, 0.2, seed=6)
    kl, *_ = kl_of(base, other)
    expected = exact_kl(base, other)
    assert 0.01 < expected.mean() < 0.05
    assert abs(kl.mean() / expected.mean() - 1) < 1e-4
    assert np.abs(kl - expected).max() < 2e-4


def test_a_model_has_no_divergence_from_itself() -> None:
    logits = random_logits(50, 5000, 5.0, seed=3)
    kl, _, same, _ = kl_of(logits, logits.copy())
    assert np.abs(kl).max() < 5e-6
    assert abs(kl.mean()) < 1e-6
    assert same.all()


def test_a_common_offset_of_all_logits_changes_nothing() -> None:
    logits = random_logits(50, 5000, 5.0, seed=4) + np.float32(2000)
    kl, nll, _, rows = kl_of(logits, logits.copy())
    assert np.abs(kl).max() < 2e-5  # the float32 of log Z alone is off by up to 6e-5
    assert np.array_equal(nll, rows.nll)


def test_uniform_and_certain_rows() -> None:
    flat = np.zeros((1, 1000), np.float32)
    sure = np.zeros((1, 1000), np.float32)
    sure[0, 7] = 100.0
    kl, *_ = kl_of(flat, flat)
    assert abs(kl[0]) < 1e-6
    kl, *_ = kl_of(flat, sure)
    assert kl[0] == pytest.approx(100 * 999 / 1000 - np.log(1000), rel=1e-5)
    kl, *_ = kl_of(sure, flat)
    assert kl[0] == pytest.approx(np.log(1000), rel=1e-5)


def test_the_floor_cuts_what_weighs_nothing() -> None:
    base = random_logits(4, 500, 1.0, seed=8)
    base[:, 100:] -= 3 * FLOOR_NATS
    other = base.copy()
    other[:, 100:] += 50  # far below the top still
    kl, *_, rows = kl_of(base, other)
    assert np.abs(kl - exact_kl(base, other)).max() < 1e-6
    assert rows.step == pytest.approx(FLOOR_NATS / 65535)


def test_tokens_ruled_out_by_both_add_nothing() -> None:
    base = random_logits(3, 800, 2.0, seed=9)
    other = base + random_logits(3, 800, 0.3, seed=10)
    expected = exact_kl(base[:, :600], other[:, :600])
    base[:, 600:] = other[:, 600:] = -np.inf
    kl, nll, _, _ = kl_of(base, other)
    assert np.abs(kl - expected).max() < 1e-4
    assert np.isfinite(nll).all()


def test_nan_is_passed_on() -> None:
    logits = random_logits(3, 100, 1.0, seed=11)
    logits[1, 50] = np.nan
    targets = np.zeros(3, np.int32)
    with RowWorkers(100, 2) as workers:
        nll = workers.nll(logits, targets)
        rows = workers.encode(logits, targets, lambda row, codes: None)
    assert np.isnan(nll[1]) and np.isfinite(nll[[0, 2]]).all()
    assert np.isnan(rows.nll[1])


def test_blocks_cover_every_row_once() -> None:
    seen: list[tuple[int, int]] = []
    store: Callable[[int, np.ndarray], None] = lambda row, codes: seen.append((row, len(codes)))  # noqa: E731
    logits = random_logits(23, 70_000, 1.0, seed=12)  # one row is over half a block
    with RowWorkers(70_000, 3) as workers:
        workers.encode(logits, np.zeros(23, np.int32), store)
    rows = sorted(row for start, n in seen for row in range(start, start + n))
    assert rows == list(range(23))
    assert len(seen) > 10
