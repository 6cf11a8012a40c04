"""Runs whose channels are equalized: a better file of the same model, measured against the model
as it was given.

pytest tests/pipeline/test_pipeline_equalized.py
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from commands import CHEAP, Run, quantkit, start, wait_for
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.quantized import Source, check_equalizable
from quantkit.errors import UsageError
from quantkit.files import sha256_file
from quantkit.gguf_file.imatrix import read_imatrix
from quantkit.gguf_file.read import GgufFile
from quantkit.run.folder import RunDir


@pytest.fixture(scope="module")
def spoiled(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an outlier among the inputs of every layer: the same function."""
    folder = tmp_path_factory.mktemp("spoiled") / "Spoiled"
    shutil.copytree(tiny_checkpoint, folder)
    whole = load_file(folder / "model.safetensors")
    for name, values in whole.items():
        if name.endswith("layernorm.weight"):
            values[3::32] *= 256
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) or name.endswith(
            ("gate_proj.weight", "up_proj.weight")
        ):
            values[:, 3::32] /= 256
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def runs(
    spoiled: Path, offline: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, Run]:
    """A run as it is, and one with channels equalized."""
    made = []
    for more in ((), ("--equalize",)):
        folder = tmp_path_factory.mktemp("runs") / "run"
        answer = quantkit("run", spoiled, "--out", folder, *CHEAP, *more, env=offline)
        assert answer.code == 0, answer.err
        made.append(Run(folder))
    return made[0], made[1]


def report(run: Run) -> dict[str, object]:
    found: dict[str, object] = json.loads((run.folder / "8-validate" / "report.json").read_text())
    return found


@pytest.mark.slow
def test_the_file_is_better_and_the_evidence_that_of_the_given_model(runs: tuple[Run, Run]) -> None:
    plain, equalized = runs
    bases = [RunDir(run.folder).artifacts for run in runs]
    assert sha256_file(bases[0].base) == sha256_file(bases[1].base)
    assert sha256_file(bases[1].equalized_base) != sha256_file(bases[1].base)
    kl = [report(run)["outputs"][0]["kl"]["mean"] for run in runs]  # type: ignore[index]
    assert kl[1] < 0.5 * kl[0]
    names = {check["name"]: check for check in report(equalized)["outputs"][0]["integrity"]}  # type: ignore[index]
    assert names["logits of the equalized model against the original's"]["passed"] is True
    assert all(check["passed"] for check in names.values())
    theirs, mine = (read_imatrix(base.imatrix) for base in bases)
    assert mine.keys() == theirs.keys()
    for name in theirs:  # llama.cpp's files are made of the given model, with importances of it
        np.testing.assert_allclose(mine[name], theirs[name], rtol=0.05)


@pytest.mark.slow
def test_it_is_rebuilt_from_the_equalized_base(
    runs: tuple[Run, Run], offline: dict[str, str], tmp_path: Path
) -> None:
    made = RunDir(runs[1].folder).artifacts
    (recipe,) = (made.stitched / "recipes").glob("*.json")
    answer = quantkit(
        *("rebuild", recipe, "--base", made.equalized_base, "--levels", made.levels),
        *("--out", tmp_path / "again.gguf", "--json"),
        env=offline,
    )
    assert answer.code == 0, answer.err
    assert answer.json["equal"] is True


@pytest.mark.slow
def test_killed_while_it_equalizes(
    runs: tuple[Run, Run], spoiled: Path, offline: dict[str, str], tmp_path: Path
) -> None:
    """The same bytes again."""
    folder = tmp_path / "run"
    process = start("run", spoiled, "--out", folder, *CHEAP, "--equalize", env=offline)
    events = RunDir(folder).events_path
    while wait_for(process, folder, "convert", "progress"):
        if "equalizing" in events.read_text():
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    answer = quantkit("resume", folder, env=offline)
    assert answer.code == 0, answer.err
    for name in ("equalized_base", "powers", "base"):
        one, other = (getattr(RunDir(f).artifacts, name) for f in (folder, runs[1].folder))
        assert sha256_file(one) == sha256_file(other), name
    file = next(RunDir(folder).artifacts.stitched.glob("*.gguf"))
    assert sha256_file(file) == sha256_file(
        next(RunDir(runs[1].folder).artifacts.stitched.glob("*.gguf"))
    )
    assert GgufFile(file).tensors


def test_a_quantized_source_keeps_its_grid() -> None:
    check_equalizable(None)
    with pytest.raises(UsageError, match="quantized itself"):
        check_equalizable(Source("AWQ", bits=4, group=128))
