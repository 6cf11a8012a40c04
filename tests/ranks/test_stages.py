"""Calibrate and quantize on one, two and three ranks of gloo: the same number gives the same bytes,
another the same errors within noise; a rank that is killed costs nothing that was done.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from families import FAMILIES, write_checkpoint
from safetensors.numpy import load_file

from quantkit.config import RunConfig
from quantkit.files import sha256_file, write_json
from quantkit.gguf_file.read import GgufFile
from quantkit.gptq.errors import Errors
from quantkit.run.events import read_events
from quantkit.run.folder import MadeOn, RunDir, read_as

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("stage_worker.py")
# Stacked experts, experts beside shared ones, transposed weights and a tied table.
FOUR = ("Llama 3", "Qwen3-MoE", "DeepSeek-V2-Lite", "GPT-2")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def command(n: int, until: str, folders: list[Path]) -> list[str]:
    launcher = [*TORCHRUN, str(n)] if n > 1 else []
    return [sys.executable, *launcher, str(WORKER), until, *map(str, folders)]


def run(env: Mapping[str, str], n: int, until: str, folders: list[Path]) -> None:
    env = {**env, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command(n, until, folders), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, offline: dict[str, str]) -> Path:
    """For every family a run that is converted, and copies of it that went on to quantize."""
    root = tmp_path_factory.mktemp("ranks")
    for family in FOUR:
        model = root / family / "model"
        write_checkpoint(FAMILIES[family], model)
        text = "docs:3,prose:1" if family == "Llama 3" else "docs,code"
        config = RunConfig(model=str(model), profile="demo", calibration=text)
        (root / family / "base").mkdir()
        write_json(root / family / "base" / "config.json", config)
    run(offline, 1, "convert", [root / family / "base" for family in FOUR])
    for family in FOUR:
        for name in ("one", "two", "again", "three", "killed"):
            shutil.copytree(root / family / "base", root / family / name)
    run(offline, 1, "quantize", [root / family / "one" for family in FOUR])
    run(offline, 2, "quantize", [root / f / name for name in ("two", "again") for f in FOUR])
    run(offline, 3, "quantize", [root / family / "three" for family in FOUR])
    return root


def hashes(folder: Path) -> dict[str, str]:
    """Of all that calibrate and quantize leave, but for the paths in it."""
    made = RunDir(folder).artifacts
    paths = [path for stage in ("calibrate", "quantize") for path in made.folder(stage).rglob("*")]
    return {str(p.relative_to(folder)): sha256_file(p) for p in paths if p.is_file()}


@pytest.mark.parametrize("family", FOUR)
def test_the_same_number_gives_the_same_bytes(runs: Path, family: str) -> None:
    two, again = (hashes(runs / family / name) for name in ("two", "again"))
    assert two == again and any(name.endswith("Q4_K.gguf") for name in two)
    records = RunDir(runs / family / "two").records()
    assert [records[s].made_on.n_ranks for s in ("convert", "quantize")] == [1, 2]  # type: ignore[union-attr]
    assert str(MadeOn(2, "H200")) == "2 x H200"


@pytest.mark.parametrize("family", FOUR)
@pytest.mark.parametrize("name", ["two", "three"])
def test_another_number_is_as_good(runs: Path, family: str, name: str) -> None:
    """Sums of float32 in another order: two bytes in a thousand fall on the other side, and the
    error of no method differs by more than 0.5 % of itself. The bounds are four times that.
    """
    one, other = (RunDir(runs / family / n).artifacts for n in ("one", name))
    texts = [load_file(made.tokens) for made in (one, other)]
    assert all(np.array_equal(texts[0][part], texts[1][part]) for part in texts[0])
    ours, theirs = (read_as(Errors, made.errors) for made in (one, other))
    assert ours.errors.keys() == theirs.errors.keys()
    assert ours.fallbacks == theirs.fallbacks and ours.dampings == theirs.dampings
    for tensor, types in ours.errors.items():
        for qtype, found in types.items():
            errors = theirs.errors[tensor][qtype].errors
            assert errors.keys() == found.errors.keys()
            for method, error in found.errors.items():
                assert errors[method].relative == pytest.approx(error.relative, rel=0.02)
    for level in ("Q4_K", "Q6_K"):
        a, b = (GgufFile(made.level(level)) for made in (one, other))
        differ = [float((a.packed(t) != b.packed(t)).mean()) for t in a.tensors]
        assert np.mean(differ) < 0.01, (level, differ)


def test_a_killed_rank(runs: Path, offline: dict[str, str]) -> None:
    """Rank 0 says so in its last event, and another number of ranks goes on."""
    folder = runs / "Qwen3-MoE" / "killed"
    path = RunDir(folder).events_path
    env = {**offline, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command(2, "quantize", [folder]), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while process.poll() is None:
        events, _ = read_events(path)
        if any((e.stage, e.kind) == ("quantize", "progress") for e in events):
            os.kill(_rank_1(process.pid), signal.SIGKILL)
            break
        time.sleep(0.01)
    process.communicate(timeout=60)
    assert process.returncode == 1
    last = read_events(path)[0][-1]
    assert (last.stage, last.kind) == ("quantize", "failed")
    assert "process 2 of 2 (rank 1) was killed" in last.message
    run(offline, 1, "quantize", [folder])
    assert read_as(Errors, RunDir(folder).artifacts.errors).errors.keys() == (
        read_as(Errors, RunDir(runs / "Qwen3-MoE" / "one").artifacts.errors).errors.keys()
    )


def _rank_1(torchrun: int) -> int:
    """The process with RANK=1 that torchrun started."""
    for child in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text("ascii").split():
        if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError("there is no rank 1")
