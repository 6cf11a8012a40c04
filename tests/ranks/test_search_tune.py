"""Search and tune on several processes: the answer of one, also after one of them was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, Run
from families import FAMILIES, write_checkpoint
from tiny_models import tiny_llama
from until_tune import in_float32

from quantkit import pipeline
from quantkit.config import RunConfig
from quantkit.config.targets import LikeMix
from quantkit.run.folder import read_json

pytestmark = pytest.mark.slow

STEPS = 30


def checkpoint(family: str, folder: Path) -> Path:
    if family == "Llama":  # its tensors are the parameters of linear layers, q and k permuted
        return tiny_llama(folder, hidden_size=96, intermediate_size=256, initializer_range=0.1)
    return write_checkpoint(FAMILIES[family], folder)


@dataclass(frozen=True)
class Quantized:
    """A run up to quantize, and what one process makes of it."""

    run: Run
    alone: dict[str, bytes]


@pytest.fixture(scope="module", params=["Llama", "Qwen3-MoE"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        in_float32(patch.setattr)
        return made(request.param, tmp_path_factory.mktemp("ranks"))


def made(family: str, folder: Path) -> Quantized:
    config = RunConfig(
        str(checkpoint(family, folder / "model")),
        targets=(LikeMix("Q4_K_M"),),
        profile="demo",
        calibration="docs,code",
        tuning=STEPS,
    )
    pipeline.run(config, folder / "run", until="quantize")
    run = Run(folder / "run")
    alone = run.fork(folder / "alone", "search")
    pipeline.run(config, alone.folder, until="tune")
    return Quantized(run, files(alone))


def files(run: Run) -> dict[str, bytes]:
    """What search and tune have left, by name."""
    folders = [run.dir.stage_dir(stage) for stage in ("search", "tune")]
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path.name: path.read_bytes() for path in paths}


def start(run: Run, n: int) -> subprocess.Popen[str]:
    """Go on with a run as `n` processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    return subprocess.Popen(
        [sys.executable, *torchrun, str(Path(__file__).with_name("until_tune.py")), run.folder],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(run: Run, n: int) -> None:
    _, err = (process := start(run, n)).communicate(timeout=600)
    assert process.returncode == 0, err


def check(run: Run, alone: dict[str, bytes]) -> None:
    """The search's bytes are those of one process. So may be the tuned file's, whose gradients are
    summed in another order.
    """
    found = files(run)
    assert found.keys() == alone.keys()
    for name in ("allocation.json", "trace.jsonl", "state.json", "budget.json", "best.json"):
        assert found[name] == alone[name], name
    kl = [json.loads(made["outcome.json"]) for made in (found, alone)]
    assert kl[0]["kl_before"] == pytest.approx(kl[1]["kl_before"], rel=1e-6)
    assert kl[0]["kl_after"] == pytest.approx(kl[1]["kl_after"], rel=0.03)
    assert kl[0]["tensors"] == kl[1]["tensors"]


def test_the_number_of_processes_does_not_show(quantized: Quantized, tmp_path: Path) -> None:
    """Three here; two finish the run that was killed."""
    run = quantized.run.fork(tmp_path / "run", "search")
    finish(run, 3)
    check(run, quantized.alone)


def kill_rank_1(run: Run, n: int, stage: str, said: str) -> str:
    """Go on as `n` processes, kill one when the stage has said this, and return what is told."""
    n_before = len(run.events) if run.dir.events_path.exists() else 0
    process = start(run, n)
    while process.poll() is None:
        if run.dir.events_path.exists() and any(
            event.stage == stage and said in event.message for event in run.events[n_before:]
        ):
            break
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed"
    os.kill(read_json(run.folder.with_name("rank-1.json")), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode
    last = run.events[-1]
    assert (last.kind, last.stage) == ("failed", stage)
    return last.message


def test_killed_and_continued_by_another_number(quantized: Quantized, tmp_path: Path) -> None:
    run = quantized.run.fork(tmp_path / "run", "search")
    died = "(rank 1) was killed or died without a word"
    assert died in kill_rank_1(run, 2, "search", "the best proposal")
    assert died in kill_rank_1(run, 3, "tune", "block 1 of 2")
    finish(run, 2)
    check(run, quantized.alone)
    proposals = [e for e in run.events if "the best proposal" in e.message]
    tuned = [e for e in run.events if e.stage == "tune" and "block 1 of 2" in e.message]
    assert len(proposals) == 1, "it began to search again"
    assert len({e.message for e in tuned}) == 1, "another block 1 than the one that was kept"
