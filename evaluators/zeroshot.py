"""Zero-shot multiple choice with lm-evaluation-harness's templates and scoring.

    python -m evaluators.zeroshot FILE.gguf --task piqa [--base BASE.gguf] [--limit N]

`acc` picks the choice with the highest sum of log p, `acc_norm` the highest sum divided by the
choice's characters; both are compared with the gold answer. Beside accuracy stand the *flips*: how
many picks differ from the base model's. A file can lose as many items as it gains and keep its
accuracy; it cannot hide flips.

With `--out` every scored item is appended to a JSONL file, and a rerun only scores what is missing.
A line counts for the very model file (sha256) and item text it was written for, for nothing else.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evaluators import choice_items, command
from evaluators.answer_log import AnswerLog
from evaluators.choice_items import TaskItems
from evaluators.command import Progress
from evaluators.errors import EvaluationError
from evaluators.figures import Accuracy, Flips
from evaluators.llama_runtime import CPU, Model, Runtime, check_gguf, model_sha256
from evaluators.logprobs import RowWorkers
from evaluators.pair_scores import score_items
from evaluators.stats import sign_test


@dataclass(frozen=True)
class ZeroShotResult:
    """One file on one task. `accuracy` holds the task's metrics. The picks (choice index of every
    item, by metric) and sums of log p stay out of the JSON.
    """

    task: str
    file: str
    n_bytes: int
    n_items: int
    accuracy: dict[str, Accuracy]
    items_sha256: str
    seconds: float
    picks: dict[str, tuple[int, ...]] = field(repr=False)
    scores: tuple[tuple[float, ...], ...] = field(repr=False)
    gold: tuple[int, ...] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "n_items": self.n_items,
            **{metric: asdict(accuracy) for metric, accuracy in self.accuracy.items()},
            "items_sha256": self.items_sha256,
            "seconds": self.seconds,
        }


def run(
    file: Path | str,
    items: TaskItems,
    out: Path | None = None,
    runtime: Runtime = CPU,
    progress: Progress | None = None,
) -> ZeroShotResult:
    """Score every item of a task with a GGUF.

    Args:
        items: from `evaluators.choice_items.load`.
        out: JSONL that scored items are appended to and taken from.
        progress: called with (items done, items in all).

    Raises:
        EvaluationError: a broken file, an item longer than the model's context, or logits that
            are not finite.
    """
    started = time.monotonic()
    file = Path(file)
    n_bytes = check_gguf(file)
    digests = [item.digest() for item in items.items]
    log = AnswerLog(out, model_sha256(file), "scores") if out else None
    known = dict(log.answers) if log else {}
    todo = [i for i, digest in enumerate(digests) if digest not in known]
    scores: dict[int, list[float]] = {
        i: known[digest] for i, digest in enumerate(digests) if digest in known
    }

    def done(position: int, sums: list[float]) -> None:
        i = todo[position]
        if not np.isfinite(sums).all():
            raise EvaluationError(
                f"{file} gives logits that are not finite numbers.",
                "Its weights hold NaN or infinity, or overflow: quantize it again.",
            )
        scores[i] = sums
        if log:
            log.append(items.name, digests[i], sums)
        if progress:
            progress(len(scores), len(digests))

    if todo:
        with Model(file, runtime) as model, RowWorkers(model.n_vocab, runtime.threads) as workers:
            score_items(model, [items.items[i] for i in todo], workers, done)
    ordered = tuple(tuple(scores[i]) for i in range(len(digests)))
    picks = {metric: _picks(metric, items, ordered) for metric in items.metrics}
    gold = tuple(item.gold for item in items.items)
    return ZeroShotResult(
        task=items.name,
        file=str(file),
        n_bytes=n_bytes,
        n_items=len(gold),
        accuracy={metric: _accuracy(picked, gold) for metric, picked in picks.items()},
        items_sha256=items.sha256(),
        seconds=round(time.monotonic() - started, 3),
        picks=picks,
        scores=ordered,
        gold=gold,
    )


def answer_flips(result: ZeroShotResult, base: ZeroShotResult) -> dict[str, Flips]:
    """Return the flips of a file against the base model on the same items, by metric."""
    if result.items_sha256 != base.items_sha256:
        raise EvaluationError(
            "The file and the base did not answer the same items.",
            "Run both with one task and --limit.",
        )
    flips = {}
    for metric, picked in result.picks.items():
        ours, theirs, gold = (np.array(x) for x in (picked, base.picks[metric], result.gold))
        n = int((ours != theirs).sum())
        gained = int(((ours == gold) & (theirs != gold)).sum())
        lost = int(((ours != gold) & (theirs == gold)).sum())
        flips[metric] = Flips(n, n / len(gold), gained, lost, sign_test(gained, lost))
    return flips


def _picks(metric: str, items: TaskItems, scores: Sequence[Sequence[float]]) -> tuple[int, ...]:
    if metric == "acc":
        return tuple(int(np.argmax(sums)) for sums in scores)
    return tuple(
        int(np.argmax(np.array(sums) / np.array(item.n_chars)))
        for item, sums in zip(items.items, scores, strict=True)
    )


def _accuracy(picked: Sequence[int], gold: Sequence[int]) -> Accuracy:
    n = len(gold)
    value = sum(a == b for a, b in zip(picked, gold, strict=True)) / n
    # the sample deviation of n zeros and ones
    stderr = math.sqrt(value * (1 - value) / (n - 1)) if n > 1 else 0.0
    return Accuracy(value, stderr, n)


def run_with_base(
    file: Path,
    base: Path | None,
    sets: Sequence[TaskItems],
    out: Path | None,
    runtime: Runtime,
    base_results: dict[str, ZeroShotResult],
) -> dict[str, Any]:
    """Return every task's JSON for one file, with the base's accuracy and the flips when there is
    one. `base_results` keeps the base's answers between files.
    """
    rows: dict[str, Any] = {}
    for items in sets:
        if base and items.name not in base_results:
            line = command.ProgressLine(f"base {items.name}")
            base_results[items.name] = run(base, items, out, runtime, line)
        line = command.ProgressLine(f"{file.name} {items.name}")
        result = run(file, items, out, runtime, line)
        row = {**result.to_json(), "source": items.source}
        if base:
            reference = base_results[items.name]
            row["base"] = {m: asdict(accuracy) for m, accuracy in reference.accuracy.items()}
            flips = answer_flips(result, reference)
            row["flips"] = {metric: asdict(value) for metric, value in flips.items()}
        rows[items.name] = row
    return rows


def load_sets(options: argparse.Namespace) -> list[TaskItems]:
    """Return the tasks that `add_task_options` asked for; none without --task."""
    names = options.task or []
    if options.data and len(names) != 1:
        raise EvaluationError(
            "--data works with a single --task.", "Run the other tasks separately."
        )
    return [choice_items.load(name, options.data, options.labels, options.limit) for name in names]


def add_task_options(parser: argparse._ActionsContainer, required: bool) -> None:
    parser.add_argument(
        "--task",
        action="append",
        choices=list(choice_items.TASKS),
        required=required,
        default=None,
        help="can be repeated",
    )
    parser.add_argument(
        "--data", type=Path, metavar="FILE.jsonl", help="use local items instead of the Hub's"
    )
    parser.add_argument("--labels", type=Path, metavar="FILE", help="labels of the items in --data")
    parser.add_argument(
        "--limit", type=command.positive, metavar="N", help="use only the first N items"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.jsonl",
        help="file of scored items; a rerun resumes from it",
    )


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    sets = load_sets(options)
    rows = run_with_base(
        options.file, options.base, sets, options.out, command.runtime_of(options), {}
    )
    result: dict[str, Any] = {
        "file": str(options.file),
        "n_bytes": check_gguf(options.file),
        "protocol": "lm-evaluation-harness templates, 0-shot",
        "tasks": rows,
        "average_acc": sum(row["acc"]["value"] for row in rows.values()) / len(rows),
    }
    if options.base:
        result["base"] = str(options.base)
    return result


def show(rows: dict[str, Any]) -> None:
    """Print tasks by metric: accuracy, the base's, and the flips."""
    lines = []
    for name, row in rows.items():
        for metric in ("acc", "acc_norm"):
            if metric not in row:
                continue
            line = [f"{name} {metric}", str(row[metric]["n"]), _percent(row[metric])]
            if "base" in row:
                flips = row["flips"][metric]
                line += [_percent(row["base"][metric])]
                line += [f"{flips['n']} (+{flips['gained']} -{flips['lost']})"]
            lines.append(line)
    headers = ["task", "items", "accuracy", *(["base", "flips"] if len(lines[0]) > 3 else [])]
    command.print_table(headers, lines)


def _percent(accuracy: dict[str, Any]) -> str:
    return f"{100 * accuracy['value']:.2f} ± {100 * accuracy['stderr']:.2f} %"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="evaluators.zeroshot", description="Score a GGUF on zero-shot multiple-choice tasks."
    )
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    add_task_options(parser, required=True)
    parser.add_argument(
        "--base", type=Path, metavar="BASE.gguf", help="count answers that differ from this file's"
    )
    command.add_runtime_options(parser)
    return command.run_command(parser, _evaluate, lambda result: show(result["tasks"]), argv)


if __name__ == "__main__":
    sys.exit(main())
