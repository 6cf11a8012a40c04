"""Hessians on disk: one file per block, two Hessians per distinct input.

`train` decides codes and importances, `heldout` judges them: GPTQ's error under the Hessian it was
solved with never shows that it overfits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantkit.files import replacing
from quantkit.model.row_maps import RowMap
from quantkit.statistics.experts import ExpertCollector
from quantkit.statistics.fisher import Fisher
from quantkit.statistics.hessian import HessianCollector
from quantkit.statistics.sensitivity import Sensitivity


@dataclass(frozen=True)
class InputDiagonal:
    """Mean squared inputs of a module over the train tokens: float32 (n_columns,), of stacked
    experts (n_experts, n_columns) and their token counts (n_experts,).
    """

    diagonal: np.ndarray
    n_tokens: int | np.ndarray
    in_blocks: bool  # False for the output head, which llama-imatrix leaves out


@dataclass(frozen=True)
class InputStatistics:
    """The Hessians of one distinct input, on disk, and the modules that read it.

    An input that no held-out token reached, as an expert's may be, has no Hessian of its own to be
    judged with: `heldout` is `train` then.
    """

    modules: tuple[str, ...]
    n_train: int
    is_judged_on_train: bool
    path: Path
    group: str

    @property
    def train(self) -> torch.Tensor:
        """float32 (n, n), mapped from the file for as long as somebody has it."""
        return self._read("train")

    @property
    def heldout(self) -> torch.Tensor:
        """float32 (n, n), likewise."""
        return self._read("train" if self.is_judged_on_train else "heldout")

    def _read(self, part: str) -> torch.Tensor:
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(f"{self.group}/{part}")


@dataclass(frozen=True)
class ExpertStatistics:
    """The Hessians of one distinct input of a layer's experts, on disk: read an expert at a time.

    `n_tokens` float32 (n_experts,) are the train tokens that the router sent; `weights` are those
    and what was lent.
    """

    modules: tuple[str, ...]  # the 3-D parameters, whose names stand for modules in row maps
    n_tokens: np.ndarray
    weights: np.ndarray
    path: Path
    group: str

    @property
    def borrowers(self) -> np.ndarray:
        """Experts of whose Hessian more than half is lent: indices."""
        return np.flatnonzero(2 * self.n_tokens < self.weights)

    def load(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Load one expert's train and held-out Hessians, float32 (n, n)."""
        with safe_open(self.path, "pt") as file:
            stored = set(file.keys())
            train = file.get_slice(f"{self.group}/train")[expert]
            heldout = f"{self.group}/heldout"
            return train, file.get_slice(heldout)[expert] if heldout in stored else train


def block_file(folder: Path, index: int) -> Path:
    return folder / "hessians" / f"block-{index:03d}.safetensors"


def head_file(folder: Path) -> Path:
    return folder / "hessians" / "head.safetensors"


def save_statistics(
    path: Path,
    collectors: Mapping[str, HessianCollector],
    in_blocks: bool,
    experts: Mapping[str, ExpertCollector] | None = None,
) -> dict[str, InputDiagonal]:
    """Write the collectors' Hessians unless the file is there. Returns the train diagonals by
    module.
    """
    if not path.exists():
        train = collectors["train"]
        header = {g: [list(train.members[g]), train.n_tokens[g]] for g in train.sums}
        stacked = {}
        if experts is not None:
            own = experts["train"]
            for g in own.sums:
                counts = own.n_tokens[g].tolist(), own.weights[g].tolist()
                stacked[g] = [list(own.members[g]), *counts]
        tensors = {
            f"{group}/{part}": hessian.cpu().contiguous()
            for found in (collectors, experts or {})
            for part, collector in found.items()
            for group, hessian in collector.means().items()
        }
        # One entry: safetensors writes several in an order that changes from run to run.
        metadata = {"inputs": json.dumps({"groups": header, "experts": stacked})}
        with replacing(path) as partial:
            save_file(tensors, partial, metadata=metadata)
    return {
        module: InputDiagonal(diagonal, s.n_train, in_blocks)
        for s in load_statistics(path)
        for diagonal in [s.train.diagonal().numpy().copy()]
        for module in s.modules
    } | {
        module: InputDiagonal(diagonals, s.n_tokens, in_blocks)
        for s in load_expert_statistics(path)
        for diagonals in [_diagonals(s)]
        for module in s.modules
    }


def _diagonals(statistics: ExpertStatistics) -> np.ndarray:
    n_experts = len(statistics.n_tokens)
    return np.stack([statistics.load(e)[0].diagonal().numpy() for e in range(n_experts)])


def load_statistics(path: Path) -> list[InputStatistics]:
    """Load the inputs of one block (or the head), in the order in which the block meets them."""
    with safe_open(path, "pt") as file:
        stored = set(file.keys())
        table = json.loads(file.metadata()["inputs"])["groups"]
    return [
        InputStatistics(tuple(modules), n_tokens, f"{group}/heldout" not in stored, path, group)
        for group, (modules, n_tokens) in table.items()
    ]


def load_expert_statistics(path: Path) -> list[ExpertStatistics]:
    """Return what is stored of the inputs of a block's experts; empty for a block without any."""
    with safe_open(path, "pt") as file:
        table = json.loads(file.metadata()["inputs"])["experts"]
    return [
        ExpertStatistics(
            tuple(modules),
            np.array(n_tokens, np.float32),
            np.array(weights, np.float32),
            path,
            group,
        )
        for group, (modules, n_tokens, weights) in table.items()
    ]


def embedding_file(folder: Path) -> Path:
    return folder / "hessians" / "embedding.safetensors"


def fisher_file(folder: Path) -> Path:
    return folder / "hessians" / "fisher.safetensors"


_FREQUENCY = "(frequency)"


def save_fisher(path: Path, fisher: Fisher) -> None:
    tensors = fisher.modules | {_FREQUENCY: fisher.frequency}
    with replacing(path) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial)


def load_fisher(path: Path) -> Fisher:
    tensors = load_file(path)
    frequency = tensors.pop(_FREQUENCY)
    return Fisher(tensors, frequency)


@dataclass(frozen=True)
class Gradients:
    """`fisher`, and of what is looked up the outer products, in the place of those of inputs."""

    fisher: Fisher
    lookups: InputStatistics


def load_gradients(folder: Path) -> Gradients:
    (lookups,) = load_statistics(embedding_file(folder))
    return Gradients(load_fisher(fisher_file(folder)), lookups)


def sensitivity_of(gradients: Gradients, row_map: RowMap | None, device: str) -> Sensitivity | None:
    """Return what errors in a GGUF tensor cost, rows in the file's order; None where its gradients
    are not known.

    A tied embedding is both a table that is looked up and the output head.
    """
    fisher = gradients.fisher
    if row_map is None:
        return None

    def in_file_order(values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None:
            return None
        return (values if row_map.rows is None else values[row_map.rows]).to(device)

    outputs = in_file_order(fisher.modules.get(row_map.module))
    if row_map.is_lookup:
        lookups = gradients.lookups.heldout.to(device)
        return Sensitivity(outputs, in_file_order(fisher.frequency), lookups)
    return None if outputs is None else Sensitivity(outputs)
