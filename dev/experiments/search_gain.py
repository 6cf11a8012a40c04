"""What the search adds to our own uniform files and to the knapsack alone, at and between levels.

    python dev/experiments/search_gain.py RUN [--seeds 3] [--device cuda] [--out FILE]

RUN is the folder of a run that has its levels (`quantkit run`, not cleaned). The budgets are the
sizes of all uniform files of its levels, and those half way between them. At each, three things are
judged on sequences that no search has seen: the best uniform file that fits, the bytes that it
leaves spent greedily; the knapsack on the estimated costs; the search, with several seeds.
Differences are paired by sequence.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import numpy as np
from search_efficiency import Judge, judge_of

from quantkit.config import PROFILES
from quantkit.search.allocation import Choices, SearchSpace
from quantkit.search.evopress import Schedule, begin, evolve
from quantkit.search.propose import Costs, estimated_costs, knapsack, uniform


def budgets(space: SearchSpace) -> list[tuple[str, int]]:
    """Sizes of uniform steps that differ by more than a percent, and those half way between."""
    steps = [np.minimum(k, space.n_choices - 1) for k in range(int(space.n_choices.max()))]
    sizes: list[int] = []
    for n_bytes in sorted(space.n_bytes(step) for step in steps):
        if not sizes or n_bytes > 1.01 * sizes[-1]:
            sizes.append(n_bytes)
    found = [("level", n) for n in sizes]
    found += [("between", (a + b) // 2) for a, b in zip(sizes, sizes[1:], strict=False)]
    return sorted(found, key=lambda item: item[1])


def search(judge: Judge, space: SearchSpace, costs: Costs, n_tokens: int, seed: int) -> Choices:
    plan = Schedule.of(n_tokens, judge.n_sequences, judge.n_batch)
    first = [(knapsack(space, costs), "knapsack")]
    first += [(choices, "uniform") for choices in uniform(space, costs)]
    state = begin(judge, plan, first, seed)
    state = evolve(space, judge, costs, plan, state, lambda _: None)
    return np.array(state.best.choices)


def beside(samples: np.ndarray, other: np.ndarray) -> str:
    """How much lower than another, in percent of it, with the standard error of sequences."""
    saved = (other - samples).mean(1)
    mean, error = saved.mean(), saved.std(ddof=1) / np.sqrt(len(saved))
    return f"{100 * mean / other.mean():5.1f} ± {100 * error / other.mean():.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--profile", choices=PROFILES, default="standard")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="numbers as JSON")
    arguments = parser.parse_args()
    judge, whole = judge_of(arguments.run, arguments.device)
    rows = []
    print(
        "| budget | bytes | uniform | knapsack | ours, by seed | below uniform | below knapsack |"
    )
    print("|---|---:|---:|---:|---|---|---|", flush=True)
    for name, n_bytes in budgets(whole):
        space = replace(whole, limit_bytes=n_bytes)
        costs = estimated_costs(space)
        uniforms = [judge.samples(choices) for choices in uniform(space, costs)]
        best = min(uniforms, key=lambda s: float(s.mean()))
        alone = judge.samples(knapsack(space, costs))
        n_tokens = PROFILES[arguments.profile].search_tokens
        ours = [
            judge.samples(search(judge, space, costs, n_tokens, seed))
            for seed in range(arguments.seeds)
        ]
        mean = np.mean(ours, axis=0)
        shown = " ".join(f"{s.mean():.5f}" for s in ours)
        print(
            f"| {name} | {n_bytes:,} | {best.mean():.5f} | {alone.mean():.5f} | {shown}"
            f" | {beside(mean, best)} | {beside(mean, alone)} |",
            flush=True,
        )
        kl = {"uniform": best.mean(), "knapsack": alone.mean()}
        kl |= {f"seed {seed}": s.mean() for seed, s in enumerate(ours)}
        rows.append({"budget": name, "n_bytes": n_bytes, "kl": kl})
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
