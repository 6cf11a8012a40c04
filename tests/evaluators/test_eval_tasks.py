"""Tasks of lm-evaluation-harness by their names, from files: scores, flips, tests, code."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from eval_fixtures import ONE, SPEC, TinyFiles, run_json, tiny, write_tiny

pytest.importorskip("lm_eval", reason="the extra `tasks` is not installed")

from lm_eval.api.group import Group
from lm_eval.config.group import GroupConfig

from evaluators import choice_items, code_scores, sandbox, task_runs, tasks, zeroshot
from evaluators.errors import EvaluationError
from evaluators.figures import Accuracy, Flips, PairedTest
from evaluators.task_runs import Answers, MetricResult, Settings

__all__ = ["run_json", "tiny"]  # fixtures: used by name

N = 30
PIQA = [
    {"goal": f"zq {i}", "sol1": f"xy {i * 7}", "sol2": f"z{i} qq", "label": i % 2} for i in range(N)
]
GSM8K = [{"question": f"{i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(6)]
HUMANEVAL = [
    {
        "task_id": f"Test/{i}",
        "prompt": f"def f{i}(x):\n",
        "entry_point": f"f{i}",
        "canonical_solution": f"    return x + {i}\n",
        "test": f"def check(f):\n    assert f(1) == {i + 1}\n",
    }
    for i in range(4)
]
GROUP: dict[str, Any] = {
    "group": "both",
    "task": ["piqa", "second_piqa"],
    "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("data")
    cache = pytest.MonkeyPatch()
    cache.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    jsonl(folder / "piqa" / "validation.jsonl", PIQA)
    jsonl(folder / "piqa" / "train.jsonl", PIQA[:3])
    jsonl(folder / "gsm8k" / "test.jsonl", GSM8K[:3])
    jsonl(folder / "gsm8k" / "train.jsonl", GSM8K[3:])
    jsonl(folder / "humaneval" / "test.jsonl", HUMANEVAL)
    yield folder
    cache.undo()


def asked(data: Path, *names: str, **more: Any) -> tuple[dict[str, list[Any]], Settings]:
    settings = Settings(data=data, **more)
    return task_runs.load(names, settings), settings


def test_piqa_is_what_our_own_check_says(tiny: TinyFiles, data: Path) -> None:
    """Accuracies and flips, by the harness's code and by ours."""
    loaded, settings = asked(data, "piqa")
    ruined_by_noise = {
        name: task_runs.run(file, loaded, settings, None, ONE)["piqa"][0]
        for name, file in (("base", tiny.base), ("file", tiny.noisy))
    }
    items = choice_items.load("piqa", data / "piqa" / "validation.jsonl")
    theirs, ours = (zeroshot.run(file, items, runtime=ONE) for file in (tiny.base, tiny.noisy))
    said = ruined_by_noise["file"].to_json(ruined_by_noise["base"])
    for metric, flips in zeroshot.answer_flips(ours, theirs).items():
        row = said["metrics"][f"{metric},none"]
        assert row["value"] == pytest.approx(ours.accuracy[metric].value)
        assert row["stderr"] == pytest.approx(ours.accuracy[metric].stderr)
        assert row["base"]["value"] == pytest.approx(theirs.accuracy[metric].value)
        assert Flips(**row["flips"]) == flips
    assert said["n_shot"] == 0 and said["metrics"]["acc,none"]["n"] == N


def test_the_command(
    tiny: TinyFiles, data: Path, tmp_path: Path, run_json: Callable[..., dict[str, Any]]
) -> None:
    out = tmp_path / "answers.jsonl"
    options = ["--tasks", "gsm8k,piqa", "--data", data, "--base", tiny.base, "--limit", "2"]
    options += ["--fewshot", "1", "--max-tokens", "5", "--out", out]
    result = run_json(tasks.main, tiny.noisy, *options)
    assert set(result["tasks"]) == {"gsm8k", "piqa"}
    gsm8k = result["tasks"]["gsm8k"]
    assert gsm8k["n_shot"] == 1
    assert set(gsm8k["metrics"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    row = gsm8k["metrics"]["exact_match,flexible-extract"]
    assert row["n"] == 2 and row["value"] in (0.0, 0.5, 1.0)
    assert set(row["flips"]) == {"n", "fraction", "gained", "lost", "p_value"}
    lines = out.read_bytes().splitlines()
    assert len(lines) == 2 * (2 + 4)  # both files: two answers, four choices
    again = run_json(tasks.main, tiny.noisy, *options)
    assert again["tasks"] == result["tasks"] and out.read_bytes().splitlines() == lines


def test_the_command_s_table(
    tiny: TinyFiles, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tasks", "piqa", "--data", str(data), "--limit", "3", "--threads", "1", "--table"]
    assert tasks.main([str(tiny.noisy), *options, "--base", str(tiny.base)]) == 0
    out, err = capsys.readouterr()
    assert "piqa acc_norm,none" in out and "differs" in out and "p 1" in out
    assert "piqa loglikelihood 6/6" in err


@pytest.mark.skipif(not sandbox.KNOWN_MACHINE, reason="the kernel's interfaces are those of Linux")
def test_code_is_scored_in_the_sandbox(tiny: TinyFiles, data: Path, tmp_path: Path) -> None:
    """The answers of a tiny model are noise: right and hostile ones are put into the file."""
    loaded, settings = asked(data, "humaneval", max_tokens=3)
    out = tmp_path / "answers.jsonl"
    task_runs.run(tiny.base, loaded, settings, out, ONE)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 4
    written = tmp_path / "written"
    answers = [
        "    return x\n",  # right for f0 alone
        f"    open({str(written)!r}, 'w').write('x')\n    return x\n",
        "    import os\n    os._exit(0)\n",
        "    raise SystemExit(0)\n",
    ]
    order = sorted(lines, key=lambda line: line["item"])
    hashes = {line["item"]: i for i, line in enumerate(order)}
    found = {}
    # which answer is whose is not in the file: each is tried in every place
    for shift in range(4):
        for line in lines:
            place = (hashes[line["item"]] + shift) % 4
            line["answer"] = [answers[place], "stop"]
        out.write_text("".join(json.dumps(line) + "\n" for line in lines))
        [result] = task_runs.run(tiny.base, loaded, settings, out, ONE)["humaneval"]
        found[shift] = result.metrics[0]
    assert found[0].metric == "pass@1"
    passed = [sum(one.answers.scores or ()) for one in found.values()]
    assert sum(passed) == 1.0
    assert not written.exists()


def test_a_group_counts_the_answers_of_its_tasks(
    tiny: TinyFiles, data: Path, tmp_path: Path
) -> None:
    [piqa] = task_runs.load(["piqa"], Settings(data=data))["piqa"]
    second = {
        "task": "second_piqa",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data / "piqa" / "train.jsonl")}},
        **{
            name: piqa.config.to_dict()[name]
            for name in ("doc_to_text", "doc_to_target", "doc_to_choice", "output_type")
        },
        "validation_split": "validation",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "second.yaml").write_text(json.dumps(second))
    file = str(tmp_path / "second.yaml")
    loaded, settings = asked(data, file)
    [alone] = task_runs.run(tiny.base, loaded, settings, None, ONE)[file]
    assert alone.task == "second_piqa" and alone.metrics[0].accuracy.n == 3
    group = Group.from_config(GroupConfig(**GROUP))
    for task in (piqa, loaded[file][0]):
        group.add(task)
    results = task_runs.run(tiny.base, {"both": [group]}, settings, None, ONE)["both"]
    whole, *members = results
    assert whole.task == "both" and len(members) == 2
    [metric] = [m for m in whole.metrics if m.metric == "acc"]
    assert metric.accuracy.n == N + 3 and len(metric.answers.scores or ()) == N + 3
    assert metric.accuracy.value == pytest.approx(sum(metric.answers.scores or ()) / (N + 3))


def test_names_that_the_harness_does_not_know(data: Path) -> None:
    with pytest.raises(EvaluationError, match="no task piqqa") as caught:
        task_runs.load(["piqqa"], Settings())
    assert "piqa" in caught.value.remedy


def test_short_names_of_mgsm() -> None:
    assert task_runs._known("mgsm_de", task_runs._definitions()) == "mgsm_native_cot_de"


def test_data_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(EvaluationError, match="arc_easy cannot be loaded") as caught:
        task_runs.load(["arc_easy"], Settings())
    assert "--data FOLDER" in caught.value.remedy
    (tmp_path / "nothing").mkdir()
    with pytest.raises(EvaluationError, match="no folder that is named after a task"):
        task_runs.load(["piqa"], Settings(data=tmp_path))
    (tmp_path / "piqa").mkdir()
    with pytest.raises(EvaluationError, match="no files of one kind"):
        task_runs.load(["piqa"], Settings(data=tmp_path))


def test_code_that_the_harness_would_run_itself_is_refused(data: Path, tmp_path: Path) -> None:
    unsafe = {
        "task": "runs_code",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data / "gsm8k" / "test.jsonl")}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "unsafe_code": True,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "unsafe.yaml").write_text(json.dumps(unsafe))
    with pytest.raises(EvaluationError, match="harness's own process"):
        task_runs.load([str(tmp_path / "unsafe.yaml")], Settings())


def test_metrics_that_are_programs_of_the_hub_s_are_refused() -> None:
    before = sys.modules.get("evaluate")
    with code_scores.in_sandbox():
        evaluate = importlib.import_module("evaluate")
        with pytest.raises(EvaluationError, match="program from the Hub"):
            evaluate.load("bleu")
        assert isinstance(evaluate.load("code_eval"), code_scores.CodeEval)
    assert sys.modules.get("evaluate") is before


def test_without_the_harness_a_sentence_says_how_to_get_it(
    tiny: TinyFiles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert tasks.main([str(tiny.base), "--tasks", "piqa"]) == 1
    assert "pip install" in capsys.readouterr().err


def result(prompts: str, scores: list[float] | None) -> MetricResult:
    answers = Answers(tuple(prompts), tuple(scores or prompts), tuple(scores) if scores else None)
    return MetricResult("made up", "none", Accuracy(0.0, 0.0, len(prompts)), answers)


def test_answers_are_compared_by_what_they_are() -> None:
    right = task_runs.compare(result("abcd", [1, 1, 1, 0]), result("abcd", [0, 1, 0, 1]))
    assert right == {"flips": Flips(3, 0.75, 2, 1, 1.0)}
    parts = task_runs.compare(result("abcd", [0.5, 1, 0.25, 0]), result("abcd", [0, 1, 0.25, 0]))
    found = parts["paired"]
    assert isinstance(found, PairedTest)
    assert found.difference == pytest.approx(0.125) and found.n_windows == 4
    assert found.p_value == pytest.approx(0.391, abs=1e-3)  # t = 1 with three degrees of freedom
    assert task_runs.compare(result("ab", None), result("ab", None)) == {}
    with pytest.raises(EvaluationError, match="same questions"):
        task_runs.compare(result("ab", [0, 1]), result("ac", [0, 1]))


def test_a_broken_file_is_a_sentence(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_tiny(tmp_path / "cut.gguf", replace(SPEC))
    file.write_bytes(file.read_bytes()[:5000])
    assert tasks.main([str(file), "--tasks", "piqa", "--data", str(data), "--threads", "1"]) == 1
    assert "cut.gguf" in capsys.readouterr().err
