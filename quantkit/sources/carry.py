"""Carry the integers of a quantized checkpoint over into types of GGUF that hold them.

What the checkpoint was expanded to is rounded to 16 bits, and rounding that again would lose the
codes. So they are read from the checkpoint itself; which of its rows a tensor of `base.gguf` has is
known by the expanded rows, bit for bit, as `model.row_maps` knows the model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from quantkit.checkpoint.quantized import Expanded, Source
from quantkit.ggml.carry import TYPES, WIDTH, Carried, carry, has_room
from quantkit.ggml.types import QuantType
from quantkit.gguf_file.read import GgufFile
from quantkit.model.row_maps import find_rows, row_bytes, row_digests
from quantkit.sources.dequantize import Checkpoint, named
from quantkit.sources.integers import Integers, read_integers
from quantkit.tensors import EXACT, CarriedOver, Fallback, TensorSpec

_NEAR = 1e-6  # relative square: a scale or a minimum that float16 rounds, and nothing else
_MOST_WEIGHTS = 1 << 28  # of a tensor in memory at once


@dataclass(frozen=True)
class CarryOver:
    """What of a source is carried over; of the rest, why it is not."""

    carried: tuple[CarriedOver, ...] = ()
    missed: tuple[Fallback, ...] = ()

    def specs(self, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Return the tensors with the types that hold them."""
        types: dict[str, list[QuantType]] = {}
        for row in self.carried:
            types.setdefault(row.tensor, []).append(QuantType(row.qtype))
        return {
            name: replace(spec, carried=tuple(sorted(types.get(name, ()))))
            for name, spec in specs.items()
        }


def carry_over(
    folder: Path,
    files: Iterable[str],
    source: Source,
    base: GgufFile,
    specs: Mapping[str, TensorSpec],
    out: Path,
) -> CarryOver:
    """Write into `out` the rows of every tensor of `base` that a type holds, by type and method: a
    file for each. The checkpoint, of a scheme of integers, is `files` in `folder`.
    """
    out.mkdir(parents=True, exist_ok=True)
    places = _Places(Checkpoint.open(folder, files), source)
    wanted = [spec for spec in specs.values() if spec.quantizable]
    places.look({(spec.n_columns, spec.qtype) for spec in wanted})
    carried: list[CarriedOver] = []
    missed: list[Fallback] = []
    for spec in wanted:
        rows = places.find(spec, np.ascontiguousarray(base.packed(spec.name)))
        if rows is None:
            continue
        found, reason = _tensor(places, spec, rows)
        carried += [about for about, _ in found]
        if found:
            named_rows = {f"{about.qtype}/{about.method}": own for about, own in found}
            save_file(named_rows, out / f"{spec.name}.safetensors")
        if not any(about.is_exact for about, _ in found):
            missed.append(Fallback(spec.name, EXACT, "quantized", reason))
    return CarryOver(tuple(carried), tuple(missed))


def _tensor(
    places: _Places, spec: TensorSpec, rows: np.ndarray
) -> tuple[list[tuple[CarriedOver, torch.Tensor]], str]:
    """The rows of a tensor in the smallest type that holds them exactly, and in a smaller one that
    holds them nearly; or why there is no exact one.
    """
    if spec.n_elements > _MOST_WEIGHTS:
        return [], f"it has more than {_MOST_WEIGHTS:,} weights"
    read = places.integers(rows, spec.n_columns)
    if isinstance(read, str):
        return [], read
    found: list[tuple[CarriedOver, torch.Tensor]] = []
    nearest: tuple[float, QuantType] | None = None
    for qtype in TYPES:
        if not has_room(*read, qtype):
            continue
        made = carry(*read, qtype)
        off = _relative(made)
        about = CarriedOver(spec.name, str(qtype), spec.n_elements, made.n_equal, off)
        if about.is_exact:
            return [*found, (about, made.packed)], ""
        if not found and off <= _NEAR:
            found.append((about, made.packed))
        if nearest is None or off < nearest[0]:
            nearest = off, qtype
    if nearest is None:
        codes = read[0]
        return [], f"no type has room for its codes of {int(codes.min())} to {int(codes.max())}"
    off, qtype = nearest[0] ** 0.5, nearest[1]
    return (
        found,
        f"the scales or minimums of {qtype} are 16 bits: it is off by {off:.1e} of its size",
    )


def _relative(made: Carried) -> float:
    return made.off / made.power if made.power else 0.0


class _Places:
    """The rows of all integers of a checkpoint, by what they are expanded to."""

    def __init__(self, checkpoint: Checkpoint, source: Source) -> None:
        self._checkpoint, self._source = checkpoint, source
        self._made = [
            made for made in checkpoint.expanded(source).values() if _is_integers(made, checkpoint)
        ]
        self._index: dict[tuple[int, QuantType], tuple[np.ndarray, np.ndarray]] = {}
        self._of: dict[tuple[int, QuantType], list[int]] = {}

    def look(self, kinds: Iterable[tuple[int, QuantType]]) -> None:
        """Take the digests of all rows, in the types and widths of the tensors to come."""
        kinds = sorted(kinds)
        parts: dict[tuple[int, QuantType], list[np.ndarray]] = {}
        for i, made in enumerate(self._made):
            own = [kind for kind in kinds if kind[0] == made.shape[1]]
            values = self._read(made).values() if own else torch.empty(0)
            for kind in own:
                parts.setdefault(kind, []).append(row_digests(row_bytes(values, kind[1])))
                self._of.setdefault(kind, []).append(i)
        for kind, digests in parts.items():
            joined = np.concatenate(digests)
            order = np.argsort(joined, kind="stable")
            self._index[kind] = joined[order], order

    def find(self, spec: TensorSpec, packed: np.ndarray) -> np.ndarray | None:
        """Return (tensor of the checkpoint, row of it) of every row, int64 (n_rows, 2); None where
        one is not found.
        """
        kind = spec.n_columns, spec.qtype
        if kind not in self._index:
            return None
        rows = find_rows(row_digests(packed.reshape(spec.n_rows, -1)), *self._index[kind])
        if rows is None:
            return None
        sizes = [self._made[i].shape[0] for i in self._of[kind]]
        ends = np.cumsum(sizes)
        own = np.searchsorted(ends, rows, "right")
        return np.stack([np.array(self._of[kind])[own], rows - (ends - sizes)[own]], 1)

    def integers(self, rows: np.ndarray, n_columns: int) -> tuple[torch.Tensor, torch.Tensor] | str:
        """Return the codes of rows, int16 (n_rows, n_columns), and their scales for 32 columns
        each, float32; or why they have none.
        """
        codes = torch.empty((len(rows), n_columns), dtype=torch.int16)
        scale = torch.empty((len(rows), n_columns // WIDTH))
        for i in np.unique(rows[:, 0]):
            read = self._read(self._made[i])
            groups = read.group_of.view(-1, WIDTH)
            if not bool((groups == groups[:, :1]).all()):
                return "its groups are not of 32 columns side by side (act order)"
            here = np.flatnonzero(rows[:, 0] == i)
            theirs = torch.from_numpy(rows[here, 1])
            codes[here] = read.codes[theirs]
            scale[here] = read.scales.float()[theirs][:, groups[:, 0]]
        return codes, scale

    def _read(self, made: Expanded) -> Integers:
        parts = [self._checkpoint.read(name) for name in made.sources]
        return read_integers(named(made, parts), made, self._source)


def _is_integers(made: Expanded, checkpoint: Checkpoint) -> bool:
    is_packed = checkpoint.tensors[made.sources[0]].dtype in ("I8", "I32")
    return is_packed and len(made.shape) == 2 and made.shape[1] % WIDTH == 0
