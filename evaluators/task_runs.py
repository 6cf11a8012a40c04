"""Run tasks of lm-evaluation-harness on a GGUF, and say what differs from the base model's answers.

Names are the harness's; `mgsm_de` and the like stand for `mgsm_native_cot_de`. Data comes from the
Hub, or for a task NAME from the files SPLIT.jsonl (or .json, .csv, .parquet) in a folder NAME: then
prompts, filters and metrics are still the harness's. Code that a model wrote runs in the sandbox
(`evaluators.code_scores`), nowhere else.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.errors import EvaluationError, printable
from evaluators.figures import Accuracy, Flips, PairedTest
from evaluators.llama_runtime import CPU, Model, Runtime
from evaluators.stats import paired_difference, sign_test

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_MGSM = re.compile(r"mgsm_([a-z]{2})")
_BOOTSTRAP = 1000  # for errors of metrics that are no means
_INSTALL = "Install it: pip install 'quantkit-gguf[tasks]', or pip install 'lm_eval[ifeval]'."


@dataclass(frozen=True)
class Settings:
    """What is asked of every task. None leaves it as the task has it."""

    limit: int | None = None
    n_shot: int | None = None
    max_tokens: int | None = None
    chat: bool = False
    data: Path | None = None


@dataclass(frozen=True)
class Answers:
    """What one metric of one task is computed from, item by item: the `answers` (a pick, what was
    extracted from a text, ...) and their `scores`, None where an item has no number of its own.
    `prompts` are hashes of what was asked.
    """

    prompts: tuple[str, ...]
    answers: tuple[Any, ...]
    scores: tuple[float, ...] | None


@dataclass(frozen=True)
class MetricResult:
    """One metric of a task behind one filter. `value` and `stderr` are the harness's."""

    metric: str
    filter: str
    accuracy: Accuracy
    answers: Answers


@dataclass(frozen=True)
class TaskResult:
    """One file on one task. `truncated` requests lost their beginning, and `unfinished` answers
    reached their limit.
    """

    task: str
    version: str
    n_shot: int
    metrics: tuple[MetricResult, ...]
    truncated: int = 0
    unfinished: int = 0

    def to_json(self, base: TaskResult | None = None) -> dict[str, Any]:
        """Return the plain JSON, with what differs from the base's answers if that is given."""
        said: dict[str, Any] = {
            "version": self.version,
            "n_shot": self.n_shot,
            "truncated": self.truncated,
            "unfinished": self.unfinished,
            "metrics": {},
        }
        if base:
            said["base_unfinished"] = base.unfinished
        for i, ours in enumerate(self.metrics):
            row: dict[str, Any] = asdict(ours.accuracy)
            if base:
                theirs = base.metrics[i]
                row["base"] = asdict(theirs.accuracy)
                row |= {name: asdict(found) for name, found in compare(ours, theirs).items()}
            said["metrics"][f"{ours.metric},{ours.filter}"] = row
        return said


def compare(ours: MetricResult, theirs: MetricResult) -> dict[str, Flips | PairedTest]:
    """Return what differs between two files on the same items: `flips` with McNemar's exact test
    where an item is right or wrong, else `paired`, the difference of means with Student's t over
    items; nothing where an item has no number of its own.

    Raises EvaluationError when they were not asked the same.
    """
    a, b = ours.answers, theirs.answers
    if a.prompts != b.prompts:
        raise EvaluationError(
            "The file and the base were not asked the same questions.",
            "Their tokenizers or chat templates differ: leave --base out.",
        )
    if a.scores is None or b.scores is None:
        return {}
    x, y = np.array(a.scores), np.array(b.scores)
    if set(a.scores) | set(b.scores) <= {0.0, 1.0}:
        n = sum(one != other for one, other in zip(a.answers, b.answers, strict=True))
        gained, lost = int((x > y).sum()), int((x < y).sum())
        return {"flips": Flips(n, n / len(x), gained, lost, sign_test(gained, lost))}
    if len(x) < 2:
        return {}
    return {"paired": paired_difference([x[:, None]], [y[:, None]])}


def run(
    file: Path,
    tasks: Mapping[str, Sequence[Any]],
    settings: Settings,
    out: Path | None = None,
    runtime: Runtime = CPU,
    progress: Callable[[str, str, int, int], None] | None = None,
) -> dict[str, tuple[TaskResult, ...]]:
    """Ask a GGUF everything: the results of each name of `tasks`, which `load` gave.

    Args:
        out: JSONL that answers are appended to and taken from.
        progress: called with (name, kind of request, done, total).

    Raises:
        EvaluationError: a broken file, no chat template, settings that are not known here, code to
            run and no sandbox.
    """
    from evaluators.code_scores import in_sandbox
    from evaluators.harness import GgufLM

    results = {}
    with Model(file, runtime) as model, in_sandbox(), _quietly():
        for name, loaded in tasks.items():

            def told(kind: str, done: int, total: int, name: str = name) -> None:
                if progress:
                    progress(name, kind, done, total)

            lm = GgufLM(model, out, told)
            found = evaluate(lm, loaded, settings)
            results[name] = tuple(
                replace(one, truncated=lm.truncated, unfinished=lm.unfinished) for one in found
            )
    return results


def evaluate(lm: Any, loaded: Sequence[Any], settings: Settings) -> tuple[TaskResult, ...]:
    """Ask any of the harness's models (`lm_eval.api.model.LM`) the tasks and groups of one name."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    more = {"max_gen_toks": settings.max_tokens} if settings.max_tokens else None
    found = simple_evaluate(
        lm,
        tasks=list(loaded),
        num_fewshot=settings.n_shot,
        limit=settings.limit,
        gen_kwargs=more,
        task_manager=TaskManager(include_defaults=False),  # looks for no task again
        bootstrap_iters=_BOOTSTRAP,
        apply_chat_template=settings.chat,
        fewshot_as_multiturn=settings.chat,
        confirm_run_unsafe_code=True,  # `load` lets in only what is scored in the sandbox
    )
    results = []
    for name, samples in found["samples"].items():
        [task] = [t for t in _leaves(loaded) if t.task_name == name]
        results.append(
            TaskResult(
                name,
                str(found["versions"][name]),
                int(found["n-shot"].get(name, 0)),
                tuple(_metrics(task, found["results"][name], samples)),
            )
        )
    groups = found.get("groups", {})
    for name, values in groups.items():
        members = [r for r in results if r.task in _members(name, found["group_subtasks"])]
        results.insert(0, _pooled(name, values, members, found["versions"].get(name)))
    return tuple(results)


def _members(name: str, groups: Mapping[str, Sequence[str]]) -> set[str]:
    """The tasks of a group and of its groups."""
    found = {name}
    for child in groups.get(name, ()):
        found |= _members(child, groups)
    return found


def _pooled(
    name: str, values: Mapping[str, Any], members: Sequence[TaskResult], version: Any
) -> TaskResult:
    """A group's own figures, over the answers of all its tasks."""
    metrics = []
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, float):
            continue
        parts = [
            m.answers for r in members for m in r.metrics if (m.metric, m.filter) == (metric, kind)
        ]
        scores = [part.scores for part in parts if part.scores is not None]
        pooled = Answers(
            tuple(x for part in parts for x in part.prompts),
            tuple(x for part in parts for x in part.answers),
            tuple(x for part in scores for x in part) if len(scores) == len(parts) else None,
        )
        accuracy = _accuracy(value, values.get(f"{metric}_stderr,{kind}"), len(pooled.prompts))
        metrics.append(MetricResult(metric, kind, accuracy, pooled))
    n_shot = members[0].n_shot if members else 0
    return TaskResult(name, str(version), n_shot, tuple(metrics))


def _metrics(
    task: Any, values: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> Iterator[MetricResult]:
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        items = sorted((s for s in samples if s["filter"] == kind), key=lambda s: s["doc_id"])
        numbers = [_number(sample.get(metric)) for sample in items]
        known = tuple(x for x in numbers if x is not None)
        answers = Answers(
            tuple(sample["prompt_hash"] for sample in items),
            tuple(_answer(task, sample, metric) for sample in items),
            known if len(known) == len(numbers) else None,
        )
        accuracy = _accuracy(float(value), values.get(f"{metric}_stderr,{kind}"), len(items))
        yield MetricResult(metric, kind, accuracy, answers)


def _accuracy(value: float, stderr: Any, n: int) -> Accuracy:
    return Accuracy(float(value), float(stderr) if isinstance(stderr, float | int) else 0.0, n)


def _number(value: Any) -> float | None:
    """An item's score; several of one item, as IFEval's instructions, are their mean."""
    if isinstance(value, bool | int | float | np.number | np.bool_):
        return float(value)
    if isinstance(value, list) and value and all(isinstance(x, bool | int) for x in value):
        return sum(value) / len(value)
    return None


def _answer(task: Any, sample: Mapping[str, Any], metric: str) -> Any:
    """What is compared between two files: the choice picked by this metric, or what the filter left
    of the text.
    """
    responses = sample["filtered_resps"]
    if task.OUTPUT_TYPE != "multiple_choice":
        return json.dumps(responses, default=str)
    sums = np.array([response[0] for response in responses])
    choices = task.doc_to_choice(sample["doc"])
    lengths = {"acc_norm": map(len, choices), "acc_bytes": (len(c.encode()) for c in choices)}
    if metric in lengths and len(sums) == len(choices):
        sums = sums / np.array(list(lengths[metric]))
    return int(sums.argmax())


# ---- tasks


def harness_version() -> str:
    """Return the version of lm-evaluation-harness that is installed."""
    return importlib.metadata.version("lm_eval")


def load(names: Sequence[str], settings: Settings) -> dict[str, list[Any]]:
    """Return the harness's tasks and groups by the names that were asked for.

    Raises EvaluationError for a name that the harness does not know, for data that cannot be had,
    and for tasks that run a model's code by other means than our sandbox.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise EvaluationError("lm-evaluation-harness is not installed.", _INSTALL) from None
    from evaluators.code_scores import in_sandbox, is_scored_here

    with tempfile.TemporaryDirectory(prefix="tasks-") as scratch, in_sandbox(), _quietly():
        known = _definitions()
        wanted = {name: _known(name, known) for name in names}
        if settings.data:
            _write_local(known, settings.data, Path(scratch))
        manager = TaskManager(include_path=scratch, include_defaults=False)
        manager.task_index.update({**known, **manager.task_index})
        loaded: dict[str, list[Any]] = {}
        for name, its in wanted.items():
            found = _loaded(manager, its)
            for task in _leaves(found):
                if getattr(task, "UNSAFE_CODE", False) and not is_scored_here(task):
                    raise EvaluationError(
                        f"The task {task.task_name} runs the model's code in the harness's own"
                        " process.",
                        "Leave it out: only code that is scored in the sandbox is run.",
                    )
            loaded[name] = found
    return loaded


@cache
def _definitions() -> dict[str, Any]:
    """Where the harness defines each of its tasks and groups: it takes seconds to look through."""
    from lm_eval.tasks import TaskManager

    return dict(TaskManager().task_index)


def _loaded(manager: Any, name: str) -> list[Any]:
    try:
        found = manager.load([name])
    except EvaluationError:
        raise
    except Exception as error:  # a task's own code and the Hub's client can raise anything
        reason = printable(f"{type(error).__name__}: {error}")[:300].rstrip(".")
        raise EvaluationError(
            f"The task {name} cannot be loaded ({reason}).",
            "Check the connection, or give its data with --data FOLDER.",
        ) from error
    groups = list(found["groups"].values())
    held = {task.task_name for group in groups for task in group.get_all_tasks()}
    inner = {group.name for outer in groups for group in outer.get_all_groups()}
    tops = [group for group in groups if group.name not in inner]
    return [*tops, *(t for key, t in found["tasks"].items() if key not in held)]


def _leaves(loaded: Sequence[Any]) -> Iterator[Any]:
    """The tasks among tasks and groups."""
    for one in loaded:
        yield from one.get_all_tasks() if hasattr(one, "get_all_tasks") else [one]


def _known(name: str, known: Mapping[str, Any]) -> str:
    """The harness's name of a task."""
    if name in known or Path(name).is_file():
        return name
    match = _MGSM.fullmatch(name)
    if match and f"mgsm_native_cot_{match[1]}" in known:
        return f"mgsm_native_cot_{match[1]}"
    close = difflib.get_close_matches(name, known, 3)
    hint = f"Did you mean {' or '.join(close)}?" if close else "`lm_eval ls tasks` lists them."
    raise EvaluationError(f"The harness has no task {name}.", hint)


def _write_local(known: Mapping[str, Any], data: Path, scratch: Path) -> None:
    """For each task that has a folder in `data`, write the harness's own definition with that data
    instead.
    """
    folders = (
        [folder for folder in sorted(data.iterdir()) if folder.is_dir()] if data.is_dir() else []
    )
    found = 0
    for folder in folders:
        entry = known.get(folder.name)
        if entry is None or entry.yaml_path is None or not folder.is_dir():
            continue
        files = {x.stem: x for x in sorted(folder.iterdir()) if x.suffix in _BUILDERS}
        # The types of columns are the first split's, and a test's answers may be left empty.
        order = sorted(files, key=lambda split: split not in ("train", "validation"))
        builders = {_BUILDERS[file.suffix] for file in files.values()}
        if len(builders) != 1:
            raise EvaluationError(
                f"{folder} has no files of one kind.",
                "Name them after the splits: train.jsonl, test.jsonl.",
            )
        definition = {
            "include": str(entry.yaml_path),
            "task": folder.name,
            "dataset_path": builders.pop(),
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {k: str(files[k].absolute()) for k in order}},
        }
        # JSON is YAML
        (scratch / f"{folder.name}.yaml").write_text(json.dumps(definition), "utf-8")
        found += 1
    if not found:
        raise EvaluationError(
            f"{data} has no folder that is named after a task.",
            "Make one: FOLDER/gsm8k/test.jsonl, for example.",
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """What the harness prints goes to stderr, and of its log only errors."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(before)
