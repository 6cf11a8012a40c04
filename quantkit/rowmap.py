"""Which row of which Hugging Face weight is which row of `base.gguf`.

GPTQ treats output rows independently and its Hessian lives on input columns, so it commutes with
any permutation of rows. The converter permutes, splits, fuses and stacks rows; it does not change
them. So a GGUF tensor is matched with the loaded model's weights row by row, bit for bit, after the
same cast of dtype: that finds permuted q and k, fused qkv, transposed Conv1D and stacked experts
without a table of architectures.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from quantkit.kquants import native
from quantkit.qtypes import BF16, F16, F32, QuantType
from quantkit.rundir import replacing
from quantkit.tensors import TensorSpec

_TABLE = "token_embd.weight"  # what llama.cpp calls the input embeddings of every architecture
_DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}


@dataclass(frozen=True)
class RowMap:
    """Where the rows of one GGUF tensor come from.

    GGUF row i is row `rows[i]` of the weight `parameter` of the loaded model, all experts' rows
    counted through. With
    `transposed`, rows are columns of the parameter (Conv1D). `rows` is None for the identity.
    """

    tensor: str
    parameter: str
    transposed: bool
    rows: torch.Tensor | None  # int64 (n_rows,)
    module: str  # whose input the tensor's columns are: of a tied embedding, the output head
    is_lookup: bool  # rows are looked up by token id: the input embedding

    def scatter(self, values: torch.Tensor, parameter: torch.Tensor) -> None:
        """Write GGUF rows (n_rows, n_columns) into the parameter, in place."""
        flat = parameter.T if self.transposed else parameter.view(-1, parameter.shape[-1])
        if self.rows is None:
            flat.copy_(values)
        else:
            flat[self.rows.to(flat.device)] = values.to(flat.dtype)


def _digests(rows: np.ndarray) -> np.ndarray:
    """One 64-bit digest per row of a C-contiguous uint8 array: uint64 (n_rows,)."""
    joined = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in rows)
    return np.frombuffer(joined, np.uint64)


def _row_bytes(weight: torch.Tensor, qtype: QuantType) -> np.ndarray:
    """Rows of a weight (n_rows, n_columns) as base.gguf stores them: uint8 (n_rows, row_bytes)."""
    cast = weight.detach().to(_DTYPES[qtype]).contiguous()
    return cast.view(torch.uint8).numpy()


class RowMatcher:
    """Matches GGUF tensors with the weights of a loaded model; asks each weight for its digests
    once.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._weights = {
            name: weight for name, weight in model.named_parameters() if weight.dim() in (2, 3)
        }
        self._conv1d = {
            f"{name}.weight" for name, m in model.named_modules() if type(m).__name__ == "Conv1D"
        }
        table = model.get_input_embeddings()
        self._lookups = {
            n for n, w in self._weights.items() if table is not None and w is table.weight
        }
        self._heads = {
            name: head
            for head, module in model.named_modules()
            for name, weight in self._weights.items()
            if getattr(module, "weight", None) is weight and isinstance(module, nn.Linear)
        }
        self._index: dict[tuple[str, QuantType], tuple[np.ndarray, np.ndarray]] = {}
        self._taken: dict[str, np.ndarray] = {}  # weight -> which rows are a tensor's already

    def _digests_of(self, name: str, qtype: QuantType) -> tuple[np.ndarray, np.ndarray]:
        """The sorted digests of a weight's rows, cast to a GGUF type, and the row of each."""
        if (name, qtype) not in self._index:
            digests = _digests(_row_bytes(self._rows_of(name), qtype))
            order = np.argsort(digests, kind="stable")
            self._index[name, qtype] = digests[order], order
        return self._index[name, qtype]

    def _rows_of(self, name: str) -> torch.Tensor:
        weight = self._weights[name]
        return weight.T if name in self._conv1d else weight.reshape(-1, weight.shape[-1])

    def match(self, spec: TensorSpec, packed: native.Bytes) -> RowMap | None:
        """The row map of a GGUF tensor with stored rows `packed`, or None where a row is not the
        model's.

        Where several weights have these rows (repeated layers, constant weights), the best is a
        map that is one to one, of rows that no tensor before had, to the weight that its name
        speaks for.
        """
        if spec.qtype not in _DTYPES:
            return None
        wanted = _digests(np.ascontiguousarray(packed))
        best: tuple[tuple[bool, ...], str, np.ndarray] | None = None
        for name in self._weights:
            if self._rows_of(name).shape[1] != spec.n_columns:
                continue
            digests, order = self._digests_of(name, spec.qtype)
            if not _has(digests, wanted[0]):
                continue
            free = ~self._taken.setdefault(name, np.zeros(len(digests), bool))[order]
            rows = _find(wanted, digests[free], order[free])
            is_free = rows is not None
            if rows is None:
                rows = _find(wanted, digests, order)
            if rows is None:
                continue
            misfit = (
                len(np.unique(rows)) < len(rows),
                not is_free,
                (spec.name == _TABLE) != (name in self._lookups),
                _first_number(spec.name) != _first_number(name),
            )
            if best is None or misfit < best[0]:
                best = misfit, name, rows
        if best is None:
            return None
        _, name, rows = best
        taken = self._taken[name]
        taken[rows] = True
        identity = len(rows) == len(taken) and bool((rows == np.arange(len(rows))).all())
        return RowMap(
            spec.name,
            name,
            name in self._conv1d,
            None if identity else torch.from_numpy(rows),
            self._heads.get(name, name.removesuffix(".weight")),
            name in self._lookups,
        )


def _has(digests: np.ndarray, digest: np.uint64) -> bool:
    """Whether sorted digests have one: the cheap answer "no" for nearly all weights."""
    at = np.searchsorted(digests, digest)
    return bool(at < len(digests) and digests[at] == digest)


def _first_number(name: str) -> str | None:
    """The layer's number, in the names of either side."""
    found = re.search(r"\d+", name)
    return found[0] if found else None


def _find(wanted: np.ndarray, digests: np.ndarray, order: np.ndarray) -> np.ndarray | None:
    """For each wanted digest a row that has it, or None where one is missing.

    Equal rows are handed out in order, so that the map is one to one wherever it can be.
    """
    if not _has(digests, wanted[0]):
        return None
    by_digest = np.argsort(wanted, kind="stable")
    ascending = wanted[by_digest]
    start = np.searchsorted(digests, ascending)
    repeat = np.arange(len(wanted)) - np.searchsorted(ascending, ascending)
    at = np.minimum(start, len(digests) - 1)
    if not bool((digests[at] == ascending).all()):
        return None
    n_equal = np.searchsorted(digests, ascending, "right") - start
    rows = np.empty(len(wanted), np.int64)
    rows[by_digest] = order[at + np.minimum(repeat, n_equal - 1)]
    return rows


def save_row_maps(maps: Mapping[str, RowMap], path: Path) -> None:
    """Write row maps as safetensors: an index tensor for each that is not the identity, the rest in
    the header.
    """
    header = [[m.tensor, m.parameter, m.transposed, m.module, m.is_lookup] for m in maps.values()]
    rows = {name: m.rows for name, m in maps.items() if m.rows is not None}
    with replacing(path) as partial:
        save_file(rows, partial, metadata={"row_maps": json.dumps(header)})


def load_row_maps(path: Path) -> dict[str, RowMap]:
    """What `save_row_maps` wrote, by tensor name."""
    with safe_open(path, "pt") as file:
        stored = set(file.keys())
        return {
            tensor: RowMap(
                tensor,
                parameter,
                transposed,
                file.get_tensor(tensor) if tensor in stored else None,
                module,
                is_lookup,
            )
            for tensor, parameter, transposed, module, is_lookup in json.loads(
                file.metadata()["row_maps"]
            )
        }
