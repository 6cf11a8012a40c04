"""Perplexity of a GGUF on a text, by llama.cpp's protocol or that of the GPTQ papers.

    python -m evaluators.perplexity FILE.gguf --text FILE --ctx 512

`evaluators.windows` states both protocols. The llama.cpp numbers and errors are those of
`llama-perplexity` for the same file, text and context.
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
from numpy.typing import NDArray

from evaluators import command
from evaluators.command import Progress
from evaluators.errors import NotFinite
from evaluators.figures import MeanNats, Perplexity
from evaluators.llama_runtime import CPU, Model, Runtime
from evaluators.logprobs import RowWorkers
from evaluators.stats import mean_stderr, windowed_interval
from evaluators.texts import DATASETS, load_dataset_text, read_text, text_sha256
from evaluators.windows import PROTOCOLS, Windows, cut_windows, scored_logits, window_context

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class PerplexityResult:
    """One file on one text. `token_nll` [n_windows, n_scored] stays out of the JSON."""

    perplexity: Perplexity
    nll: MeanNats
    protocol: str
    n_ctx: int
    n_windows: int
    file: str
    n_bytes: int
    text_sha256: str
    seconds: float
    token_nll: F64 = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "token_nll"}


def mean_nats(values: Sequence[F64]) -> MeanNats:
    """Return the mean with errors of values [n_windows, n_scored], one array per domain."""
    every = np.concatenate([x.ravel() for x in values])
    interval = windowed_interval(values)
    ci95 = None
    if interval.low is not None and interval.high is not None:
        ci95 = (interval.low, interval.high)
    return MeanNats(float(every.mean()), mean_stderr(every), ci95, every.size)


def perplexity_of(nll: MeanNats) -> Perplexity:
    """Return the perplexity and its errors to first order, as llama-perplexity propagates them."""
    value = math.exp(nll.mean)
    ci95 = (math.exp(nll.ci95[0]), math.exp(nll.ci95[1])) if nll.ci95 else None
    return Perplexity(value, value * nll.stderr, ci95, nll.n)


def check_finite(values: F64, file: Path) -> None:
    """Raise EvaluationError when a model's log-probabilities are NaN or infinite."""
    if not np.isfinite(values).all():
        raise NotFinite(
            f"{file} gives logits that are not finite numbers.",
            "Its weights hold NaN or infinity, or overflow: quantize it again.",
        )


def token_nll(
    model: Model, windows: Windows, workers: RowWorkers, progress: Progress | None = None
) -> F64:
    """Return -log p of every scored token, [n_windows, n_scored]."""
    nll = np.empty((windows.n_windows, windows.n_scored))
    with window_context(model, windows.n_ctx, windows.first) as context:
        for i, window in enumerate(windows.tokens):
            for row, logits, targets in scored_logits(context, window, windows.first):
                nll[i, row : row + len(logits)] = workers.nll(logits, targets)
            check_finite(nll[i], model.path)
            if progress:
                progress(i + 1, windows.n_windows)
    return nll


def measure(
    file: Path | str,
    text: str,
    n_ctx: int | None = None,
    max_windows: int | None = None,
    protocol: str = "llama.cpp",
    runtime: Runtime = CPU,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Measure the perplexity of a GGUF.

    Args:
        file: the GGUF; of a split model, its first part.
        text: what is scored, as it is.
        n_ctx: tokens of a window; the protocol's own (512 or 2048) when None.
        max_windows: score only so many windows from the start; all full ones when None.
        protocol: "llama.cpp" or "gptq".
        progress: called with (windows done, windows in all).

    Raises:
        EvaluationError: a broken file, a text shorter than one window, a context longer than the
            model's, logits that are not finite.
    """
    started = time.monotonic()
    n_ctx = n_ctx or PROTOCOLS.get(protocol, 512)
    with Model(file, runtime) as model, RowWorkers(model.n_vocab, runtime.threads) as workers:
        windows = cut_windows(model, text, protocol, n_ctx, max_windows)
        nll = token_nll(model, windows, workers, progress)
        n_bytes = model.n_bytes
    mean = mean_nats([nll])
    return PerplexityResult(
        perplexity=perplexity_of(mean),
        nll=mean,
        protocol=protocol,
        n_ctx=n_ctx,
        n_windows=windows.n_windows,
        file=str(file),
        n_bytes=n_bytes,
        text_sha256=text_sha256(text),
        seconds=round(time.monotonic() - started, 3),
        token_nll=nll,
    )


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    if options.dataset:
        text, source = load_dataset_text(options.dataset, options.protocol), options.dataset
    else:
        text, source = read_text(options.text), str(options.text)
    result = measure(
        options.file,
        text,
        options.ctx,
        options.chunks,
        options.protocol,
        command.runtime_of(options),
        command.ProgressLine("windows"),
    )
    return {**result.to_json(), "text": source}


def _show(result: dict[str, Any]) -> None:
    perplexity = result["perplexity"]
    command.print_table(
        ["file", "protocol", "windows", "perplexity", "95 % interval"],
        [
            [
                Path(result["file"]).name,
                f"{result['protocol']}, {result['n_ctx']}",
                str(result["n_windows"]),
                command.with_error(perplexity["value"], perplexity["stderr"], 4),
                "{:.3f} .. {:.3f}".format(*perplexity["ci95"]) if perplexity["ci95"] else "-",
            ]
        ],
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="evaluators.perplexity", description="Measure the perplexity of a GGUF on a text."
    )
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text")
    source.add_argument("--dataset", choices=DATASETS, help="a text from the Hub instead")
    parser.add_argument(
        "--ctx", type=command.positive, metavar="N", help="default: the protocol's, 512 or 2048"
    )
    parser.add_argument(
        "--chunks", type=command.positive, metavar="N", help="windows to score (default: all)"
    )
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="llama.cpp")
    command.add_runtime_options(parser)
    return command.run_command(parser, _evaluate, _show, argv)


if __name__ == "__main__":
    sys.exit(main())
