"""Writing GGUF files whose metadata is that of `base.gguf` and whose tensors may have other types.

The size of every file is known to the byte before a single weight is written: header and tensor
table do not depend on the types, and each tensor is padded to the alignment. So a file is laid out
first, then filled in any order; a run that was killed goes on filling.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFValueType, GGUFWriter

from quantkit.files import PARTIAL
from quantkit.ggml import native
from quantkit.ggml.types import QuantType
from quantkit.gguf_file.read import GgufFile


@dataclass(frozen=True)
class KeyValue:
    """One metadata pair to add, or to put in the place of the base's."""

    key: str
    value: int | float | str | bool | Sequence[str]
    kind: GGUFValueType

    @classmethod
    def string(cls, key: str, value: str) -> KeyValue:
        return cls(key, value, GGUFValueType.STRING)

    @classmethod
    def uint32(cls, key: str, value: int) -> KeyValue:
        return cls(key, value, GGUFValueType.UINT32)


@dataclass(frozen=True)
class Layout:
    """A file before its weights: the bytes of its header, where each tensor goes, and how large it
    will be.
    """

    header: bytes
    offsets: dict[str, int]
    sizes: dict[str, int]  # bytes of each tensor, without padding
    types: dict[str, QuantType]
    n_bytes: int


def lay_out(
    base: GgufFile, types: Mapping[str, QuantType], key_values: Sequence[KeyValue] = ()
) -> Layout:
    """Lay out a file with the tensors of `base` in its order; those named in `types` have that
    type, the rest the base's.

    The metadata of `base` is carried whole; `key_values` replace or follow it.
    """
    replaced = {kv.key: kv for kv in key_values}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer = GGUFWriter(path, arch="")
        writer.kv_data[0].clear()
        writer.data_alignment = base.alignment
        for field in base.fields.values():
            new = replaced.pop(field.name, None)
            if new is not None:
                writer.add_key_value(new.key, new.value, new.kind)
            else:
                writer.add_key_value(field.name, field.value, field.kind, field.item)
        for new in replaced.values():
            writer.add_key_value(new.key, new.value, new.kind)
        kept = {name: types.get(name, tensor.qtype) for name, tensor in base.tensors.items()}
        sizes = {name: kept[name].n_bytes(tensor.shape) for name, tensor in base.tensors.items()}
        counted_in_weights = np.dtype(np.float32)  # uint8 would mean that shapes count bytes
        for name, tensor in base.tensors.items():
            writer.add_tensor_info(
                name, tensor.shape, counted_in_weights, sizes[name], raw_dtype=kept[name].ggml
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    alignment = writer.data_alignment
    at = gguf.GGUFWriter.ggml_pad(len(header), alignment)
    header += bytes(at - len(header))
    offsets = {}
    for name, n_bytes in sizes.items():
        offsets[name] = at
        at += gguf.GGUFWriter.ggml_pad(n_bytes, alignment)
    return Layout(header, offsets, sizes, kept, at)


def slot_bytes(base: GgufFile, n_bytes: int) -> int:
    """Return the bytes that a tensor of `n_bytes` takes in a file laid out like `base`, padding
    included.
    """
    return GGUFWriter.ggml_pad(n_bytes, base.alignment)


def data_bytes(base: GgufFile, types: Mapping[str, QuantType]) -> int:
    """Return the bytes that all tensors take with these types, padding included; those not named
    keep the base's.
    """
    return sum(
        slot_bytes(base, types.get(t.name, t.qtype).n_bytes(t.shape)) for t in base.tensors.values()
    )


class SlotFile:
    """A laid-out file being filled under its `.partial` name. Writing the same slot again is
    harmless.
    """

    def __init__(self, path: Path, layout: Layout, reopen: bool = False) -> None:
        """Go on with a partial file that has this very layout, else start afresh; with `reopen`
        also with one that is finished.
        """
        self.path = path
        self.layout = layout
        self._partial = path.with_name(path.name + PARTIAL)
        path.parent.mkdir(parents=True, exist_ok=True)
        if reopen and path.exists() and not self._partial.exists():
            os.replace(path, self._partial)
        self.resumed = self._is_begun()
        if not self.resumed:
            with self._partial.open("wb") as file:
                file.write(layout.header)
                file.truncate(layout.n_bytes)
        self._file = self._partial.open("r+b")

    def _is_begun(self) -> bool:
        if not self._partial.exists() or self._partial.stat().st_size != self.layout.n_bytes:
            return False
        with self._partial.open("rb") as file:
            return file.read(len(self.layout.header)) == self.layout.header

    def write(self, name: str, packed: native.Bytes) -> None:
        """Fill a tensor's slot with its packed rows, uint8 (n_rows, row_bytes).

        Raises ValueError when they are not the slot's size: they would run into the next tensor.
        """
        if packed.nbytes != self.layout.sizes[name]:
            raise ValueError(
                f"{name} takes {self.layout.sizes[name]:,} bytes, not {packed.nbytes:,}"
            )
        self._file.seek(self.layout.offsets[name])
        self._file.write(np.ascontiguousarray(packed).data)

    def read(self, name: str) -> native.Bytes:
        """Return the bytes of a slot as they were written: uint8 (n_bytes,)."""
        self._file.flush()
        self._file.seek(self.layout.offsets[name])
        return np.frombuffer(self._file.read(self.layout.sizes[name]), np.uint8)

    def flush(self) -> None:
        """Have everything written so far on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Give the file its name, now that all slots are filled."""
        self.flush()
        self._file.close()
        os.replace(self._partial, self.path)

    def close(self) -> None:
        self._file.close()
