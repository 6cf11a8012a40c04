"""Our picks against lm-evaluation-harness itself, on the HF checkpoint of the same weights.

The harness is no dependency: install it into an environment of its own, then

    LM_EVAL=.lm-eval/bin/lm_eval LM_EVAL_MODEL=CHECKPOINT_DIR LM_EVAL_GGUF=BASE.gguf \
    LM_EVAL_PIQA=DIR pytest -m slow tests/evaluators/test_eval_harness.py

DIR holds piqa_valid.jsonl and piqa_labels.lst; LM_EVAL_LIMIT (default 200) says how many items.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from evaluators import tasks, zeroshot

TASK = """
task: piqa_local
dataset_path: json
dataset_kwargs: {data_files: {validation: DATA}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{goal}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.mark.slow
def test_same_picks_on_piqa(tmp_path: Path) -> None:
    names = ("LM_EVAL", "LM_EVAL_MODEL", "LM_EVAL_GGUF", "LM_EVAL_PIQA")
    missing = [name for name in names if name not in os.environ]
    if missing:
        pytest.skip(f"set {', '.join(missing)}: see the module")
    harness, model, file, folder = (os.environ[name] for name in names)
    data, labels = Path(folder) / "piqa_valid.jsonl", Path(folder) / "piqa_labels.lst"
    limit = int(os.environ.get("LM_EVAL_LIMIT", "200"))
    rows = [json.loads(line) for line in data.read_text().split("\n") if line]
    joined = tmp_path / "piqa.json"
    joined.write_text(
        "".join(
            json.dumps({**row, "label": int(label)}) + "\n"
            for row, label in zip(rows, labels.read_text().split(), strict=True)
        )
    )
    (tmp_path / "piqa_local.yaml").write_text(TASK.replace("DATA", str(joined)))
    command = [harness, "run", "--model", "hf", "--device", "cpu", "--batch_size", "16"]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--limit", str(limit)]
    command += ["--tasks", "piqa_local", "--include_path", str(tmp_path)]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    subprocess.run(command, env={**os.environ, **offline}, check=True)
    [samples] = (tmp_path / "out").rglob("samples_*.jsonl")
    theirs = np.zeros((limit, 2))
    for line in samples.read_text().split("\n"):
        if line:
            sample = json.loads(line)
            theirs[sample["doc_id"]] = [float(answer[0][0]) for answer in sample["resps"]]

    items = tasks.load("piqa", data, labels, limit)
    result = zeroshot.run(file, items)
    n_chars = np.array([item.n_chars for item in items.items])
    assert (theirs.argmax(1) == result.picks["acc"]).mean() >= 0.99
    assert ((theirs / n_chars).argmax(1) == result.picks["acc_norm"]).mean() >= 0.99
    assert np.median(np.abs(theirs - np.array(result.scores))) < 0.2
