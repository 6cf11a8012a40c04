"""Any task of lm-evaluation-harness on any GGUF, the base model beside it.

    python -m evaluators.tasks FILE.gguf --tasks gsm8k,ifeval,humaneval,mgsm_de [--base BASE.gguf]

Scores say how many answers are right. With `--base` stand beside them the answers that differ from
the base model's, how many of them became right or wrong, and whether that is more than chance. With
`--out` every answer is kept as it comes, and a rerun asks only for what is missing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluators import command, task_runs
from evaluators.errors import EvaluationError
from evaluators.llama_runtime import Runtime, check_gguf


class _Lines:
    """Progress of one file: a line for each task and kind of request."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._lines: dict[tuple[str, str], command.ProgressLine] = {}

    def __call__(self, task: str, kind: str, done: int, total: int) -> None:
        label = f"{self._file} {task} {kind}"
        self._lines.setdefault((task, kind), command.ProgressLine(label))(done, total)


def measure(
    file: Path,
    names: Sequence[str],
    settings: task_runs.Settings,
    base: Path | None,
    out: Path | None,
    runtime: Runtime,
) -> dict[str, Any]:
    """Return the JSON of the command. Raises EvaluationError as `task_runs.load` and `run`."""
    import llama_cpp

    started = time.monotonic()
    n_bytes = check_gguf(file)
    if base:
        check_gguf(base)
    loaded = task_runs.load(names, settings)
    theirs = {}
    if base:
        theirs = task_runs.run(base, loaded, settings, out, runtime, _Lines(f"base {base.name}"))
    ours = task_runs.run(file, loaded, settings, out, runtime, _Lines(file.name))
    rows = {}
    for name, results in ours.items():
        for i, result in enumerate(results):
            rows[result.task] = result.to_json(theirs[name][i] if base else None)
    return {
        "file": str(file),
        "n_bytes": n_bytes,
        **({"base": str(base)} if base else {}),
        "protocol": f"lm-evaluation-harness {task_runs.harness_version()}",
        "chat_template": settings.chat,
        "llama_cpp_python": llama_cpp.__version__,
        "tasks": rows,
        "seconds": round(time.monotonic() - started, 3),
    }


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    names = [name for text in options.tasks for name in text.split(",") if name]
    if len(set(names)) != len(names) or not names:
        raise EvaluationError("A task is named twice, or none is.", "Name each task once.")
    settings = task_runs.Settings(
        options.limit, options.fewshot, options.max_tokens, options.chat, options.data
    )
    runtime = command.runtime_of(options)
    return measure(options.file, names, settings, options.base, options.out, runtime)


def _show(result: dict[str, Any]) -> None:
    lines = []
    for name, row in result["tasks"].items():
        for metric, found in row["metrics"].items():
            line = [f"{name} {metric}", str(found["n"]), _value(found)]
            if "base" in found:
                line.append(_value(found["base"]))
                line.append(_difference(found))
            lines.append(line)
    headers = ["task", "items", "value", *(["base", "differs"] if "base" in result else [])]
    command.print_table(headers, lines)


def _value(found: dict[str, Any]) -> str:
    return command.with_error(found["value"], found["stderr"], 4)


def _difference(found: dict[str, Any]) -> str:
    if "flips" in found:
        flips = found["flips"]
        return f"{flips['n']} (+{flips['gained']} -{flips['lost']}), p {flips['p_value']:.2g}"
    if "paired" in found:
        return f"{found['paired']['difference']:+.4f}, p {found['paired']['p_value']:.2g}"
    return "-"


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below zero")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="evaluators.tasks",
        description="Run tasks of lm-evaluation-harness on a GGUF.",
    )
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument(
        "--tasks",
        action="append",
        required=True,
        metavar="NAME[,NAME]",
        help="names of the harness, or a task's YAML file",
    )
    parser.add_argument(
        "--base", type=Path, metavar="BASE.gguf", help="say which answers differ from this file's"
    )
    parser.add_argument(
        "--limit", type=command.positive, metavar="N", help="only the first N items of each task"
    )
    parser.add_argument(
        "--fewshot", type=_count, metavar="N", help="examples in a prompt (default: the task's)"
    )
    parser.add_argument(
        "--max-tokens",
        type=command.positive,
        metavar="N",
        help="of an answer (default: the task's)",
    )
    parser.add_argument("--chat", action="store_true", help="ask through the file's chat template")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="for a task NAME use FOLDER/NAME/SPLIT.jsonl instead of the Hub's data",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.jsonl", help="file of answers; a rerun resumes from it"
    )
    command.add_runtime_options(parser)
    return command.run_command(parser, _evaluate, _show, argv)


if __name__ == "__main__":
    sys.exit(main())
