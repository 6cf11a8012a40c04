"""A block's rows tuned by two processes: what one makes of them, also where a parameter is several
tensors, one of them another rank's or not tuned, or no linear layer's own rows.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quantkit.run.folder import read_json

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def tuned(folder: Path, n: int) -> tuple[dict[str, list], dict[str, np.ndarray]]:  # type: ignore[type-arg]
    """Errors and KL, and the rows of every tensor that changed."""
    folder.mkdir(exist_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    done = subprocess.run(
        [sys.executable, *torchrun, str(Path(__file__).with_name("tuner.py")), folder],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'tuning'}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    with np.load(folder / "found.npz") as arrays:
        return read_json(folder / "found.json"), dict(arrays)


def test_two_processes_tune_as_one_does(tmp_path: Path) -> None:
    alone, rows_alone = tuned(tmp_path / "alone", 1)
    found, rows = tuned(tmp_path / "two", 2)
    assert rows.keys() == rows_alone.keys() and len(rows) == 3 * 8 - 1
    for (before, after), (before_alone, after_alone) in zip(
        found["errors"], alone["errors"], strict=True
    ):
        assert before == pytest.approx(before_alone, rel=1e-2)
        assert after == pytest.approx(after_alone, rel=1e-2) and after < before
    assert found["kl"] == pytest.approx(alone["kl"], rel=1e-2)
    different = [float((rows[name] != rows_alone[name]).mean()) for name in rows]
    assert max(different) < 0.01, "only what lies on the edge between two codes may differ"
    # What rank 0 knows of the first block, rank 1 takes as well.
    (tmp_path / "again").mkdir()
    shutil.copy(tmp_path / "two" / "found.npz", tmp_path / "again" / "known.npz")
    again, rows_again = tuned(tmp_path / "again", 2)
    assert again["errors"][0] == [0.5, 0.25] and again["errors"][1:] == found["errors"][1:]
    assert again["kl"] == found["kl"]
    assert all(np.array_equal(rows[name], rows_again[name]) for name in rows)
