"""How fast the search judges candidates, on the shapes of a real model.

    python benchmarks/search_speed.py                              # the GPU, Llama-3.1-8B
    python benchmarks/search_speed.py --device cpu --model smollm2

Weights are random: every tensor repeats the same few random rows, so that its levels are written in
seconds and still stand for it. Measured are the plain forward of the model (logits included, no
KL), candidates evaluated over the whole depth and from the parent's cached states, the share of
time that is not forward, and a whole search of a profile's tokens. The report goes to standard
output, its numbers as JSON to --out.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quantkit.ggml import native
from quantkit.ggml.types import QuantType
from quantkit.model.blockwise import BlockwiseModel
from quantkit.model.row_maps import RowMap
from quantkit.search.allocation import SearchSpace
from quantkit.search.evopress import Schedule, begin, evolve
from quantkit.search.fitness import Fitness
from quantkit.search.mutate import mutate
from quantkit.search.propose import knapsack, nearby, uniform
from quantkit.tensors import Candidate

N_CTX, N_SEQUENCES, TILE = 512, 32, 64  # as many sequences as a search decides by

MODELS = {
    "llama-8b": (
        ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        {
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": False,
        },
    ),
    "smollm2": (
        ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
        {
            "vocab_size": 49_152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
}


@dataclass(frozen=True)
class World:
    """A model of random weights, its levels on disk, and what they are estimated to cost."""

    model: LlamaForCausalLM
    space: SearchSpace
    maps: dict[str, RowMap]
    costs: list[np.ndarray]
    folder: Path


def make_world(name: str, device: str, folder: Path, n_layers: int | None) -> World:
    """Every matrix is a tile of random rows, one after the other; its levels are the tile's."""
    levels, shapes = MODELS[name]
    if n_layers is not None:
        shapes = {**shapes, "num_hidden_layers": n_layers}
    config = LlamaConfig(**shapes, attn_implementation="sdpa")
    dtype = torch.bfloat16 if device == "cuda" or native_bf16() else torch.float32
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    rng = np.random.default_rng(0)
    files = {q: (folder / f"{q}.bin").open("wb") for q in map(QuantType, levels)}
    offsets = dict.fromkeys(files, 0)
    tensors, candidates, slots, costs = [], [], [], []
    maps: dict[str, RowMap] = {}
    for parameter, weight in model.named_parameters():
        if weight.dim() != 2:
            continue
        n_rows, n_columns = weight.shape
        tile = rng.standard_normal((TILE, n_columns), np.float32) / n_columns**0.5
        repeats = -(-n_rows // TILE)
        weight.copy_(torch.from_numpy(tile).repeat(repeats, 1)[:n_rows])
        own = []
        for qtype, file in files.items():
            packed = np.tile(native.quantize(tile, qtype), (repeats, 1))[:n_rows]
            place = file.name.rsplit("/", 1)[-1], offsets[qtype], packed.nbytes
            own.append(Candidate(parameter, qtype, "rtn", *place, 4.0**-qtype.bpw, None))
            file.write(packed)
            offsets[qtype] += packed.nbytes
        tensors.append(parameter)
        candidates.append(tuple(own))
        slots.append(tuple(c.n_bytes for c in own))
        price = n_rows * n_columns * rng.lognormal(0, 1)
        costs.append(np.array([price * c.error for c in own]))
        module = parameter.removesuffix(".weight")
        maps[parameter] = RowMap(parameter, parameter, False, None, module, "embed" in parameter)
    for file in files.values():
        file.close()
    largest = sum(row[-1] for row in slots)
    space = SearchSpace(tuple(tensors), tuple(candidates), tuple(slots), 0, largest)
    middle = space.n_bytes(np.full(len(tensors), 2)) + largest // 100
    return World(model, replace(space, limit_bytes=middle), maps, costs, folder)


def native_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


class Clock:
    """Seconds of the device's work, and what was noted."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.numbers: dict[str, float] = {}

    def seconds(self, work: Callable[[], object]) -> float:
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def note(self, name: str, value: float, unit: str) -> None:
        self.numbers[f"{name} [{unit}]"] = value
        print(f"{name:58} {value:12.4g} {unit}", flush=True)


def plain_forward(model: LlamaForCausalLM, ids: torch.Tensor, n_batch: int) -> Callable[[], None]:
    """The model's own forward, all logits included."""

    @torch.no_grad()
    def work() -> None:
        for first in range(0, len(ids), n_batch):
            model(ids[first : first + n_batch], use_cache=False)

    return work


def measure(clock: Clock, world: World, ids: np.ndarray, n_tokens: int) -> None:
    """On a CPU, whose clock depends on what it did before, plain passes and candidates take turns,
    for which there is a second model; on a GPU the plain passes come first.
    """
    device = clock.device
    on_device = torch.from_numpy(ids).to(device)
    n = min(len(ids), 16 if device == "cuda" else 4)
    own = world.model if device == "cuda" else copy.deepcopy(world.model)
    plain = plain_forward(own, on_device[:n], {"cuda": 8, "cpu": 2}[device])
    plain()
    plain_seconds = [clock.seconds(plain) for _ in range(3)] if device == "cuda" else []
    made: list[Fitness] = []
    model = BlockwiseModel(world.model)
    levels = {path.name: path for path in world.folder.glob("*.bin")}
    arguments = (world.space, world.maps, levels, ids, world.folder / "targets")
    clock.note("targets", clock.seconds(lambda: made.append(Fitness(model, *arguments))), "s")
    fitness, space = made[0], world.space
    rng = np.random.default_rng(1)
    parent = knapsack(space, world.costs)

    # Children as the search makes them, without a parent whose states could be used.
    children = [child(space, parent, world.costs, rng) for _ in range(6)]
    fitness.kl(parent, 0, n)
    for other in children:  # as in a search, whose children share most of their moves
        fitness.kl(other, 0, n)
    load, taken, swapped = [], [], 0
    for other in children:
        if device == "cpu":
            plain_seconds.append(clock.seconds(plain))
        swapped += int((other != parent).sum())
        load.append(clock.seconds(lambda other=other: fitness._weights.load(other)))
        taken.append(load[-1] + clock.seconds(lambda other=other: fitness.kl(other, 0, n)))
    plain_rate, rate = (n * N_CTX / statistics.median(t) for t in (plain_seconds, taken))
    clock.note("plain forward", plain_rate, "tokens/s")
    clock.note("candidates, whole depth, exact KL", rate, "tokens/s")
    clock.note("... of the plain forward", rate / plain_rate, "ratio")
    share = sum(load) / sum(taken)
    clock.note(f"... putting in {swapped / len(children):.0f} tensors each", share, "share")

    fitness.set_parent(parent)
    fitness.kl(parent, 0, n)
    cached = clock.seconds(lambda: [fitness.kl(other, 0, n) for other in children])
    clock.note("... from the parent's states", len(children) * n * N_CTX / cached, "tokens/s")
    mutations = clock.seconds(lambda: [child(space, parent, world.costs, rng) for _ in range(12)])
    clock.note("making 12 children", mutations, "s")

    plan = Schedule.of(n_tokens, fitness.n_sequences, fitness.n_batch)
    proposals = [(parent, "knapsack"), *((c, "uniform") for c in uniform(space, world.costs))]

    def search() -> None:
        state = begin(fitness, plan, proposals, 0)
        end = evolve(space, fitness, world.costs, plan, state, lambda _: None)
        clock.note("search: generations", end.generation, "")
        clock.note("search: tokens", end.n_tokens, "")
        clock.note("search: KL at first", state.best.kl, "nats")
        clock.note("search: KL at last", end.best.kl, "nats")

    clock.note("search: time", clock.seconds(search), "s")
    if device == "cuda":
        clock.note("peak GPU memory", torch.cuda.max_memory_allocated() / 1e9, "GB")


def child(
    space: SearchSpace, parent: np.ndarray, costs: list[np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """As `evolve` makes them: by mutation, or by the knapsack nearby at shaken prices."""
    if rng.random() < 0.5:
        return mutate(space, parent, costs, rng, 1 + int(rng.integers(3)))
    shaken = [c * rng.lognormal(0, 0.7) for c in costs]
    return nearby(space, parent, shaken, int(rng.integers(2, max(3, len(parent) // 4))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=MODELS, default="llama-8b")
    parser.add_argument("--layers", type=int, help="fewer blocks than the model has")
    parser.add_argument("--tokens", type=int, default=524_288, help="of the search")
    parser.add_argument("--folder", type=Path, help="for the levels, 23 GB at 8B")
    parser.add_argument("--out", type=Path, help="numbers as JSON")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    clock = Clock(arguments.device)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        start = time.perf_counter()
        world = make_world(arguments.model, arguments.device, Path(folder), arguments.layers)
        clock.note("making the model and its levels", time.perf_counter() - start, "s")
        n_vocab = world.model.config.vocab_size
        ids = np.random.default_rng(2).integers(0, n_vocab, (N_SEQUENCES, N_CTX))
        measure(clock, world, ids, arguments.tokens)
    if arguments.out:
        arguments.out.write_text(json.dumps(clock.numbers, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
