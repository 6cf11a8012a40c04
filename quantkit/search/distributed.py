"""Judge candidates on all ranks. Rank 0 searches; every rank has a model, the levels and the
base's distributions, and does a fixed share of what rank 0 tells it.

A batch is judged on one rank alone, from the same weights and hidden states as anywhere: on a CPU
no number depends on how many ranks there are, on a GPU the last bits do, as its kernels choose by
the size of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from quantkit.model.row_maps import load_row_maps
from quantkit.model.streaming import open_model
from quantkit.ranks.group import Ranks
from quantkit.sandbox.untrusted import build
from quantkit.search.allocation import Choices, SearchSpace
from quantkit.search.fitness import CHUNKS, Fitness, part_of
from quantkit.search.optimizer import MOST_SEQUENCES, Evaluator
from quantkit.sources.snapshot import Place
from quantkit.tensors import to_json

TASK = "search"


@dataclass(frozen=True)
class Setting:
    """What candidates are judged with. Paths are rank 0's."""

    space: SearchSpace
    model: Place
    row_maps: str
    tokens: str
    levels: dict[str, str]  # the files that the space's candidates lie in, by the names they give
    scratch: str
    device: str
    dtype: str  # of products, as torch calls it


@dataclass(frozen=True)
class _Asked:
    """Candidates to be judged on the sequences first..last."""

    candidates: tuple[tuple[int, ...], ...]
    first: int
    last: int


@dataclass(frozen=True)
class _Share:
    """What one rank does of that: these candidates, on the sequences first..last."""

    candidates: tuple[int, ...]
    first: int
    last: int


def share_of(rank: int, size: int, asked: _Asked, n_batch: int, n_unit: int) -> _Share:
    """Return the share of a rank. One batch is shared out by candidates, more by sequences: then
    every rank keeps the parent's hidden states of its own sequences alone. The parent, judged by
    itself, is judged by every rank whose candidates begin from it.
    """
    everyone = tuple(range(len(asked.candidates)))
    if asked.last - asked.first > n_batch:
        return _Share(everyone, *part_of(rank, size, asked.first, asked.last, n_unit))
    own = everyone if len(everyone) == 1 else everyone[rank::size]
    return _Share(own, asked.first, asked.last)


class DistributedEvaluator:
    """Rank 0's evaluator: tells the others what is asked, and puts their answers together."""

    def __init__(self, ranks: Ranks, fitness: Fitness) -> None:
        self._ranks, self._fitness = ranks, fitness
        self.n_sequences, self.n_ctx = fitness.n_sequences, fitness.n_ctx
        self.n_batch = fitness.n_batch

    def kl_of(self, candidates: Sequence[Choices], first: int, last: int) -> list[np.ndarray]:
        """Return the KL of each candidate on the sequences first..last: float64 (last - first,
        CHUNKS), in nats per token.

        Raises ValueError for a part of a batch.
        """
        if first % self.n_batch or (last % self.n_batch and last < self.n_sequences):
            raise ValueError(f"sequences {first} to {last} are not whole batches")
        asked = _Asked(tuple(tuple(c.tolist()) for c in candidates), first, last)
        with self._ranks.task("judge", to_json(asked)):
            answers = _judge(self._ranks, self._fitness, asked)
        found = [np.zeros((last - first, CHUNKS)) for _ in candidates]
        # Of what several have judged, rank 0's own word counts.
        for rank, answer in reversed(list(enumerate(answers))):
            share = _share(self._ranks, self._fitness, asked, rank)
            for i in share.candidates:
                if str(i) in answer:
                    found[i][share.first - first : share.last - first] = answer[str(i)]
        return found

    def set_parent(self, choices: Choices) -> None:
        """Take candidates as changes of this allocation from now on, on every rank."""
        with self._ranks.task("set parent", choices.tolist()):
            self._fitness.set_parent(choices)


def _share(ranks: Ranks, fitness: Fitness, asked: _Asked, rank: int) -> _Share:
    return share_of(rank, ranks.size, asked, fitness.n_batch, fitness.n_unit)


def _judge(ranks: Ranks, fitness: Fitness, asked: _Asked) -> Sequence[Mapping[str, np.ndarray]]:
    """Judge this rank's share. Returns, on rank 0, all ranks' answers, by the candidates'
    numbers.
    """
    own = _share(ranks, fitness, asked, ranks.rank)
    found = {}
    if own.first < own.last:
        for i in own.candidates:
            choices = np.array(asked.candidates[i], np.int64)
            found[str(i)] = fitness.kl(choices, own.first, own.last)
    return ranks.gather_arrays(found)


@contextmanager
def distributed(ranks: Ranks, setting: Setting) -> Iterator[tuple[Evaluator, Fitness]]:
    """On rank 0, have all ranks judge candidates for as long as the context lasts. Gives the
    evaluator, and what this rank judges with.
    """
    with ranks.session(TASK, to_json(setting)):
        fitness = _fitness(ranks, setting)
        yield DistributedEvaluator(ranks, fitness), fitness


def judge(ranks: Ranks, payload: object) -> None:
    """Do this rank's share, on another rank than 0, until rank 0 has found what it searches for."""
    follow(ranks, _fitness(ranks, build(Setting, payload)))


def follow(ranks: Ranks, fitness: Fitness) -> None:
    """Judge what rank 0's `DistributedEvaluator` is asked, until its session ends."""

    def judge(asked: object) -> None:
        _judge(ranks, fitness, build(_Asked, asked))

    def set_parent(choices: Sequence[int]) -> None:
        fitness.set_parent(np.array(choices, np.int64))

    ranks.follow({"judge": judge, "set parent": set_parent})


def _fitness(ranks: Ranks, setting: Setting) -> Fitness:
    """Make what a rank judges with; all ranks at once."""
    from safetensors.numpy import load_file

    paths = [Path(p) for p in (setting.row_maps, setting.tokens, *setting.levels.values())]
    row_maps, tokens, *levels = ranks.local(paths)
    dtype = getattr(torch, setting.dtype)
    device = setting.device if ranks.is_alone else ranks.device
    model = open_model(setting.model.find(), dtype, device)
    maps, ids = load_row_maps(row_maps), load_file(tokens)["heldout"][:MOST_SEQUENCES]
    of_name = dict(zip(setting.levels, levels, strict=True))
    targets = (ranks.scratch() or Path(setting.scratch)) / f"targets-{ranks.rank}.partial"
    return Fitness(model, setting.space, maps, of_name, ids, targets, ranks)
