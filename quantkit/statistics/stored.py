"""Statistics on disk: what calibrate's backward pass leaves, the Fisher information and the outer
products of the gradients at what is looked up; and the importances of a block, until all of them
make the imatrix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from quantkit.files import replacing
from quantkit.model.row_maps import RowMap
from quantkit.statistics.fisher import Fisher
from quantkit.statistics.hessian import HessianCollector
from quantkit.statistics.inputs import BlockStatistics, InputDiagonal, InputStatistics
from quantkit.statistics.sensitivity import Sensitivity

_FREQUENCY = "(frequency)"
_COUNTS = "(counts)"


@dataclass(frozen=True)
class Gradients:
    """`fisher`, and of what is looked up the outer products, in the place of those of inputs."""

    fisher: Fisher
    lookups: InputStatistics


def fisher_file(folder: Path) -> Path:
    return folder / "fisher.safetensors"


def embedding_file(folder: Path) -> Path:
    return folder / "embedding.safetensors"


def save_gradients(folder: Path, fisher: Fisher, lookups: Mapping[str, HessianCollector]) -> None:
    """Write both files, the Fisher information last; `lookups` are `train` and `heldout`."""
    folder.mkdir(exist_ok=True)
    (found,) = BlockStatistics.of(lookups).inputs
    # One entry: safetensors writes several in an order that changes from run to run.
    metadata = {"inputs": json.dumps([found.modules, found.n_train, found.is_judged_on_train])}
    tensors = {"train": found.train.cpu(), "heldout": found.heldout.cpu()}
    with replacing(embedding_file(folder)) as partial:
        save_file(tensors, partial, metadata=metadata)
    tensors = {**fisher.modules, _FREQUENCY: fisher.frequency}
    with replacing(fisher_file(folder)) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial)


def load_gradients(fisher_path: Path, embedding_path: Path) -> Gradients:
    """Read what `save_gradients` wrote: `fisher_file` and `embedding_file`."""
    with safe_open(embedding_path, "pt") as file:
        modules, n_train, on_train = json.loads(file.metadata()["inputs"])
        train, heldout = file.get_tensor("train"), file.get_tensor("heldout")
    tensors = load_file(fisher_path)
    fisher = Fisher(tensors, tensors.pop(_FREQUENCY))
    lookups = InputStatistics(tuple(modules), n_train, train, heldout, on_train)
    return Gradients(fisher, lookups)


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


def save_importances(path: Path, importances: Mapping[str, InputDiagonal]) -> None:
    """Write mean squared inputs and token counts by tensor name."""
    path.parent.mkdir(exist_ok=True)
    arrays = {}
    for name, known in importances.items():
        arrays[name] = np.ascontiguousarray(known.diagonal)
        arrays[name + _COUNTS] = np.atleast_1d(np.asarray(known.n_tokens, np.float32))
    with replacing(path) as partial:
        save_arrays(arrays, partial)


def load_importances(path: Path) -> dict[str, InputDiagonal]:
    """Read what `save_importances` wrote."""
    arrays = load_arrays(path)
    return {
        name: InputDiagonal(values, arrays[name + _COUNTS])
        for name, values in arrays.items()
        if not name.endswith(_COUNTS)
    }
