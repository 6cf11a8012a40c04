"""Forty seeds of the generator of trouble: each ends in a refusal by `plan`, or in a file whose
logits, tokens and ends are those of transformers. `dev/trouble.py` tries as many as one likes.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trouble_judge
from trouble import ODDITIES, make_trouble
from trouble_judge import judge_all

N_SEEDS = 40


@pytest.mark.slow
def test_nothing_wrong_comes_out(tmp_path: Path) -> None:
    verdicts = list(judge_all(range(N_SEEDS), tmp_path))
    assert len(verdicts) == N_SEEDS
    assert not [str(verdict) for verdict in verdicts if not verdict.is_fine]
    kinds = [verdict.kind for verdict in verdicts]
    assert kinds.count("right") >= N_SEEDS // 5, "nearly all were refused: nothing is tested"


def seed_alone(_folder: Path, seed: int) -> int:
    return seed


@pytest.mark.slow
def test_more_seeds_than_a_process_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its verdict, in order."""
    monkeypatch.setattr(trouble_judge, "judge", seed_alone)
    monkeypatch.setattr(trouble_judge, "_SEEDS_PER_PROCESS", 2)
    assert list(judge_all(range(7), tmp_path, 1)) == [0, 1, 2, 3, 4, 5, 6]


def test_a_seed_always_makes_the_same(tmp_path: Path) -> None:
    made = [make_trouble(3, tmp_path / name) for name in "ab"]
    assert made[0].oddities == made[1].oddities
    files = [sorted(trouble.path.parent.rglob("*.safetensors")) for trouble in made]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_oddities_come_up(tmp_path: Path) -> None:
    """Most kinds within some seeds: choosing does not leave one out for good."""
    import trouble_files  # noqa: F401

    names = sorted(ODDITIES)
    firsts = set()
    for seed in range(400):
        rng = random.Random(seed)
        rng.choice(range(8))
        rng.choice((1, 1, 2, 2, 3))
        shuffled = list(names)
        rng.shuffle(shuffled)
        firsts.add(shuffled[0])
    assert firsts == set(names)
