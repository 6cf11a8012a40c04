"""A measure that cannot be taken ends nothing: it is left out, and the reason is told."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Answer, Run, quantkit
from safetensors.torch import load_file, save_file
from test_card import card, report_value
from test_report import OURS, values

from evaluators.errors import EvaluationError
from quantkit.errors import QuantkitError
from quantkit.evidence import report
from quantkit.evidence.report import plots
from quantkit.evidence.report.measures import Measures, reason_of
from quantkit.evidence.report.write import write_report


@pytest.mark.parametrize(
    "error",
    [
        EvaluationError("llama.cpp cannot expand /home/me/x.gguf.", "Leave --weight-kl out."),
        QuantkitError("It has no room.", "Use --cache on another disk."),
        MemoryError(),
        OSError(28, "No space left on device"),
        ZeroDivisionError("division by zero"),
        KeyError("context_length"),
    ],
)
def test_whatever_fails(error: Exception) -> None:
    """The reason has no remedy: that would name options of another command."""
    notes: list[str] = []
    measures = Measures(notes.append)

    def fail() -> int:
        raise error

    assert measures.take("speed", lambda: 3) == 3 and not measures.missing
    assert measures.take("weight KL", fail) is None
    (missing,) = measures.missing
    assert missing.name == "weight KL" and missing.reason
    assert "--" not in missing.reason and "/home" not in missing.reason
    assert notes == [f"weight KL: not measured: {missing.reason}"]


def test_an_interrupt_is_no_reason() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Measures().take("KL", stop)


def test_reasons_have_words() -> None:
    assert reason_of(KeyError("a")) == "KeyError: 'a'"
    assert reason_of(EvaluationError("Broken.", "Mend it.")) == "Broken."


def without_kl() -> dict[str, Any]:
    """A report whose output could not be held against the base."""
    found = copy.deepcopy(values())
    found["outputs"][0] |= {
        **dict.fromkeys(("kl", "top1", "perplexity", "ln_ppl_ratio", "weight_kl", "speed")),
        "domains": {},
    }
    found["base"]["perplexity"] = found["base"]["speed"] = found["n_windows"] = None
    found["not_measured"] = [{"name": f"KL of {OURS}", "reason": "llama.cpp gives no logits."}]
    return found


def test_a_report_without_its_main_figure(tmp_path: Path) -> None:
    """Everything that is made of it can be made, and says so; no figure is made up."""
    value = without_kl()
    read = report.read(value)
    assert math.isnan(read.first.kl.value) and not read.first.kl.is_known
    assert "could not be measured" in report.verdict(read)
    write_report(tmp_path, read)
    for name in ("report.md", "report.html"):
        made = (tmp_path / name).read_text("utf-8")
        assert "not measured" in made and "llama.cpp gives no logits." in made
        assert "nan" not in made.lower().replace("finance", "")
    assert report.read(json.loads((tmp_path / "report.json").read_text("utf-8"))) == read
    whole = report_value()
    value["outputs"][0]["search"] = whole["outputs"][0]["search"]
    shown = str(card(value={**value, "calibration": whole["calibration"]}))
    assert "llama.cpp gives no logits." in shown and ".nan" not in shown


def test_a_plot_that_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("no spread")

    monkeypatch.setattr(plots, "bits_by_kind", fail)
    written = {path.name for path in write_report(tmp_path, report.read(values()))}
    assert "frontier.png" in written and "bits-by-kind.png" not in written
    said = json.loads((tmp_path / "report.json").read_text("utf-8"))["not_measured"]
    assert said[-1]["name"] == "the plot bits-by-kind" and "no spread" in said[-1]["reason"]


def outlier(folder: Path) -> None:
    """One BF16 weight that float16 cannot hold: the file cannot be expanded to F16."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.mlp.down_proj.weight"][3, 7] = torch.tensor(90_000.0)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [outlier])
def test_a_weight_that_float16_cannot_hold(
    tiny_checkpoint: Path, tmp_path: Path, offline: dict[str, str], spoil: Callable[[Path], None]
) -> None:
    """The run makes its file, and says what could not be measured of it."""
    model = tmp_path / "Outlier"
    shutil.copytree(tiny_checkpoint, model)
    spoil(model)
    run = Run(tmp_path / "run")
    command = ("run", model, "--out", run.folder, "--profile", "demo", "--calibration", "docs")
    answer: Answer = quantkit(*command, env=offline)
    assert answer.code == 0, answer.err
    found = [m for m in run.report["not_measured"] if m["name"].startswith("weight KL of Out")]
    missing, in_conversations = found
    assert in_conversations["name"] == f"{missing['name']} in conversations"
    for each in found:
        assert "F16" in each["reason"] and "--" not in each["reason"]
    (row,) = run.report["outputs"]
    assert row["kl"]["mean"] >= 0 and "weight_kl" not in row
    assert not [c for c in row["integrity"] if "F16" in c["name"] and c["passed"] is not False]
    card_text = (run.dir.stage_dir("publish") / "upload" / "README.md").read_text("utf-8")
    assert missing["reason"] in card_text and missing["reason"] in answer.err
