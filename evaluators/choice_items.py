"""Multiple-choice items with lm-evaluation-harness's templates, for the light check that needs no
harness: PIQA, 60 items of our own, and anybody's in our own format. Every other task is the
harness's (`evaluators.tasks`).

    load("piqa")                                        the Hub's validation split
    load("piqa", data=Path("valid.jsonl"), labels=Path("valid-labels.lst"))
    load("everyday")                                    `data/everyday.jsonl`
    load("choices", data=Path("mine.jsonl"))            any file like it, one object a line:

    {"context": "Question: ...\nAnswer:", "choices": ["a", "b"], "gold": 0}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from evaluators.errors import EvaluationError
from evaluators.texts import load_dataset_rows, read_text

MAX_CHOICES = 32


@dataclass(frozen=True)
class Item:
    """The model scores continuations[i] after contexts[i]; the contexts are equal but in
    WinoGrande. A continuation starts with its delimiter; `n_chars` are the characters of the choice
    itself, which acc_norm divides by.

    Raises EvaluationError when there is nothing to choose from, a continuation is empty, or the
    gold answer is none of them.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    n_chars: tuple[int, ...]
    gold: int

    def __post_init__(self) -> None:
        n = len(self.continuations)
        if not 2 <= n <= MAX_CHOICES:
            raise EvaluationError(
                f"It has {n} choices.", f"An item needs 2 to {MAX_CHOICES} of them."
            )
        for i, continuation in enumerate(self.continuations):
            if not continuation.strip():
                raise EvaluationError(
                    f"Choice {i} is empty.", "An empty choice has no probability: remove the item."
                )
        if not 0 <= self.gold < n:
            raise EvaluationError(
                f"The gold answer {self.gold} is not one of the {n} choices.",
                "Count the choices from 0.",
            )

    def digest(self) -> str:
        """Hash of what the model sees; equal items share their scores."""
        value = json.dumps([self.contexts, self.continuations])
        return hashlib.sha256(value.encode()).hexdigest()[:16]


def shared_context(context: str, choices: list[str], gold: int) -> Item:
    """Return an item in lm-evaluation-harness's usual form: one context, choices after one
    space.
    """
    return Item(
        contexts=(context,) * len(choices),
        continuations=tuple(f" {choice}" for choice in choices),
        n_chars=tuple(len(choice) for choice in choices),
        gold=gold,
    )


@dataclass(frozen=True)
class TaskItems:
    """The items of one task. `metrics` is ("acc", "acc_norm") or ("acc",)."""

    name: str
    items: tuple[Item, ...]
    metrics: tuple[str, ...]
    source: str

    def sha256(self) -> str:
        """Hash of all items with their gold answers, in order."""
        value = json.dumps([[item.digest(), item.n_chars, item.gold] for item in self.items])
        return hashlib.sha256(value.encode()).hexdigest()


def _piqa(row: Mapping[str, Any]) -> Item:
    """PIQA (Bisk et al. 2020): `goal`, `sol1`, `sol2` and `label`; the published archive keeps the
    labels in a file of their own, one a line.
    """
    return shared_context(
        f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"])
    )


def _choices(row: Mapping[str, Any]) -> Item:
    """Our own format: the context as it stands, and each choice after it and one space."""
    choices = row["choices"]
    if isinstance(choices, str) or not all(isinstance(choice, str) for choice in choices):
        raise TypeError("choices must be a list of strings")
    if not isinstance(row["context"], str):
        raise TypeError("context must be a string")
    return shared_context(row["context"], list(choices), int(row["gold"]))


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


_METRICS = ("acc", "acc_norm")
TASKS: dict[str, Task] = {
    "piqa": Task(_piqa, _METRICS, HubSplit("baber/piqa", None, "validation")),
    "everyday": Task(_choices, _METRICS, builtin=Path(__file__).parent / "data" / "everyday.jsonl"),
    "choices": Task(_choices, _METRICS),
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
