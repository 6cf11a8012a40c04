"""What the evaluators cost beside the tools that people know.

    python benchmarks/evaluators_speed.py perplexity LLAMA_PERPLEXITY FILE.gguf TEXT
    python benchmarks/evaluators_speed.py memory

`perplexity`: llama-perplexity on the same file, text and threads. The sides take turns; times are
those of the work without the start (a short run is taken off): wall and processor seconds, medians.
`memory`: peak beyond the file with a vocabulary of 152k. Tasks are in harness.py.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / name) for name in ("support", "evaluators"))]

Command = Callable[[int], list[str]]


def seconds(command: Sequence[str]) -> tuple[float, float]:
    """Wall and processor seconds of a command."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **offline}, capture_output=True, text=True
    )
    wall = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def race(sides: dict[str, Command], few: int, many: int, turns: int) -> None:
    """Print what `many` pieces of work take less what `few` take, for each side and as ratios to
    the first.
    """
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, command in sides.items():
            short, long = seconds(command(few)), seconds(command(many))
            took[name].append((long[0] - short[0], long[1] - short[1]))
    medians = {
        name: tuple(statistics.median(column) for column in zip(*times, strict=True))
        for name, times in took.items()
    }
    first = next(iter(medians.values()))
    for name, (wall, cpu) in medians.items():
        ratio = f"ours is {first[0] / wall:.2f}x wall, {first[1] / cpu:.2f}x processor time"
        print(f"{name}: {wall:.1f} s wall, {cpu:.1f} s of processor time; {ratio}", flush=True)


def perplexity(options: argparse.Namespace) -> None:
    threads = str(options.threads)

    def ours(n: int) -> list[str]:
        command = [sys.executable, "-m", "evaluators.perplexity", options.file]
        return [*command, "--text", options.text, "--chunks", str(n), "--threads", threads]

    def theirs(n: int) -> list[str]:
        command = [options.peer, "-m", options.file, "-f", options.text, "-c", "512"]
        return [*command, "--chunks", str(n), "-t", threads]

    race({"ours": ours, "llama-perplexity": theirs}, 2, 2 + options.n, options.turns)


def memory(_: argparse.Namespace) -> None:
    from eval_fixtures import SPEC, TEXT, write_tiny

    program = (
        "import importlib, sys\nfrom evaluators import speed_probe\n"
        "status = importlib.import_module(sys.argv[1]).main(sys.argv[2:])\n"
        "print(speed_probe.peak_rss(), file=sys.stderr)\n"
        "sys.exit(status)"
    )
    with tempfile.TemporaryDirectory(prefix="quantkit-bench-") as scratch:
        spec = replace(SPEC, n_vocab=152_064, n_ctx_train=4096)
        base, text = write_tiny(Path(scratch, "base.gguf"), spec), Path(scratch, "text.txt")
        text.write_text(TEXT * 20)
        for name, arguments in (
            ("perplexity", ["--ctx", "512"]),
            ("kl", [str(base), "--ctx", "512"]),
            ("perplexity", ["--protocol", "gptq", "--ctx", "2048"]),
            ("perplexity", ["--ctx", "4096"]),
        ):
            command = [sys.executable, "-c", program, f"evaluators.{name}", str(base), *arguments]
            done = subprocess.run(
                [*command, "--text", str(text), "--chunks", "2"],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            )
            peak = int(done.stderr.split()[-1]) - base.stat().st_size
            said = " ".join(argument for argument in arguments if argument != str(base))
            print(f"{name} {said}: {peak / (1 << 20):.0f} MiB beyond the file", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--n", type=int, help="windows; default 12")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("perplexity")
    for name in ("peer", "file", "text"):
        one.add_argument(name)
    one.set_defaults(run=perplexity, default=12)
    commands.add_parser("memory").set_defaults(run=memory, default=0)
    options = parser.parse_args()
    options.n = options.n or options.default
    options.run(options)


if __name__ == "__main__":
    main()
