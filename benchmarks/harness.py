"""Our model for lm-evaluation-harness beside the harness's own for transformers, same weights.

    python benchmarks/harness.py agree CHECKPOINT FILE.gguf --tasks piqa --limit 200 --data FOLDER
    python benchmarks/harness.py race  CHECKPOINT FILE.gguf --tasks piqa --limit 200 --data FOLDER

`agree`: how many answers of the GGUF are those of the checkpoint, and both scores. `race`: the
sides take turns, each in a process of its own; wall and processor seconds without the start (a run
of 8 items is taken off), medians. FOLDER is that of `evaluators.tasks --data`; without it the data
comes from the Hub. It needs the extra `tasks`, and peft for the harness's own model.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from evaluators_speed import Command, race  # noqa: E402

from evaluators import task_runs  # noqa: E402
from evaluators.llama_runtime import Runtime  # noqa: E402

Results = tuple[task_runs.TaskResult, ...]


def of_checkpoint(options: argparse.Namespace, loaded: list[Any]) -> Results:
    """The harness's own model for transformers."""
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(options.threads)
    lm = HFLM(
        pretrained=options.checkpoint,
        dtype=options.dtype[0],
        device="cpu",
        batch_size=options.batch[0],
        trust_remote_code=False,
    )
    return task_runs.evaluate(lm, loaded, settings(options))


def of_gguf(options: argparse.Namespace, loaded: list[Any]) -> Results:
    runtime = Runtime(options.threads)
    asked = {options.tasks: loaded}
    return task_runs.run(Path(options.file), asked, settings(options), None, runtime)[options.tasks]


def settings(options: argparse.Namespace) -> task_runs.Settings:
    return task_runs.Settings(
        options.limit,
        options.fewshot,
        options.max_tokens,
        options.chat,
        options.data and Path(options.data),
    )


SIDES = {"checkpoint": of_checkpoint, "gguf": of_gguf}


def agree(options: argparse.Namespace) -> None:
    loaded = task_runs.load([options.tasks], settings(options))[options.tasks]
    theirs, ours = of_checkpoint(options, loaded), of_gguf(options, loaded)
    for a, b in zip(ours, theirs, strict=True):
        for mine, other in zip(a.metrics, b.metrics, strict=True):
            n = mine.accuracy.n
            same = [
                x == y for x, y in zip(mine.answers.answers, other.answers.answers, strict=True)
            ]
            print(
                f"{a.task} {mine.metric},{mine.filter}: {sum(same)} of {n} answers are the same;"
                f" {mine.accuracy.value:.4f}, the checkpoint {other.accuracy.value:.4f}",
                flush=True,
            )
            differ = [i for i, yes in enumerate(same) if not yes]
            if differ:
                print(f"  other answers: items {differ}")
            found = task_runs.compare(mine, other).get("flips")
            if found is not None:
                print(f"  {found}")


def race_sides(options: argparse.Namespace) -> None:
    def side(name: str, **changed: str) -> Command:
        def command(n: int) -> list[str]:
            said = [sys.executable, __file__, "side", options.checkpoint, options.file]
            said += ["--name", name, "--tasks", options.tasks, "--limit", str(n)]
            said += ["--threads", str(options.threads)]
            said += ["--data", options.data] if options.data else []
            for key, value in changed.items():
                said += [f"--{key}", value]
            return ["env", f"OMP_NUM_THREADS={options.threads}", *said]

        return command

    sides = {"ours": side("gguf")}
    for dtype in options.dtype:
        for batch in options.batch:
            name = f"lm-eval {dtype} batch {batch}"
            sides[name] = side("checkpoint", dtype=dtype, batch=str(batch))
    race(sides, 8, 8 + (options.limit or 200), options.turns)


def one_side(options: argparse.Namespace) -> None:
    loaded = task_runs.load([options.tasks], settings(options))[options.tasks]
    SIDES[options.name](options, loaded)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("agree", "race", "side"))
    parser.add_argument("checkpoint")
    parser.add_argument("file")
    parser.add_argument("--name", choices=tuple(SIDES), default="gguf")
    parser.add_argument("--tasks", default="piqa")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--fewshot", type=int)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--data")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[16])
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    options = parser.parse_args()
    {"agree": agree, "race": race_sides, "side": one_side}[options.what](options)


if __name__ == "__main__":
    main()
