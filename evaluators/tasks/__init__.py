"""Multiple-choice tasks with lm-evaluation-harness's templates, from the Hub or local files.

load("piqa")                                        the Hub's validation split
load("piqa", data=Path("valid.jsonl"), labels=Path("valid-labels.lst"))
load("everyday")                                    60 items of our own, in this package
load("choices", data=Path("mine.jsonl"))            any file of `tasks.choices`' format
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from evaluators.errors import EvaluationError
from evaluators.tasks import arc, choices, hellaswag, piqa, winogrande
from evaluators.tasks.items import Item, TaskItems
from evaluators.texts import load_dataset_rows, read_text

_ACC = ("acc",)
_BOTH = ("acc", "acc_norm")


@dataclass(frozen=True)
class HubSplit:
    """Where a task lives on the Hub."""

    path: str
    name: str | None
    split: str


@dataclass(frozen=True)
class Task:
    """How one row becomes an item, what is counted, and where rows come from without a file."""

    item: Callable[[Mapping[str, Any]], Item]
    metrics: tuple[str, ...]
    hub: HubSplit | None = None
    builtin: Path | None = None


TASKS: dict[str, Task] = {
    "arc_easy": Task(arc.item, _BOTH, HubSplit("allenai/ai2_arc", "ARC-Easy", "test")),
    "arc_challenge": Task(arc.item, _BOTH, HubSplit("allenai/ai2_arc", "ARC-Challenge", "test")),
    "hellaswag": Task(hellaswag.item, _BOTH, HubSplit("Rowan/hellaswag", None, "validation")),
    "piqa": Task(piqa.item, _BOTH, HubSplit("baber/piqa", None, "validation")),
    "winogrande": Task(
        winogrande.item, _ACC, HubSplit("allenai/winogrande", "winogrande_xl", "validation")
    ),
    "everyday": Task(
        choices.item, _BOTH, builtin=Path(__file__).parent.parent / "data" / "everyday.jsonl"
    ),
    "choices": Task(choices.item, _BOTH),
}


def load(
    name: str, data: Path | None = None, labels: Path | None = None, limit: int | None = None
) -> TaskItems:
    """Return the first `limit` items of a task (all when None).

    Args:
        name: one of `TASKS`.
        data: a JSONL file with the data set's own columns; the Hub or the package when None.
        labels: a file of labels, one a line for each line of `data` (PIQA's archive).

    Raises:
        EvaluationError: no such task, no such file, the Hub does not answer, a row that lacks a
            column, has an empty choice, or whose gold answer is none of its choices.
    """
    if name not in TASKS:
        raise EvaluationError(f"There is no task {name!r}.", f"Use one of {', '.join(TASKS)}.")
    if labels and not data:
        raise EvaluationError("--labels needs a file of items.", "Give --data FILE.jsonl, too.")
    task = TASKS[name]
    file = data or task.builtin
    rows: Iterable[Mapping[str, Any]]
    if file is not None:
        rows, source = _jsonl_rows(file, labels), str(data or name)
    elif task.hub is not None:
        hub = task.hub
        rows, source = load_dataset_rows(hub.path, hub.name, hub.split), hub.path
    else:
        raise EvaluationError(f"The task {name} needs a file.", "Give --data FILE.jsonl.")
    items = tuple(
        _item(task, row, f"Item {i} of {source}") for i, row in enumerate(islice(rows, limit))
    )
    if not items:
        raise EvaluationError(f"{source} holds no items.", "Give a file with one item per line.")
    # a file of our own format is a task of its own
    label = data.stem if name == "choices" and data else name
    return TaskItems(label, items, task.metrics, source)


def _item(task: Task, row: Mapping[str, Any], where: str) -> Item:
    try:
        return task.item(row)
    except EvaluationError as error:
        raise EvaluationError(f"{where} is malformed. {error.message}", error.remedy) from None
    except KeyError as error:
        raise EvaluationError(
            f"{where} is malformed: it has no usable {error.args[0]!r}.",
            "Check the columns against the task's own data set.",
        ) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise EvaluationError(
            f"{where} is malformed: {error}.", "Check the columns against the task's own data set."
        ) from None


def _jsonl_rows(file: Path, labels: Path | None) -> Iterator[Mapping[str, Any]]:
    """Rows of a JSONL file, `label` put in from a file next to it when there is one."""
    # not splitlines(): it also cuts at U+2028 and friends, which JSON strings may hold
    lines = [line for line in read_text(file).split("\n") if line.strip()]
    label_lines = read_text(labels).split() if labels else None
    if label_lines is not None and len(label_lines) != len(lines):
        raise EvaluationError(
            f"{labels} has {len(label_lines)} labels for the {len(lines)} items of {file}.",
            "Give the labels of the same split.",
        )
    for i, line in enumerate(lines):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise EvaluationError(
                f"Item {i} of {file} is not JSON: {error}.", "Write one JSON object per line."
            ) from None
        if not isinstance(row, dict):
            raise EvaluationError(
                f"Item {i} of {file} is not a JSON object.", "Write one JSON object per line."
            )
        yield row if label_lines is None else {**row, "label": label_lines[i]}
