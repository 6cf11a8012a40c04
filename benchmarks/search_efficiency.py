"""KL against tokens evaluated: our search, plain EvoPress, the knapsack alone and random search.

    python benchmarks/search_efficiency.py RUN [--seeds 3] [--device cuda] [--out FOLDER]

RUN is the folder of a run that has its levels (`quantkit run`, not cleaned). All searches have the
same levels, budget and tokens to judge by: the run's held-out sequences but the last quarter, on
which every search's best answer is judged in the end, uncounted.

Plain EvoPress is that of the EvoPress paper's code as its GGUF toolkit ships it (github.com,
IST-DASLab/gptq-gguf-toolkit, evopress/): it starts with the best of 10 random allocations; every
generation 128 offspring differ from the parent by one to three level switches (the smaller of two
draws from 1 to 3), are judged on 2,048, then 16,384, then 131,072 random tokens (here at most all
there are), and 16, 4 and 1 survive, the parent among them. A switch raises one tensor by a level
and lowers others until the file fits. Random search is its first step for ever.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from quantkit.gguf_file.base import load_base
from quantkit.sources.snapshot import load_snapshot

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from safetensors.numpy import load_file

from quantkit.config import RunConfig
from quantkit.evidence.report.render import COLORS, FONT, Spec, pictures
from quantkit.model.blockwise import BlockwiseModel, compute_dtype, load_model
from quantkit.model.row_maps import load_row_maps
from quantkit.run.events import EventLog
from quantkit.run.folder import RunDir, read_json
from quantkit.run.stage import Run
from quantkit.search.allocation import Choices, SearchSpace, pruned
from quantkit.search.evopress import Schedule, SearchState, begin, evolve
from quantkit.search.fitness import Fitness
from quantkit.search.propose import estimated_costs, knapsack, uniform
from quantkit.stages.search import make_space

N_OFFSPRING, SURVIVORS, TOKENS, N_FIRST = 128, (16, 4, 1), (2048, 16_384, 131_072), 10


@dataclass(frozen=True)
class Point:
    """The best answer after so many evaluated tokens."""

    n_tokens: int
    choices: Choices


class Judge:
    """An evaluator that counts tokens, with sequences set aside for the last word."""

    def __init__(self, fitness: Fitness) -> None:
        self._fitness = fitness
        self.n_ctx, self.n_batch = fitness.n_ctx, fitness.n_batch
        batches = fitness.n_sequences // self.n_batch
        self.n_sequences = (batches - max(1, batches // 4)) * self.n_batch
        self.n_tokens = 0

    def kl_of(self, candidates: list[Choices], first: int, last: int) -> list[np.ndarray]:
        self.n_tokens += len(candidates) * (last - first) * self.n_ctx
        return self._fitness.kl_of(candidates, first, last)

    def set_parent(self, choices: Choices) -> None:
        self._fitness.set_parent(choices)

    def last_word(self, choices: Choices) -> float:
        """Mean KL on the sequences that no search has seen."""
        return float(self.samples(choices).mean())

    def samples(self, choices: Choices) -> np.ndarray:
        """KL of every part of these sequences, (n_sequences, parts)."""
        whole = self._fitness.n_sequences // self.n_batch * self.n_batch
        return self._fitness.kl(choices, self.n_sequences, whole)


def ours(judge: Judge, space: SearchSpace, n_tokens: int, seed: int) -> Iterator[Point]:
    """Without the stock mixes that a run also proposes."""
    costs = estimated_costs(space)
    plan = Schedule.of(n_tokens, judge.n_sequences, judge.n_batch)
    first = [(knapsack(space, costs), "knapsack")]
    first += [(choices, "uniform") for choices in uniform(space, costs)]
    state = begin(judge, plan, first, seed)
    points = [Point(state.n_tokens, np.array(state.best.choices))]

    def note(state: SearchState) -> None:
        points.append(Point(state.n_tokens, np.array(state.best.choices)))

    evolve(space, judge, costs, plan, state, note)
    yield from points


def random_allocation(space: SearchSpace, rng: np.random.Generator) -> Choices:
    """From the largest file down, a random tensor a level at a time, until it fits."""
    choices = space.largest.copy()
    while not space.fits(choices):
        lower(space, choices, rng)
    return choices


def lower(space: SearchSpace, choices: Choices, rng: np.random.Generator) -> None:
    choices[rng.choice(np.flatnonzero(choices > 0))] -= 1


def switched(space: SearchSpace, parent: Choices, rng: np.random.Generator) -> Choices:
    """EvoPress's mutation on bytes."""
    child = parent.copy()
    for _ in range(min(rng.integers(1, 4), rng.integers(1, 4))):
        can_rise = np.flatnonzero(child < space.n_choices - 1)
        if len(can_rise):
            child[rng.choice(can_rise)] += 1
        while not space.fits(child):
            lower(space, child, rng)
    return child


def some_tokens(judge: Judge, n_tokens: int, rng: np.random.Generator) -> tuple[int, int]:
    """A random stretch of whole batches with about so many tokens."""
    per_batch = judge.n_batch * judge.n_ctx
    n = min(max(1, n_tokens // per_batch), judge.n_sequences // judge.n_batch)
    first = int(rng.integers(judge.n_sequences // judge.n_batch - n + 1))
    return first * judge.n_batch, (first + n) * judge.n_batch


def best_of(
    judge: Judge, candidates: list[Choices], first: int, last: int, n: int
) -> list[Choices]:
    kl = [float(scores.mean()) for scores in judge.kl_of(candidates, first, last)]
    return [candidates[i] for i in np.argsort(kl)[:n]]


def evopress(judge: Judge, space: SearchSpace, n_tokens: int, seed: int) -> Iterator[Point]:
    rng = np.random.default_rng(seed)
    start = judge.n_tokens
    starts = [random_allocation(space, rng) for _ in range(N_FIRST)]
    (parent,) = best_of(judge, starts, 0, judge.n_sequences, 1)
    yield Point(judge.n_tokens - start, parent)
    while judge.n_tokens - start < n_tokens:
        judge.set_parent(parent)
        left = [switched(space, parent, rng) for _ in range(N_OFFSPRING)]
        for n_kept, tokens in zip(SURVIVORS, TOKENS, strict=True):
            if not any(bool((c == parent).all()) for c in left):
                left = [parent, *left]
            left = best_of(judge, left, *some_tokens(judge, tokens, rng), n_kept)
        parent = left[0]
        yield Point(judge.n_tokens - start, parent)


def at_random(judge: Judge, space: SearchSpace, n_tokens: int, seed: int) -> Iterator[Point]:
    rng = np.random.default_rng(seed)
    start, best = judge.n_tokens, random_allocation(space, rng)
    while judge.n_tokens - start < n_tokens:
        both = [best, random_allocation(space, rng)]
        (best,) = best_of(judge, both, 0, judge.n_sequences, 1)
        yield Point(judge.n_tokens - start, best)


def curve(points: Iterator[Point], judge: Judge) -> list[tuple[int, float]]:
    """The last word on every new best, by tokens."""
    found: list[tuple[int, float]] = []
    before: Choices | None = None
    for point in points:
        if before is None or bool((before != point.choices).any()):
            found.append((point.n_tokens, judge.last_word(point.choices)))
        else:
            found.append((point.n_tokens, found[-1][1]))
        before = point.choices
    return found


def tokens_to(found: list[tuple[int, float]], kl: float) -> int | None:
    """Tokens after which a search is at `kl` or below for good."""
    for i, (n_tokens, _) in enumerate(found):
        if all(later <= kl for _, later in found[i:]):
            return n_tokens
    return None


def draw(curves: dict[str, list[list[tuple[int, float]]]]) -> Spec:
    """Both axes logarithmic; one line a search and seed."""
    points = [
        {"search": name, "seed": seed, "tokens": n, "kl": kl}
        for name, runs in curves.items()
        for seed, points in enumerate(runs)
        for n, kl in points
        if n > 0
    ]
    log = {"type": "log", "nice": False}
    x = {"field": "tokens", "scale": log, "title": "tokens evaluated"}
    y = {"field": "kl", "scale": log, "title": "mean KL divergence, nats, unseen text"}
    return {
        "description": "KL divergence over tokens evaluated",
        "width": 480,
        "height": 280,
        "background": COLORS["card"],
        "config": {"font": FONT},
        "data": {"values": points},
        "mark": "line",
        "encoding": {
            "x": {**x, "type": "quantitative", "axis": {"format": "~s"}},
            "y": {**y, "type": "quantitative", "axis": {"format": "~r"}},
            "color": {"field": "search", "type": "nominal", "title": None},
            "detail": {"field": "seed"},
        },
    }


def judge_of(folder: Path, device: str, prune: bool = True) -> tuple[Judge, SearchSpace]:
    """A judge of a finished run's levels, and the space of their choices, with `prune` without
    those that others of their tensor beat.
    """
    directory = RunDir(folder.absolute())
    config = replace(RunConfig.from_json(read_json(directory.config_path)), device=device)
    run = Run(config, directory, EventLog(Path(os.devnull)))
    space = make_space(run, load_base(directory))
    space = pruned(space) if prune else space
    model = load_model(load_snapshot(directory).folder, compute_dtype(device), device)
    maps = load_row_maps(directory.artifacts.row_maps)
    ids = load_file(directory.artifacts.tokens)["heldout"]
    scratch = Path(tempfile.mkdtemp(prefix="targets-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    root = directory.artifacts.levels
    levels = {c.file: root / c.file for of_tensor in space.candidates for c in of_tensor}
    fitness = Fitness(BlockwiseModel(model), space, maps, levels, ids, scratch / "targets")
    return Judge(fitness), space


def n_weights(folder: Path) -> int:
    return load_base(RunDir(folder.absolute())).n_elements


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bpw", type=float, default=4.5, help="the budget")
    parser.add_argument("--tokens", type=int, default=524_288, help="of our search")
    parser.add_argument("--plain", type=int, default=10_000_000, help="of plain EvoPress")
    parser.add_argument("--random", type=int, default=1_000_000, help="of random search")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="folder for efficiency.json and .svg")
    arguments = parser.parse_args()
    judge, space = judge_of(arguments.run, arguments.device)
    space = replace(space, limit_bytes=int(arguments.bpw * n_weights(arguments.run) / 8))
    print(
        f"{len(space.tensors)} tensors, {judge.n_sequences * judge.n_ctx:,} tokens to judge by,"
        f" budget {space.limit_bytes:,} bytes",
        flush=True,
    )
    kl = judge.last_word(knapsack(space, estimated_costs(space)))
    curves: dict[str, list[list[tuple[int, float]]]] = {
        "knapsack": [[(1000, kl), (arguments.plain, kl)]]
    }
    print(f"knapsack alone: KL {kl:.5f}", flush=True)
    searches = {
        "ours": lambda seed: ours(judge, space, arguments.tokens, seed),
        "EvoPress": lambda seed: evopress(judge, space, arguments.plain, seed),
        "random": lambda seed: at_random(judge, space, arguments.random, seed),
    }
    for name, search in searches.items():
        curves[name] = []
        for seed in range(arguments.seeds):
            found = curve(search(seed), judge)
            curves[name].append(found)
            n, kl = found[-1]
            print(
                f"{name}, seed {seed}: {len(found)} points, {n:,} tokens, KL {kl:.5f}", flush=True
            )
    last = float(np.mean([runs[-1][1] for runs in curves["EvoPress"]]))
    reached = [tokens_to(found, last) for found in curves["ours"]]
    said = ", ".join("not reached" if n is None else f"{n:,}" for n in reached)
    print(f"ours is at EvoPress's last KL, {last:.5f}, after so many tokens: {said}")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        values = {"curves": curves, "tokens_to_the_last_of_evopress": reached}
        (arguments.out / "efficiency.json").write_text(json.dumps(values) + "\n", "utf-8")
        (arguments.out / "efficiency.svg").write_text(pictures(draw(curves))[0], "utf-8")


if __name__ == "__main__":
    main()
