"""Real processes under torchrun, connected by gloo: what they do together, and what happens when
one of them ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantkit.ranks.group import ALONE
from quantkit.run.folder import read_json

ROOT = Path(__file__).parents[2]


def launched(scenario: str, n: int, folder: Path) -> subprocess.CompletedProcess[str]:
    for rank in range(n):
        for name in ("one", "two"):
            place = folder / f"machine{rank}" / name
            place.mkdir(parents=True)
            (place / "x").write_text(f"{name} of {rank}", "utf-8")
    (folder / "shared").write_text("for all", "utf-8")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    return subprocess.run(
        [sys.executable, *torchrun, str(Path(__file__).with_name("worker.py")), scenario, folder],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_alone_nothing_happens() -> None:
    tensor = torch.ones(2)
    with ALONE.task("any", {"of": 1}):
        ALONE.sum([tensor])
    assert tensor.tolist() == [1, 1] and ALONE.broadcast(tensor) is tensor
    assert ALONE.share("abc") == ["a", "b", "c"] and ALONE.tell({"a": 1}) == {"a": 1}
    assert ALONE.gather(3) == [3] and ALONE.least(3) == 3
    assert ALONE.local([Path("x")]) == [Path("x")] and ALONE.scratch() is None


def test_together(tmp_path: Path) -> None:
    done = launched("together", 3, tmp_path)
    assert done.returncode == 0, done.stderr
    found = [read_json(tmp_path / f"{rank}.json") for rank in range(3)]
    assert [own["share"] for own in found] == [[0, 3, 6], [1, 4], [2, 5]]
    for own in found:
        assert own["sums"] == [[[6, 6], [6, 6], [6, 6]], [6, 12], 6, [3, 3]]
        assert own["big"] == [6, 6] and own["broadcast"] == [1, 1]
        assert own["told"] == {"é": [0, None]} and own["least"] == 8
        # Rank 0's files, also where the same path leads to another one.
        assert own["files"] == ["one of 0", "two of 0", "one of 0"]
    assert [own["gathered"] for own in found] == [[0, 1, 2], [], []]
    assert found[0]["arrays"] == [
        {"a": ["float32", [[float(rank + 1)] * 2] * rank], "b": ["int64", [0, 1, 2]]}
        for rank in range(3)
    ]
    one, two, _, again, shared = found[1]["paths"]
    assert one.startswith(found[1]["scratch"]) and one != two == again
    assert found[2]["paths"] == found[1]["paths"], "sent once to a machine"
    assert found[0]["paths"][0] == "/proc/self/cwd/one/x"
    assert {own["paths"][-1] for own in found} == {shared} == {str(tmp_path / "shared")}
    assert not any(Path(own["scratch"]).exists() for own in found)


def test_a_session(tmp_path: Path) -> None:
    assert launched("several", 2, tmp_path).returncode == 0
    assert [read_json(tmp_path / f"{rank}.json") for rank in range(2)] == [[3, 5]] * 2


def test_an_error_in_its_own_words(tmp_path: Path) -> None:
    done = launched("fails", 2, tmp_path)
    assert done.returncode == 1
    told = read_json(tmp_path / "raised.json")
    assert told["message"].startswith("The weights are sour.")
    assert "process 2 of 2" in told["message"] and told["remedy"] == "Take others."


@pytest.mark.parametrize("scenario", ["dies", "dies_unseen"])
def test_a_killed_process_ends_the_run(tmp_path: Path, scenario: str) -> None:
    """By what rank 0 raises, and where it cannot raise by what its thread is to tell."""
    done = launched(scenario, 3, tmp_path)
    assert done.returncode == 1
    told = read_json(tmp_path / ("raised.json" if scenario == "dies" else "told.json"))
    assert told["message"] == "The run's process 2 of 3 (rank 1) was killed or died without a word."
    assert "finished work is kept" in told["remedy"]
    assert not (tmp_path / "told.json").exists() or scenario == "dies_unseen"
