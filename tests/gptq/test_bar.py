"""The bar of quantize: true from the first block on, and it never goes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.gptq import bar as module
from quantkit.gptq.bar import Bar
from quantkit.run.events import EventLog


class Log(EventLog):
    """Keeps what is told, without a pause between."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "events.jsonl")
        self.told: list[tuple[int, int, str]] = []

    def progress(self, stage: str, done: int, total: int, message: str = "", **_: object) -> None:
        assert stage == "quantize"
        self.told.append((done, total, message))


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path)


def test_it_moves_within_the_first_block(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text takes a quarter of a block here: from the second block on the bar knows."""
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    bar = Bar(log, "quantize")
    bar.n_units = 4
    weights = {"blk.0.attn_q.weight": 100, "blk.0.ffn_up.weight": 300}
    for block in range(2):
        bar.begin(f"block-00{block}", block, weights, runs_text=True)
        for share in (0.5, 1.0):
            clock[0] += 1
            bar.ran(share)
        for tensor in weights:
            clock[0] += 3
            bar.solved(tensor)
        bar.end(block + 1, "5 levels")
    bar.begin("embedding", 2, {}, runs_text=False)
    bar.end(3, "5 levels")
    assert [done for done, _, _ in log.told] == [
        *(200, 400, 550, 999, 1000),
        *(1125, 1250, 1437, 1999, 2000),
        3000,
    ]
    assert {total for _, total, _ in log.told} == {4000}
    assert log.told[0][2] == "block-000: running the text"
    assert log.told[4][2] == "block-000: 5 levels"


def test_experts_in_turns_add_up(log: Log) -> None:
    """A block whose statistics come in two turns runs its text twice, and solves half each time."""
    bar = Bar(log, "quantize")
    bar.n_units = 1
    bar.begin("block-000", 0, {"blk.0.ffn_up_exps.weight": 8}, runs_text=True)
    for turn in range(2):
        for share in (0.5, 1.0):
            bar.ran((turn + share) / 2)
        bar.solved("blk.0.ffn_up_exps.weight", 0.5)
        bar.solved("blk.0.attn_q.weight")  # of no weight here
    bar.end(1, "1 levels")
    done = [done for done, _, _ in log.told]
    assert done == sorted(done) and done[0] > 0 and done[-2:] == [999, 1000]
    assert done[-1] == log.told[-1][1]


def test_more_units_than_were_counted(log: Log) -> None:
    bar = Bar(log, "quantize")
    bar.begin("block-000", 3, {}, runs_text=True)
    bar.ran(1.0)
    bar.end(4, "1 levels")
    assert all(0 <= done <= total for done, total, _ in log.told)
