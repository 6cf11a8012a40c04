"""Another search is one class: this file and one line of stages/search.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Answer, Run

from quantkit import pipeline
from quantkit.config import RunConfig
from quantkit.run.folder import read_json
from quantkit.search.optimizer import Optimizer, Problem, Step
from quantkit.stages import search

pytestmark = pytest.mark.slow


class BestProposal:
    """Judge every proposal on the same tokens and take the best."""

    unit = "look"

    def run(self, problem: Problem, state: Any, on_step: Callable[[Step], None]) -> Step:
        evaluator = problem.evaluator
        proposals = problem.proposals()
        n = evaluator.n_batch
        scores = evaluator.kl_of([choices for choices, _ in proposals], 0, n)
        kl, stderr, i = min((float(s.mean()), float(s.std()), i) for i, s in enumerate(scores))
        n_tokens = len(proposals) * n * evaluator.n_ctx
        state = {"choices": proposals[i][0].tolist(), "kl": kl, "stderr": stderr, "n": n_tokens}
        step = self.step_of(state)
        on_step(step)
        return step

    def step_of(self, state: Any) -> Step:
        row = (0, state["n"], state["kl"], state["stderr"])
        return Step(tuple(state["choices"]), state["kl"], state["stderr"], "a look", (row,), state)


def test_another_optimizer(
    whole_run: tuple[Run, Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = whole_run[0].fork(tmp_path / "run", "search")
    other: Optimizer = BestProposal()
    monkeypatch.setattr(search, "OPTIMIZER", other)
    pipeline.run(RunConfig.from_json(read_json(run.dir.config_path)), run.folder)
    (output,) = run.report["outputs"]
    assert output["search"]["generations"] == 0 and output["search"]["kl"] > 0
    assert any("look 0: KL" in event.message for event in run.events)
    assert output["n_bytes"] <= run.budgets[0]["limit_bytes"]
