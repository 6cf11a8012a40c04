"""Writing GGUF files whose metadata is that of `base.gguf` and whose tensors may have other types.

The size of every file is known to the byte before a single weight is written: header and tensor
table do not depend on the types, and each tensor is padded to the alignment. So a file is laid out
first, then filled in any order; a run that was killed goes on filling.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUF_VERSION, GGUFWriter

from quantkit.files import PARTIAL
from quantkit.ggml import native
from quantkit.ggml.types import QuantType
from quantkit.gguf_file.fields import Field, packed_text
from quantkit.gguf_file.read import GgufFile

_LARGE = 1 << 24  # bytes of a tensor that are worth waiting for the disk


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
    base: GgufFile,
    types: Mapping[str, QuantType],
    fields: Sequence[Field] = (),
    without: Collection[str] = (),
) -> Layout:
    """Lay out a file with the tensors of `base` in its order; those named in `types` have that
    type, the rest the base's.

    The metadata of `base` is carried as it is stored, but for the keys in `without`; `fields`
    replace or follow it. The bytes are those that gguf-py's `GGUFWriter` writes.
    """
    metadata = {name: field for name, field in base.fields.items() if name not in without}
    metadata |= {field.name: field for field in fields}
    kept = {name: types.get(name, tensor.qtype) for name, tensor in base.tensors.items()}
    sizes = {name: kept[name].n_bytes(tensor.shape) for name, tensor in base.tensors.items()}
    places, end = {}, 0  # from the first tensor on
    for name, n_bytes in sizes.items():
        places[name] = end
        end += slot_bytes(base, n_bytes)
    entries = [(t.name, t.shape, kept[t.name], places[t.name]) for t in base.tensors.values()]
    header = pack_header(metadata.values(), entries, base.alignment)
    begin = len(header)
    offsets = {name: begin + at for name, at in places.items()}
    return Layout(header, offsets, sizes, kept, begin + end)


def pack_header(
    fields: Collection[Field],
    tensors: Sequence[tuple[str, tuple[int, ...], QuantType, int]],
    alignment: int,
) -> bytes:
    """Return the bytes of a file up to its first tensor. `tensors` are in the file's order: name,
    shape rows first, type, and offset from the first.
    """
    parts = [struct.pack("<4sIQQ", b"GGUF", GGUF_VERSION, len(tensors), len(fields))]
    parts += [field.packed() for field in fields]
    for name, shape, qtype, offset in tensors:
        n = len(shape)
        parts.append(packed_text(name))
        parts.append(struct.pack(f"<I{n}QIQ", n, *shape[::-1], qtype.ggml, offset))
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)


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
    harmless. A thread writes, one slot at a time, while the next is computed.
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
        self._file = self._partial.open("r+b", buffering=0)
        self._thread = ThreadPoolExecutor(1, "slots")
        self._pending: Future[None] | None = None

    def _is_begun(self) -> bool:
        if not self._partial.exists() or self._partial.stat().st_size != self.layout.n_bytes:
            return False
        with self._partial.open("rb") as file:
            return file.read(len(self.layout.header)) == self.layout.header

    def write(self, name: str, packed: native.Bytes) -> None:
        """Fill a tensor's slot with its packed rows, uint8 (n_rows, row_bytes), which stay as they
        are: they are written while the caller goes on. What went wrong then is raised by the next
        call.

        Raises ValueError when they are not the slot's size: they would run into the next tensor.
        """
        if packed.nbytes != self.layout.sizes[name]:
            raise ValueError(
                f"{name} takes {self.layout.sizes[name]:,} bytes, not {packed.nbytes:,}"
            )
        self._wait()
        data = np.ascontiguousarray(packed).reshape(-1).view(np.uint8)
        self._pending = self._thread.submit(self._put, data, self.layout.offsets[name])

    def _put(self, data: native.Bytes, at: int) -> None:
        is_large = len(data) >= _LARGE
        while len(data):  # a call writes 2 GiB at most
            n_bytes = os.pwrite(self._file.fileno(), data.data, at)
            data, at = data[n_bytes:], at + n_bytes
        if is_large:  # now, and not while the caller waits in `flush`
            if sys.platform == "linux":
                os.fdatasync(self._file.fileno())
            else:
                os.fsync(self._file.fileno())

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def read(self, name: str) -> native.Bytes:
        """Return the bytes of a slot as they were written: uint8 (n_bytes,)."""
        self._wait()
        self._file.seek(self.layout.offsets[name])
        found = np.empty(self.layout.sizes[name], np.uint8)
        left = found.data
        while left:
            left = left[self._file.readinto(left) :]
        return found

    def flush(self) -> None:
        """Have everything written so far on the disk."""
        self._wait()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Give the file its name, now that all slots are filled."""
        self.flush()
        self.close()
        os.replace(self._partial, self.path)

    def close(self) -> None:
        """Close the file, the last slot written."""
        self._wait()
        self._thread.shutdown()
        self._file.close()
