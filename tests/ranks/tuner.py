"""What `test_shards.py` runs as two processes: `tuner.py FOLDER` tunes the blocks of a small model
on both and writes what came out of it.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from test_tuning import World

from quantkit.errors import QuantkitError
from quantkit.files import write_json
from quantkit.ggml import native
from quantkit.ggml.types import QuantType
from quantkit.model.blockwise import BlockwiseModel
from quantkit.ranks.group import Ranks
from quantkit.ranks.join import joined, serve
from quantkit.tuning.tuner import Effort, Stored, TunedBlock, Tuner

EFFORT = Effort(n_steps=12, n_batch=4, rate_codes=2e-2)


def odd_world(folder: Path) -> World:
    """One parameter is two tensors, of which one has all of its rows on one rank, and the other is
    not tuned in a block; one tensor is its parameter's transpose.
    """
    folder.mkdir(parents=True)
    world = World(folder)
    for block in range(3):
        name = f"model.layers.{block}.mlp.gate_proj.weight"
        map_, stored = world.maps.pop(name), world.stored.pop(name)
        rows = torch.arange(256) if map_.rows is None else map_.rows.sort().values
        weight = world.model.get_parameter(name)
        for part, own in (("a", rows[:80]), ("b", rows[80:])):
            qtype = QuantType("F16") if (block, part) == (1, "b") else stored.qtype
            packed = native.quantize(weight[own].contiguous().numpy(), qtype)
            world.maps[f"{name}.{part}"] = replace(map_, tensor=f"{name}.{part}", rows=own)
            world.stored[f"{name}.{part}"] = Stored(qtype, packed)
        name = f"model.layers.{block}.self_attn.o_proj.weight"
        turned = world.model.get_parameter(name).T.contiguous().numpy()
        world.maps[name] = replace(world.maps[name], rows=None, transposed=True)
        world.stored[name] = Stored(QuantType("Q4_0"), native.quantize(turned, QuantType("Q4_0")))
    return world


def tune(ranks: Ranks, folder: Path, known: TunedBlock | None = None) -> None:
    """Tune all blocks; rank 0 writes the errors, the KL and what the blocks became."""
    world = odd_world(folder / str(ranks.rank))
    model, scratch = BlockwiseModel(world.model), world.folder / "scratch"
    scratch.mkdir()
    rest = world.train, world.heldout, EFFORT, scratch
    tuner = Tuner(model, world.maps, world.stored, *rest, exact=True, ranks=ranks)
    blocks = [tuner.block(0, known), *(tuner.block(i) for i in range(1, tuner.n_blocks))]
    kl = tuner.kl()
    if ranks.rank == 0:
        errors = [(block.before, block.after) for block in blocks]
        write_json(folder / "found.json", {"kl": kl, "errors": errors})
        arrays = {f"{i}/{n}": rows for i, b in enumerate(blocks) for n, rows in b.rows.items()}
        np.savez(folder / "found.npz", **arrays)


def load(folder: Path) -> TunedBlock | None:
    """The first block, as another run left it in `folder`."""
    path = folder / "known.npz"
    if not path.exists():
        return None
    with np.load(path) as arrays:
        return TunedBlock(0.5, 0.25, {n[2:]: arrays[n] for n in arrays if n.startswith("0/")})


def main(folder: Path) -> int:
    with joined("cpu") as ranks:
        if ranks.rank:
            tasks = {"tune": lambda ranks, _: tune(ranks, folder)}
            serve(ranks, tasks, lambda error: QuantkitError(f"bug: {error!r}"))
        with ranks.task("tune"):
            tune(ranks, folder, load(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
