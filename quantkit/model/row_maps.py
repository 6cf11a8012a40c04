"""Match every row of `base.gguf` with a row of a Hugging Face weight.

GPTQ treats output rows independently and its Hessian lives on input columns, so it commutes with
any permutation of rows. The converter permutes, splits, fuses and stacks rows; it does not change
them. So a GGUF tensor is matched with the loaded model's weights row by row, bit for bit, after the
same cast of dtype: that finds permuted q and k, fused qkv, transposed Conv1D and stacked experts
without a table of architectures.

Some tensors are not made of whole rows of a weight, yet found. Experts that the model multiplies
from the left lie transposed, (n_experts, n_in, n_out). Where heads are stored in another order, so
are the columns of the projection that reads them (Qwen3.5's linear attention): its Hessian is
permuted alike. And where llama.cpp absorbs a projection into another (the k_b of latent attention),
the tensor's own transpose has the rows: it can be put back, but its columns are no module's input,
so it has no Hessian.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from quantkit.files import replacing
from quantkit.ggml import native
from quantkit.ggml.types import BF16, F16, F32, QuantType
from quantkit.tensors import TensorSpec

_TABLE = "token_embd.weight"  # what llama.cpp calls the input embeddings of every architecture
_COLUMNS = "/columns"  # after a tensor's name in the file of maps
_BYTES_PER_TASK = 2**18  # stay in a core's cache, eight bytes for every four
_LOW = np.uint64(2**32 - 1)
_DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}


@dataclass(frozen=True)
class RowMap:
    """Where the rows of one GGUF tensor come from.

    GGUF row i is row `rows[i]` of the weight `parameter` of the loaded model, all experts' rows
    counted through. With `transposed`, rows are columns of the parameter, or of each expert's part
    of it. `rows` is None for the identity. With `flipped`, not the tensor's rows are meant but
    those of its transpose: of each of its `flipped` parts. GGUF column j is the module's input
    `columns[j]`.
    """

    tensor: str
    parameter: str
    transposed: bool
    rows: torch.Tensor | None  # int64 (n_rows,)
    module: str  # whose input the columns are: of a tied embedding, the output head; "": no one's
    is_lookup: bool  # rows are looked up by token id: the input embedding
    flipped: int = 0  # parts of the tensor that are transposed each, 0: not at all
    columns: torch.Tensor | None = None  # int64 (n_columns,), None: in their order

    @property
    def is_identity(self) -> bool:
        """Return whether the tensor is the parameter, row by row and column by column."""
        moved = self.rows is not None or self.columns is not None
        return not (moved or self.transposed or self.flipped)

    def n_columns(self, parameter: torch.Tensor) -> int:
        """Return the columns of the GGUF tensor."""
        if self.flipped:
            n_all = parameter.numel() // parameter.shape[-1]
            return (n_all if self.rows is None else len(self.rows)) // self.flipped
        return parameter.shape[-2 if self.transposed else -1]

    def in_file_order(self, per_column: np.ndarray) -> np.ndarray:
        """Return values of the module's inputs (..., n_columns), in the order of the GGUF's
        columns.
        """
        return per_column if self.columns is None else per_column[..., self.columns.numpy()]

    def gather(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the GGUF rows (n_rows, n_columns) of values shaped like the parameter."""
        rows = _rows(parameter, self.transposed)
        rows = rows if self.rows is None else rows[self.rows.to(rows.device)]
        rows = rows if self.columns is None else rows[:, self.columns.to(rows.device)]
        return _flip(rows, self.flipped) if self.flipped else rows

    def scatter(self, values: torch.Tensor, parameter: torch.Tensor) -> None:
        """Write GGUF rows (n_rows, n_columns) into the parameter, in place."""
        if self.flipped:
            values = _flip(values, self.flipped)
        if self.columns is not None:
            values = values[:, self.columns.argsort().to(values.device)]
        matrices = parameter.mT if self.transposed else parameter  # a view, not always reshapeable
        if matrices.dim() == 2:
            matrices = matrices[None]
        if self.rows is None:
            matrices.copy_(values.view(matrices.shape))
        else:
            rows, n = self.rows.to(parameter.device), matrices.shape[1]
            matrices[rows // n, rows % n] = values.to(parameter.dtype)


def _rows(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """The rows (n_rows, n_columns) of a weight of two or three axes."""
    return (weight.mT if transposed else weight).reshape(-1, weight.shape[-2 if transposed else -1])


def _flip(rows: torch.Tensor, n_parts: int) -> torch.Tensor:
    """Rows (n_parts * a, b) with every part transposed: (n_parts * b, a)."""
    parts = rows.reshape(n_parts, -1, rows.shape[-1])
    return parts.mT.reshape(-1, parts.shape[1])


def row_digests(rows: np.ndarray) -> np.ndarray:
    """Return one 64-bit digest per row of a C-contiguous uint8 array: uint64 (n_rows,).

    Multilinear hashing (Lemire and Kaser 2014, "Strongly universal string hashing is fast"), twice:
    whatever two different rows hold, they have one digest with a probability of 2^-64.
    """
    n_rows, n_bytes = rows.shape
    words = rows.view("<u4" if n_bytes % 4 == 0 else "<u2")
    keys = _keys(words.shape[1])
    digests = np.empty(n_rows, np.uint64)
    at_once = max(1, _BYTES_PER_TASK // n_bytes)

    def work(begin: int) -> None:
        block = slice(begin, begin + at_once)
        sums = words[block].astype(np.uint64) @ keys[1:] + keys[0]
        digests[block] = sums[:, 0] & ~_LOW | sums[:, 1] >> np.uint64(32)

    list(_pool().map(work, range(0, n_rows, at_once)))
    return digests


@functools.cache
def _keys(n_words: int) -> np.ndarray:
    """Others in every process: nobody can know of rows that would have one digest."""
    return np.random.default_rng().integers(0, 2**64, (1 + n_words, 2), np.uint64)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, "rows")


def row_bytes(weight: torch.Tensor, qtype: QuantType) -> np.ndarray:
    """Return a weight's rows (n_rows, n_columns) as base.gguf has them: uint8 (n_rows, n_bytes)."""
    cast = weight.detach().to(_DTYPES[qtype]).contiguous()
    return cast.view(torch.uint8).numpy()


class RowMatcher:
    """Matches GGUF tensors with the weights of a model; asks each weight for its digests once.

    `read` gives a parameter's values by its name, where the model itself does not hold them.
    """

    def __init__(
        self, model: PreTrainedModel, read: Callable[[str], torch.Tensor] | None = None
    ) -> None:
        self._read = read or model.get_parameter
        self._weights = {
            name: weight for name, weight in model.named_parameters() if weight.dim() in (2, 3)
        }
        conv1d = {
            f"{name}.weight" for name, m in model.named_modules() if type(m).__name__ == "Conv1D"
        }
        # Which way round a stack of experts is multiplied cannot be seen from it: both are tried.
        self._ways = [
            (name, transposed)
            for name, weight in self._weights.items()
            for transposed in ((False, True) if weight.dim() == 3 else (name in conv1d,))
        ]
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
        # Gemma 4 looks up more than its input embeddings.
        self._other_tables = {
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding) and module is not table
        }
        self._index: dict[tuple[str, bool, QuantType], tuple[np.ndarray, np.ndarray]] = {}
        self._taken: dict[tuple[str, bool], np.ndarray] = {}  # which rows are a tensor's already

    def _digests_of(
        self, name: str, transposed: bool, qtype: QuantType
    ) -> tuple[np.ndarray, np.ndarray]:
        """The sorted digests of a weight's rows, cast to a GGUF type, and the row of each."""
        if (name, transposed, qtype) not in self._index:
            digests = row_digests(row_bytes(_rows(self._read(name), transposed), qtype))
            order = np.argsort(digests, kind="stable")
            self._index[name, transposed, qtype] = digests[order], order
        return self._index[name, transposed, qtype]

    def match(self, spec: TensorSpec, packed: native.Bytes) -> RowMap | None:
        """Return the row map of a GGUF tensor with stored rows `packed`, None if a row is not the
        model's.

        Where several weights have these rows (repeated layers, constant weights), the best is a
        map that is one to one, of rows that no tensor before had, to the weight that its name
        speaks for.
        """
        if spec.qtype not in _DTYPES:
            return None
        found = self._match(spec, np.ascontiguousarray(packed), 0)
        if found is None and len(spec.shape) == 3:
            n_parts, n_rows, n_columns = spec.shape
            flipped = packed.reshape(n_parts, n_rows, n_columns, -1).swapaxes(1, 2)
            found = self._match(
                replace(spec, shape=(n_parts, n_columns, n_rows)),
                np.ascontiguousarray(flipped).reshape(n_parts * n_columns, -1),
                n_parts,
            )
        if found is None and len(spec.shape) == 2:
            found = self._match_columns(spec, np.ascontiguousarray(packed))
        return found

    def _reader(self, name: str) -> str:
        """The module whose input a weight's columns are."""
        if name in self._other_tables:
            return ""
        return self._heads.get(name, name.removesuffix(".weight"))

    def _match_columns(self, spec: TensorSpec, packed: native.Bytes) -> RowMap | None:
        """The map of a tensor whose columns are a weight's in another order, its rows in theirs."""
        upright = packed.reshape(*spec.shape, -1).swapaxes(0, 1)
        wanted = row_digests(np.ascontiguousarray(upright).reshape(spec.n_columns, -1))
        for name, transposed in self._ways:
            shape = self._weights[name].shape
            if transposed:
                shape = shape[::-1]
            if shape != spec.shape or _first_number(name) != _first_number(spec.name):
                continue
            weight = self._read(name)
            digests = row_digests(row_bytes(weight if transposed else weight.mT, spec.qtype))
            order = np.argsort(digests, kind="stable")
            columns = find_rows(wanted, digests[order], order)
            if columns is not None and len(np.unique(columns)) == len(columns):
                return RowMap(
                    spec.name,
                    name,
                    transposed,
                    None,
                    self._reader(name),
                    name in self._lookups,
                    columns=torch.from_numpy(columns),
                )
        return None

    def _match(self, spec: TensorSpec, packed: native.Bytes, flipped: int) -> RowMap | None:
        wanted = row_digests(packed)
        best: tuple[tuple[bool, ...], tuple[str, bool], np.ndarray] | None = None
        for name, transposed in self._ways:
            if self._weights[name].shape[-2 if transposed else -1] != spec.n_columns:
                continue
            digests, order = self._digests_of(name, transposed, spec.qtype)
            if not _has(digests, wanted[0]):
                continue
            free = ~self._taken.setdefault((name, transposed), np.zeros(len(digests), bool))[order]
            rows = find_rows(wanted, digests[free], order[free])
            is_free = rows is not None
            if rows is None:
                rows = find_rows(wanted, digests, order)
            if rows is None:
                continue
            misfit = (
                len(np.unique(rows)) < len(rows),
                not is_free,
                (spec.name == _TABLE) != (name in self._lookups),
                _first_number(spec.name) != _first_number(name),
            )
            if best is None or misfit < best[0]:
                best = misfit, (name, transposed), rows
        if best is None:
            return None
        _, (name, transposed), rows = best
        taken = self._taken[name, transposed]
        taken[rows] = True
        identity = len(rows) == len(taken) and bool((rows == np.arange(len(rows))).all())
        return RowMap(
            spec.name,
            name,
            transposed,
            None if identity else torch.from_numpy(rows),
            "" if flipped else self._reader(name),
            name in self._lookups,
            flipped,
        )


def _has(digests: np.ndarray, digest: np.uint64) -> bool:
    """Whether sorted digests have one: the cheap answer "no" for nearly all weights."""
    at = np.searchsorted(digests, digest)
    return bool(at < len(digests) and digests[at] == digest)


def _first_number(name: str) -> str | None:
    """The layer's number, in the names of either side."""
    found = re.search(r"\d+", name)
    return found[0] if found else None


def find_rows(wanted: np.ndarray, digests: np.ndarray, order: np.ndarray) -> np.ndarray | None:
    """Return for each wanted digest a row that has it, or None where one is missing; `digests` are
    sorted, `order` are their rows.

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
    header = [
        [m.tensor, m.parameter, m.transposed, m.module, m.is_lookup, m.flipped]
        for m in maps.values()
    ]
    rows = {name: m.rows for name, m in maps.items() if m.rows is not None}
    rows |= {f"{name}{_COLUMNS}": m.columns for name, m in maps.items() if m.columns is not None}
    with replacing(path) as partial:
        save_file(rows, partial, metadata={"row_maps": json.dumps(header)})


def load_row_maps(path: Path) -> dict[str, RowMap]:
    """Return what `save_row_maps` wrote, by tensor name."""
    with safe_open(path, "pt") as file:
        stored = set(file.keys())

        def index(name: str) -> torch.Tensor | None:
            return file.get_tensor(name) if name in stored else None

        found = {}
        for entry in json.loads(file.metadata()["row_maps"]):
            tensor, parameter, transposed, module, is_lookup, flipped = entry
            rows, columns = index(tensor), index(tensor + _COLUMNS)
            found[tensor] = RowMap(
                tensor, parameter, transposed, rows, module, is_lookup, flipped, columns
            )
        return found
