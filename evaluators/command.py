"""Shared parts of the command lines: options, one progress line on stderr, JSON or a table on
stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evaluators.errors import EvaluationError
from evaluators.llama_runtime import Runtime
from evaluators.texts import DATASETS, load_dataset_text, read_text

Progress = Callable[[int, int], None]  # called with (done, total)

_QUIET_SECONDS = 15.0  # between lines where stderr is not a terminal


class ProgressLine:
    """`label done/total` on stderr: rewritten in place on a terminal, else a line now and then."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._is_tty = sys.stderr.isatty()
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._is_tty:
            end = "\n" if done == total else ""
            print(f"\r{self._label} {done}/{total}", end=end, file=sys.stderr, flush=True)
        elif done == total or now - self._last >= _QUIET_SECONDS:
            self._last = now
            print(f"{self._label} {done}/{total}", file=sys.stderr, flush=True)


def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--threads", type=positive, default=0, metavar="N", help="CPU threads (default: all)"
    )
    group.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda uses all GPUs"
    )
    group.add_argument(
        "--gpu-layers", type=positive, metavar="N", help="with --device cuda (default: all layers)"
    )
    group.add_argument("--table", action="store_true", help="print a table instead of JSON")


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Add --text, --dataset, --ctx and --chunks of the commands that compare files with a base."""
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="UTF-8 text; several are domains, reported one by one and combined",
    )
    parser.add_argument(
        "--dataset",
        action="append",
        default=[],
        choices=DATASETS,
        help="a text from the Hub, also a domain",
    )
    parser.add_argument(
        "--ctx", type=positive, default=512, metavar="N", help="default: 512 tokens"
    )
    parser.add_argument(
        "--chunks", type=positive, metavar="N", help="windows of each text (default: all)"
    )


def read_domains(options: argparse.Namespace) -> dict[str, str]:
    """Return {name: text} of what `add_text_options` asked for. Raises EvaluationError when there
    is nothing, a file cannot be read, or two have one name.
    """
    paths = named_paths(options.text)
    if not paths and not options.dataset:
        raise EvaluationError("There is no text to measure on.", "Give --text or --dataset.")
    texts = {name: read_text(path) for name, path in paths.items()}
    return texts | {name: load_dataset_text(name, "llama.cpp") for name in options.dataset}


def runtime_of(options: argparse.Namespace) -> Runtime:
    """Return the runtime that `add_runtime_options` asked for. Raises EvaluationError for layers on
    a GPU that was not asked for.
    """
    if options.device == "cpu" and options.gpu_layers:
        raise EvaluationError("--gpu-layers is for a GPU.", "Add --device cuda, or leave it out.")
    layers = 0 if options.device == "cpu" else options.gpu_layers or -1
    return Runtime(options.threads, layers)


def positive(text: str) -> int:
    """Return an integer above zero, as an argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above zero")
    return value


def named_paths(arguments: Sequence[str]) -> dict[str, Path]:
    """Parse `NAME=FILE` or `FILE` (named by its stem) into {name: path}. Raises EvaluationError
    when two have one name.
    """
    named: dict[str, Path] = {}
    for argument in arguments:
        name, equals, rest = argument.partition("=")
        if not equals or "/" in name:  # an = further in belongs to the path
            name, rest = Path(argument).stem, argument
        if name in named:
            raise EvaluationError(
                f"Two texts have the name {name}.",
                "Rename them: --text first=a/x.txt second=b/x.txt.",
            )
        named[name] = Path(rest)
    return named


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns as wide as they need, the first aligned left and numbers right."""
    lines = [list(headers), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        first, *rest = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join([first, *rest]).rstrip())


def with_error(value: float, error: float | None, digits: int) -> str:
    """Return `12.34 ± 0.05`."""
    if error is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def run_command(
    parser: argparse.ArgumentParser,
    evaluate: Callable[[argparse.Namespace], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
    argv: Sequence[str] | None,
) -> int:
    """Parse, evaluate, print one JSON object (or what `show` makes of it), and give the exit
    status: 0 done, 1 failed with the sentence on stderr. Wrong use exits with 2.
    """
    options = parser.parse_args(argv)
    try:
        result = evaluate(options)
    except EvaluationError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    if options.table:
        show(result)
    else:
        print(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False))
    return 0
