"""Measure tokens per second, load time and memory of GGUF files.

    python -m evaluators.speed FILE.gguf [FILE2.gguf ...] --ctx 2048

Each file is measured in a process of its own (`evaluators.speed_probe`), one after the other.
Prompt speed is that of one batch of `--prompt` tokens, generation that of `--generate` single
tokens after it. `peak_rss_bytes` is the process's high-water mark, Python and the mapped file
included; `buffers` are llama.cpp's own figures, on whatever device they lie.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluators import command
from evaluators.devices import described
from evaluators.errors import EvaluationError
from evaluators.figures import Rate, SpeedResult
from evaluators.llama_runtime import CPU, Opened, Runtime, check_gguf
from evaluators.speed_probe import ProbeRequest, probe


def measure(
    file: Path | str,
    n_ctx: int = 2048,
    n_prompt: int = 512,
    n_generate: int = 64,
    n_repeats: int = 3,
    runtime: Runtime = CPU,
) -> SpeedResult:
    """Measure one file in a process of its own.

    Raises EvaluationError when prompt and generation do not fit `n_ctx`, for a broken file, for a
    GPU that is not there, or when the process dies (mostly: not enough memory).
    """
    n_bytes = check_gguf(Path(file))
    if n_prompt + n_generate > n_ctx:
        raise EvaluationError(
            f"{n_prompt} prompt and {n_generate} generated tokens do not fit a context of {n_ctx}.",
            "Use a larger --ctx.",
        )
    request = ProbeRequest(
        n_ctx, n_prompt, n_generate, n_repeats, runtime.n_threads, runtime.n_gpu_layers
    )
    device = described(runtime)
    n_tokens = (1 + n_repeats) * n_prompt + n_repeats * n_generate
    with Opened(file, runtime) as opened:
        return opened.call(
            probe,
            n_tokens,
            lambda answer: SpeedResult(
                file=str(file),
                n_bytes=n_bytes,
                n_ctx=n_ctx,
                load_seconds=float(answer["load_seconds"]),
                prompt=_rate(answer["prompt"]),
                generation=_rate(answer["generation"]),
                peak_rss_bytes=int(answer["peak_rss_bytes"]),
                buffers={str(kind): int(size) for kind, size in answer["buffers"].items()},
                n_threads=runtime.threads,
                n_gpu_layers=runtime.n_gpu_layers,
                device=device,
            ),
            **asdict(request),
        )


def _rate(answer: dict[str, Any]) -> Rate:
    repeats = tuple(float(rate) for rate in answer["repeats"])
    return Rate(int(answer["tokens"]), float(answer["tokens_per_second"]), repeats)


def add_speed_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--prompt", type=command.positive, default=512, metavar="N", help="default: 512 tokens"
    )
    parser.add_argument(
        "--generate", type=command.positive, default=64, metavar="N", help="default: 64 tokens"
    )
    parser.add_argument(
        "--repeats", type=command.positive, default=3, metavar="N", help="default: 3 times"
    )


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    line = command.ProgressLine("files measured")
    rows = []
    for i, file in enumerate(options.files):
        result = measure(
            file,
            options.ctx,
            options.prompt,
            options.generate,
            options.repeats,
            command.runtime_of(options),
        )
        rows.append(asdict(result))
        line(i + 1, len(options.files))
    return rows[0] if len(rows) == 1 else {"files": rows}


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print one line a file."""
    command.print_table(
        ["file", "bytes", "prompt t/s", "generation t/s", "load", "peak memory"],
        [
            [
                Path(row["file"]).name,
                f"{row['n_bytes']:,}",
                f"{row['prompt']['tokens_per_second']:.1f}",
                f"{row['generation']['tokens_per_second']:.1f}",
                f"{row['load_seconds']:.2f} s",
                f"{row['peak_rss_bytes'] / 1e6:,.0f} MB",
            ]
            for row in rows
        ],
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="evaluators.speed", description="Measure the speed and memory of GGUF files."
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.gguf")
    parser.add_argument(
        "--ctx", type=command.positive, default=2048, metavar="N", help="default: 2048 tokens"
    )
    add_speed_options(parser)
    command.add_runtime_options(parser)
    return command.run_command(
        parser, _evaluate, lambda result: show(result.get("files", [result])), argv
    )


if __name__ == "__main__":
    sys.exit(main())
