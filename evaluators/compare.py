"""Measure two or more GGUF files of the same model on the same windows, as one JSON.

    python -m evaluators.compare --base BASE.gguf FILE.gguf FILE2.gguf --text FILE

A row for each file: KL from the base, top-1 agreement, perplexity; with `--weight-kl` the KL of the
weights alone, with `--speed` tokens per second and memory, with `--task` zero-shot accuracy and
answer flips, with `--conversations` KL in conversations by domain, and with `--answers` what each
answers beside the base. Every file but the first is tested against the first, window by window:
whether their KL really differs, and whether their perplexity does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import llama_cpp

from evaluators import command, conversations, document_kl, generation, kl, speed, zeroshot
from evaluators.base_logits import BaseLogits
from evaluators.choice_items import TaskItems
from evaluators.devices import described
from evaluators.document_kl import DocumentLogits
from evaluators.documents import gather
from evaluators.figures import PairedTest
from evaluators.kl import KLResult
from evaluators.llama_runtime import Runtime
from evaluators.session import Launch, plainly
from evaluators.stats import paired_difference
from evaluators.zeroshot import ZeroShotResult


def paired_nll(a: KLResult, b: KLResult) -> PairedTest:
    """Return whether the mean -log p (ln perplexity) of two files differs on the same windows."""
    return paired_difference(
        [a.tokens[domain].nll for domain in a.tokens], [b.tokens[domain].nll for domain in a.tokens]
    )


def _evaluate(options: argparse.Namespace, launch: Launch = plainly) -> dict[str, Any]:
    on_cpu = Runtime(options.threads, launch=launch)
    runtime = command.runtime_of(options)
    device = described(runtime)
    if not runtime.n_gpu_layers:
        runtime = on_cpu
    # Everything that can be wrong with the request is found before the long work.
    texts = command.read_domains(options)
    sets = zeroshot.load_sets(options)
    with BaseLogits.compute(
        options.base,
        texts,
        options.ctx,
        options.chunks,
        options.cache,
        runtime,
        command.ProgressLine("base windows"),
    ) as base:
        rows, results = kl.measure_files(
            base, options.files, options.weight_kl, options.cache, runtime
        )
        for row, result in zip(rows[1:], results[1:], strict=True):
            row["nll_versus_first"] = asdict(paired_nll(result, results[0]))
        base_row = {
            "file": str(options.base),
            "n_bytes": base.n_bytes,
            "perplexity": asdict(results[0].combined.base_perplexity),
        }
    if runtime.n_gpu_layers:  # of the base and of the file that the others are tested against
        text = next(iter(texts.values()))
        for row, file in ((base_row, options.base), (rows[0], options.files[0])):
            found = kl.between_devices(file, text, runtime, on_cpu, options.ctx)
            row["device_kl"] = asdict(found)
    _add_tasks(options, sets, rows, base_row, runtime)
    documents = _add_conversations(options, rows, base_row, runtime)
    _add_answers(options, rows, runtime)
    if options.speed:
        files = [options.base, *options.files]
        for i, (row, file) in enumerate(zip([base_row, *rows], files, strict=True)):
            measured = speed.measure(
                file,
                options.speed_ctx,
                options.prompt,
                options.generate,
                options.repeats,
                runtime,
            )
            row["speed"] = asdict(measured)
            command.ProgressLine("speed of files")(i + 1, len(files))
    return {
        "base": base_row,
        "files": rows,
        "documents": documents,
        "settings": {
            "protocol": "llama.cpp",
            "n_ctx": options.ctx,
            "n_windows": results[0].combined.n_windows,
            "texts": results[0].text_sha256,
            "n_threads": runtime.threads,
            "device": device,
            "n_gpu_layers": runtime.n_gpu_layers,
            "llama_cpp_python": llama_cpp.__version__,
        },
    }


def _add_tasks(
    options: argparse.Namespace,
    sets: Sequence[TaskItems],
    rows: Sequence[dict[str, Any]],
    base_row: dict[str, Any],
    runtime: Runtime,
) -> None:
    if not sets:
        return
    answers: dict[str, ZeroShotResult] = {}
    for row, file in zip(rows, options.files, strict=True):
        row["tasks"] = zeroshot.run_with_base(
            file, options.base, sets, options.out, runtime, answers
        )
    base_row["tasks"] = {name: result.to_json() for name, result in answers.items()}


def _add_conversations(
    options: argparse.Namespace,
    rows: Sequence[dict[str, Any]],
    base_row: dict[str, Any],
    runtime: Runtime,
) -> dict[str, Any] | None:
    """Add KL in conversations to every row, and the floor to the base's. Returns what was read."""
    if not options.conversations:
        return None
    talks = conversations.dialogues(limit=options.documents)
    found = gather(options.base, talks, runtime=runtime)
    line = command.ProgressLine("base conversations")
    with DocumentLogits.compute(options.base, found, options.cache, runtime, line) as base:
        floor = document_kl.measure_weights(base, options.base, options.cache, runtime)
        base_row["floor"] = {name: asdict(one) for name, one in floor.domains.items()}
        for row, file in zip(rows, options.files, strict=True):
            line = command.ProgressLine(f"{file.name} conversations")
            result = document_kl.measure(base, file, runtime, line)
            row["conversations"] = {name: asdict(one) for name, one in result.domains.items()}
            if options.weight_kl:
                alone = document_kl.measure_weights(base, file, options.cache, runtime)
                row["weight_conversations"] = {
                    name: asdict(one.kl) for name, one in alone.domains.items()
                }
    return {
        "n": len(found.documents),
        "n_tokens": found.n_tokens,
        "n_scored": found.n_scored,
        "sha256": found.sha256(),
        "asked": found.asked,
        "reason": found.reason or None,
        "left_out": found.left_out or None,
    }


def _add_answers(
    options: argparse.Namespace, rows: Sequence[dict[str, Any]], runtime: Runtime
) -> None:
    if not options.answers:
        return
    asked = generation.ask(
        options.base, conversations.prompts(limit=options.prompts), options.tokens, runtime
    )
    line = command.ProgressLine("answers of the base")
    base = generation.answers(options.base, asked, options.cache, runtime, line)
    for row, file in zip(rows, options.files, strict=True):
        line = command.ProgressLine(f"{file.name} answers")
        row["answers"] = asdict(
            generation.measure(base, file, options.cache, runtime, line).answers
        )


def _show(result: dict[str, Any]) -> None:
    base = result["base"]
    perplexity = command.with_error(base["perplexity"]["value"], base["perplexity"]["stderr"], 4)
    print(f"base {Path(base['file']).name}: {base['n_bytes']:,} bytes, perplexity {perplexity}\n")
    kl.show(result)
    rows = result["files"]
    if "tasks" in rows[0]:
        for row in rows:
            print(f"\n{Path(row['file']).name}")
            zeroshot.show(row["tasks"])
    if "speed" in base:
        print()
        speed.show([row["speed"] for row in [base, *rows]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluators.compare", description="Compare GGUF files of the same model."
    )
    parser.add_argument(
        "--base", type=Path, required=True, metavar="BASE.gguf", help="full precision"
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.gguf")
    command.add_text_options(parser)
    kl.add_kl_options(parser)
    group = parser.add_argument_group("zero-shot (with --task)")
    zeroshot.add_task_options(group, required=False)
    group = parser.add_argument_group("use")
    group.add_argument(
        "--conversations",
        action="store_true",
        help="also measure KL in conversations through the chat template, by domain",
    )
    group.add_argument(
        "--documents", type=command.positive, metavar="N", help="of each domain (default: all)"
    )
    group.add_argument(
        "--answers", action="store_true", help="also compare greedy answers with the base's"
    )
    group.add_argument("--prompts", type=command.positive, metavar="N", help="the first N prompts")
    group.add_argument(
        "--tokens",
        type=command.positive,
        default=generation.NEW_TOKENS,
        metavar="N",
        help=f"of an answer at most (default: {generation.NEW_TOKENS})",
    )
    group = parser.add_argument_group("speed (with --speed)")
    group.add_argument(
        "--speed", action="store_true", help="also measure tokens per second and memory"
    )
    group.add_argument(
        "--speed-ctx", type=command.positive, default=2048, metavar="N", help="default: 2048 tokens"
    )
    speed.add_speed_options(group)
    command.add_runtime_options(parser)
    return parser


def answer(argv: Sequence[str], launch: Launch) -> dict[str, Any]:
    """Return the JSON of the command with these arguments, as a value; `launch` starts the
    processes that open files on the CPU. Raises EvaluationError.
    """
    options = _parser().parse_args(argv)
    return _evaluate(options, launch)


def main(argv: Sequence[str] | None = None) -> int:
    return command.run_command(_parser(), _evaluate, _show, argv)


if __name__ == "__main__":
    sys.exit(main())
