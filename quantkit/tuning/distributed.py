"""Tune a file on all ranks: rank 0 writes what the others have helped to make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.model.streaming import open_model
from quantkit.ranks.group import Ranks
from quantkit.sandbox.untrusted import build
from quantkit.sources.snapshot import Place
from quantkit.tensors import Candidate, to_json
from quantkit.tuning.tuned import load_stored, load_tuner
from quantkit.tuning.tuner import Stored, Tuner

TASK = "tune"


@dataclass(frozen=True)
class Setting:
    """What a file is tuned with. Paths are rank 0's."""

    chosen: dict[str, Candidate]  # the file's tensors
    model: Place
    row_maps: str
    tokens: str
    levels: dict[str, str]  # the files that the tensors lie in, by the names they give
    scratch: str
    device: str
    n_steps: int
    exact: bool  # products in float32
    n_beside: int  # bytes that tuning takes beside the model


@contextmanager
def tuning(ranks: Ranks, setting: Setting, stored: Mapping[str, Stored]) -> Iterator[Tuner]:
    """On rank 0, have all ranks tune; `stored` are the tensors of the setting. The tuner must take
    all blocks, and then be asked for the KL.
    """
    with ranks.task(TASK, to_json(setting)):
        yield _tuner(ranks, setting, stored)


def tune(ranks: Ranks, payload: object) -> None:
    """Do this rank's share, on another rank than 0."""
    tuner = _tuner(ranks, build(Setting, payload), None)
    for index in range(tuner.n_blocks):
        tuner.block(index)
    tuner.kl()


def _tuner(ranks: Ranks, setting: Setting, stored: Mapping[str, Stored] | None) -> Tuner:
    paths = [Path(p) for p in (setting.row_maps, setting.tokens, *setting.levels.values())]
    row_maps, tokens, *levels = ranks.local(paths)
    if stored is None:
        stored = load_stored(setting.chosen, dict(zip(setting.levels, levels, strict=True)))
    device = setting.device if ranks.is_alone else ranks.device
    folder = setting.model.find()
    model = open_model(folder, torch.float32, device, setting.n_beside)
    scratch = ranks.scratch() or Path(setting.scratch)
    return load_tuner(
        model, row_maps, tokens, stored, setting.n_steps, scratch, setting.exact, ranks
    )
