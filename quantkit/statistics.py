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

from quantkit.gptq.compete import Sensitivity
from quantkit.gptq.fisher import Fisher
from quantkit.gptq.hessian import HessianCollector
from quantkit.rowmap import RowMap
from quantkit.rundir import replacing


@dataclass(frozen=True)
class InputDiagonal:
    """Mean squared inputs of a module over the train tokens: float32 (n_columns,)."""

    diagonal: np.ndarray
    n_tokens: int
    in_blocks: bool  # False for the output head, which llama-imatrix leaves out


@dataclass(frozen=True)
class InputStatistics:
    """The Hessians of one distinct input: float32 (n, n), and the modules that read it.

    An input that no held-out token reached, as an expert's may be, has no Hessian of its own to be
    judged with: `heldout` is `train` then.
    """

    modules: tuple[str, ...]
    train: torch.Tensor
    heldout: torch.Tensor
    n_train: int

    @property
    def is_judged_on_train(self) -> bool:
        return self.heldout is self.train


def block_file(folder: Path, index: int) -> Path:
    return folder / "hessians" / f"block-{index:03d}.safetensors"


def head_file(folder: Path) -> Path:
    return folder / "hessians" / "head.safetensors"


def save_statistics(
    path: Path, collectors: Mapping[str, HessianCollector], in_blocks: bool
) -> dict[str, InputDiagonal]:
    """Write the collectors' Hessians unless the file is there. Returns the train diagonals by
    module.
    """
    if not path.exists():
        train = collectors["train"]
        header = {g: [list(train.members[g]), train.n_tokens[g]] for g in train.sums}
        tensors = {
            f"{group}/{part}": hessian.cpu().contiguous()
            for part, collector in collectors.items()
            for group, hessian in collector.means().items()
        }
        with replacing(path) as partial:
            save_file(tensors, partial, metadata={"groups": json.dumps(header)})
    return {
        module: InputDiagonal(s.train.diagonal().numpy().copy(), s.n_train, in_blocks)
        for s in load_statistics(path)
        for module in s.modules
    }


def load_statistics(path: Path) -> list[InputStatistics]:
    """The inputs of one block (or the head), in the order in which the block meets them."""
    with safe_open(path, "pt") as file:
        stored = set(file.keys())
        found = []
        for group, (modules, n_tokens) in json.loads(file.metadata()["groups"]).items():
            train = file.get_tensor(f"{group}/train")
            name = f"{group}/heldout"
            heldout = file.get_tensor(name) if name in stored else train
            found.append(InputStatistics(tuple(modules), train, heldout, n_tokens))
        return found


def fisher_file(folder: Path) -> Path:
    return folder / "hessians" / "fisher.safetensors"


_EMBEDDING, _FREQUENCY = "(embedding)", "(frequency)"


def save_fisher(path: Path, fisher: Fisher) -> None:
    special = {_EMBEDDING: fisher.embedding, _FREQUENCY: fisher.frequency}
    with replacing(path) as partial:
        save_file({k: v.contiguous() for k, v in (fisher.modules | special).items()}, partial)


def load_fisher(path: Path) -> Fisher:
    tensors = load_file(path)
    embedding, frequency = (tensors.pop(key) for key in (_EMBEDDING, _FREQUENCY))
    return Fisher(tensors, embedding, frequency)


def sensitivity_of(fisher: Fisher, row_map: RowMap | None, device: str) -> Sensitivity | None:
    """What errors in a GGUF tensor cost, rows in the file's order; None where its gradients are not
    known.

    A tied embedding is both a table that is looked up and the output head.
    """
    if row_map is None:
        return None

    def in_file_order(values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None:
            return None
        return (values if row_map.rows is None else values[row_map.rows]).to(device)

    outputs = in_file_order(fisher.modules.get(row_map.module))
    if row_map.is_lookup:
        return Sensitivity(outputs, in_file_order(fisher.frequency), fisher.embedding.to(device))
    return None if outputs is None else Sensitivity(outputs)
