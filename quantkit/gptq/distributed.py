"""Quantize on several ranks: each runs its share of the batches and solves its share of a unit's
tensors, as rank 0 does. Rank 0 alone has level files and writes to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file

from quantkit.config import PROFILES, RunConfig
from quantkit.config.levels import LevelPlan
from quantkit.files import PARTIAL
from quantkit.ggml.types import QuantType
from quantkit.gguf_file.read import GgufFile
from quantkit.gptq.donors import Donor
from quantkit.gptq.units import Unit, Work
from quantkit.model.row_maps import load_row_maps
from quantkit.model.streaming import open_model
from quantkit.ranks.group import Ranks
from quantkit.run.stage import Run
from quantkit.sandbox.untrusted import build
from quantkit.sources.snapshot import Place, load_quantized
from quantkit.statistics.collect import walk
from quantkit.statistics.inputs import BlockStatistics
from quantkit.statistics.stored import embedding_file, fisher_file, load_gradients
from quantkit.tensors import to_json

EMBEDDING = "embedding"  # the unit of the table of embeddings, whose inputs are gradients


@dataclass(frozen=True)
class _Told:
    """What the others are told when the stage begins; `types` are those of every tensor at each of
    the levels.
    """

    config: RunConfig
    model: Place
    dtype: str
    levels: tuple[str, ...]
    types: dict[str, tuple[str, ...]]
    donors: tuple[str, ...]
    carried: tuple[str, ...]


def told(run: Run, work: Work, dtype: torch.dtype) -> Any:
    """Return what the others are told, as JSON."""
    plan = work.plan
    types = {
        name: tuple(str(of_level[level]) for level in plan.levels)
        for name, of_level in plan.types.items()
    }
    return to_json(
        _Told(
            run.config,
            Place.of(load_quantized(run.dir)),
            str(dtype).removeprefix("torch."),
            tuple(map(str, plan.levels)),
            types,
            tuple(donor.method for donor in work.donors),
            tuple(work.carried),
        )
    )


def files(run: Run, work: Work) -> list[Path]:
    """Return the files that all ranks read."""
    made = run.artifacts
    gradients = fisher_file(made.gradients), embedding_file(made.gradients)
    return [
        made.tokens,
        made.base,
        made.row_maps,
        *gradients,
        *(donor.file.path for donor in work.donors),
        *work.carried.values(),
    ]


def statistics_of(unit: str, work: Work) -> list[BlockStatistics] | None:
    """Return the statistics of a unit beside the blocks and the head; None where nothing is known
    of its inputs.
    """
    return [BlockStatistics((work.gradients.lookups,))] if unit == EMBEDDING else None


def take_part(ranks: Ranks, payload: Any) -> None:
    """Do another rank's share of the stage."""
    begun = build(_Told, payload)
    tokens, base, maps, fisher, embedding, *others = ranks.local([])
    donors, carried = others[: len(begun.donors)], others[len(begun.donors) :]
    levels = tuple(map(QuantType, begun.levels))
    types = {
        name: dict(zip(levels, map(QuantType, own), strict=True))
        for name, own in begun.types.items()
    }
    work = Work(
        config=begun.config,
        n_sweeps=PROFILES[begun.config.profile].n_sweeps,
        base=GgufFile(base),
        plan=LevelPlan(levels, types, ()),
        files={},
        donors=[
            Donor(name, GgufFile(path)) for name, path in zip(begun.donors, donors, strict=True)
        ],
        maps=load_row_maps(maps),
        carried=dict(zip(begun.carried, carried, strict=True)),
        gradients=load_gradients(fisher, embedding),
        ranks=ranks,
    )

    def solve(name: str, turns: Iterable[BlockStatistics] | None) -> None:
        Unit(work).solve_all(name, turns)

    def run_blocks(done: list[str]) -> None:
        dtype, folder = getattr(torch, begun.dtype), begun.model.find()
        model = open_model(folder, dtype, begun.config.device)
        spill = ranks.scratch()
        assert spill is not None
        walk(model, load_file(tokens), done, solve, spill / f"activations{PARTIAL}", ranks)

    ranks.follow({"walk": run_blocks, "solve": lambda name: solve(name, statistics_of(name, work))})
