"""How much faster search and tune are on several devices, on the shapes of a real model.

    python benchmarks/ranks_speed.py --layers 8
    torchrun --standalone --nproc-per-node 2 benchmarks/ranks_speed.py --layers 8
    torchrun --standalone --nproc-per-node 2 benchmarks/ranks_speed.py --device cpu --model smollm2

Weights are those of `search_speed.py`. Every process makes them, and reads its own levels; rank 0
searches, as the stage does, and all tune the first blocks at one type. Rank 0 prints the numbers:
beside those of one process they say what the ranks are worth, and KL and errors that they agree.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from search_speed import MODELS, N_CTX, N_SEQUENCES, World, make_world

from quantkit.errors import QuantkitError
from quantkit.ggml.types import QuantType
from quantkit.machine import faults
from quantkit.model.blockwise import BlockwiseModel
from quantkit.ranks.group import Ranks
from quantkit.ranks.join import joined, serve
from quantkit.search.distributed import DistributedEvaluator, follow
from quantkit.search.evopress import Schedule, begin, evolve
from quantkit.search.fitness import Fitness
from quantkit.search.propose import knapsack, uniform
from quantkit.tuning.tuner import Effort, Stored, Tuner


@dataclass(frozen=True)
class Asked:
    """What is measured; the same in every process."""

    world: World
    blocks: int
    steps: int
    tokens: int

    @property
    def ids(self) -> np.ndarray:
        n_vocab = self.world.model.config.vocab_size
        n_train = max(2, 2 * self.steps // 3)
        shape = N_SEQUENCES + n_train, N_CTX
        return np.random.default_rng(2).integers(0, n_vocab, shape)


class Clock:
    """Seconds of a device's work."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self.numbers = ranks, dict[str, float]()

    def note(self, name: str, value: float, unit: str) -> None:
        self.numbers[f"{name} [{unit}]"] = value
        if not self._ranks.rank:
            print(f"{name:58} {value:12.6g} {unit}", flush=True)

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        found = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.note(name, time.perf_counter() - begun, "s")
        return found


def tune(ranks: Ranks, asked: Asked, clock: Clock) -> None:
    """All ranks at once."""
    world, qtype = asked.world, QuantType("Q4_K" if "Q4_K" in str(asked.world.space) else "Q4_0")
    stored = {}
    for name, of_tensor in zip(world.space.tensors, world.space.candidates, strict=True):
        c = next(c for c in of_tensor if c.qtype == qtype)
        packed = np.fromfile(world.folder / c.file, np.uint8, c.n_bytes, offset=c.offset)
        n_columns = world.model.get_parameter(name).shape[1]
        stored[name] = Stored(qtype, packed.reshape(-1, qtype.row_bytes(n_columns)))
    ids = torch.from_numpy(asked.ids)
    model = BlockwiseModel(copy.deepcopy(world.model).float())
    effort, scratch = Effort(asked.steps, 2), world.folder / "tuning"
    scratch.mkdir()
    tuner = clock.time(
        "tune: embedding",
        lambda: Tuner(
            model,
            world.maps,
            stored,
            ids[N_SEQUENCES:],
            ids[:N_SEQUENCES],
            effort,
            scratch,
            exact=False,
            ranks=ranks,
        ),
    )
    for index in range(asked.blocks):
        block = clock.time(f"tune: block {index + 1}", lambda index=index: tuner.block(index))
        clock.note("... its error before", block.before, "")
        clock.note("... and after", block.after, "")


def search(ranks: Ranks, asked: Asked, clock: Clock) -> None:
    world = asked.world
    levels = {path.name: path for path in world.folder.glob("*.bin")}
    model, targets = BlockwiseModel(world.model), world.folder / "targets"
    ids = asked.ids[:N_SEQUENCES]
    fitness = clock.time(
        "search: the base's distributions",
        lambda: Fitness(model, world.space, world.maps, levels, ids, targets, ranks),
    )
    if ranks.rank:
        follow(ranks, fitness)
        return
    evaluator = DistributedEvaluator(ranks, fitness)
    plan = Schedule.of(asked.tokens, evaluator.n_sequences, evaluator.n_batch)
    parent = knapsack(world.space, world.costs)
    proposals = [(parent, "knapsack"), *((c, "uniform") for c in uniform(world.space, world.costs))]
    first = clock.time("search: proposals", lambda: begin(evaluator, plan, proposals, 0))
    rest = world.space, evaluator, world.costs, plan, first, lambda _: None
    last = clock.time("search: generations", lambda: evolve(*rest))
    clock.note("... their tokens", last.n_tokens - first.n_tokens, "")
    clock.note("... their number", last.generation, "")
    clock.note("... KL at last", last.best.kl, "nats")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=MODELS, default="llama-8b")
    parser.add_argument("--layers", type=int, help="fewer blocks than the model has")
    parser.add_argument("--blocks", type=int, default=3, help="that are tuned")
    parser.add_argument("--steps", type=int, default=200, help="of tuning a block")
    parser.add_argument("--tokens", type=int, default=524_288, help="of the search")
    parser.add_argument("--folder", type=Path, help="for the levels: 23 GB a process at 8B")
    parser.add_argument("--out", type=Path, help="numbers as JSON")
    given = parser.parse_args()
    with joined(given.device) as ranks, tempfile.TemporaryDirectory(dir=given.folder) as folder:
        torch.manual_seed(0)
        world = make_world(given.model, given.device, Path(folder), given.layers)
        asked = Asked(world, given.blocks, given.steps, given.tokens)
        clock = Clock(ranks)
        if ranks.rank:
            tasks = {
                "tune": lambda ranks, _: tune(ranks, asked, clock),
                "search": lambda ranks, _: search(ranks, asked, clock),
            }
            serve(ranks, tasks, lambda e: faults.explain(e) or QuantkitError(repr(e)))
        with ranks.task("tune"):
            tune(ranks, asked, clock)
        with ranks.session("search"):
            search(ranks, asked, clock)
        if torch.cuda.is_available():
            clock.note("peak GPU memory", torch.cuda.max_memory_allocated() / 1e9, "GB")
        if given.out:
            given.out.write_text(json.dumps(clock.numbers, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
