"""Another implementation's logits against llama.cpp's: the same model in float64 numpy."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from eval_fixtures import ONE, TinySpec, reference_logits, write_tiny

from evaluators import agreement
from evaluators.errors import EvaluationError

measure = partial(agreement.measure, runtime=ONE)
TEXT = "the cat sat on a mat and the dog saw it run in the sun " * 8


def reference(spec: TinySpec, ids: np.ndarray) -> np.ndarray:
    return reference_logits(spec, ids).astype(np.float32)


def test_the_same_weights_agree(tmp_path: Path) -> None:
    spec = TinySpec()
    path = write_tiny(tmp_path / "tiny.gguf", spec)
    ids = agreement.tokens_of(path, TEXT, 48)
    assert len(ids) == 48 and ids[0] == 1, "the first 48, with BOS"
    found = measure(path, ids, reference(spec, ids))
    assert found.mean_kl < 1e-6 and found.max_kl < 1e-5 and found.top1 == 1.0 and found.n == 48


def test_other_weights_do_not(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "noisy.gguf", TinySpec(noise=0.2))
    ids = agreement.tokens_of(path, TEXT, 48)
    found = measure(path, ids, reference(TinySpec(), ids))
    assert found.mean_kl > 1e-3 and found.top1 < 1.0


def test_one_token_that_went_elsewhere(tmp_path: Path) -> None:
    """It is in the mean, not in the trimmed one; two of fewer than a hundred are in both."""
    spec = TinySpec()
    path = write_tiny(tmp_path / "tiny.gguf", spec)
    ids = agreement.tokens_of(path, TEXT, 48)
    logits = reference(spec, ids)
    logits[7] = logits[7, ::-1]
    one = measure(path, ids, logits)
    assert one.mean_kl == pytest.approx(one.max_kl / 48, rel=1e-3) and one.trimmed_kl < 1e-6
    logits[30] = logits[30, ::-1]
    assert measure(path, ids, logits).trimmed_kl > 1e-4


def test_a_padded_vocabulary_is_cut(tmp_path: Path) -> None:
    spec = TinySpec()
    path = write_tiny(tmp_path / "tiny.gguf", spec)
    ids = agreement.tokens_of(path, TEXT, 16)
    logits = np.pad(reference(spec, ids), ((0, 0), (0, 5)), constant_values=50.0)
    assert measure(path, ids, logits).mean_kl < 1e-6


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", TinySpec())
    with pytest.raises(EvaluationError, match="fewer than two tokens"):
        agreement.tokens_of(path, "", 16)
    ids = agreement.tokens_of(path, TEXT, 16)
    with pytest.raises(EvaluationError, match="reference"):
        measure(path, ids, np.zeros((16, 7), np.float32))
    with pytest.raises(EvaluationError, match="longer than"):
        measure(path, np.ones(300, np.int32), np.zeros((300, 320), np.float32))
    with pytest.raises(EvaluationError, match="not finite"):
        measure(path, ids, np.full((16, 320), np.nan, np.float32))
