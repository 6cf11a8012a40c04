"""Reading GGUF files: tensor table, raw rows (memory-mapped), metadata."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt

from quantkit.errors import QuantkitError
from quantkit.kquants import native
from quantkit.qtypes import QuantType


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: shape rows first, byte offset from the start of the file."""

    name: str
    shape: tuple[int, ...]
    qtype: QuantType
    offset: int
    n_bytes: int


class _Reader(gguf.GGUFReader):
    """gguf's reader, held to the file's end: its own slices are shorter there without a word, and
    an array of 2**40 items would be walked to its end.
    """

    def _get(
        self,
        offset: int,
        dtype: npt.DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> npt.NDArray[Any]:
        kind = np.dtype(dtype).newbyteorder(override_order or self.byte_order)
        if int(offset) + kind.itemsize * int(count) > len(self.data):
            raise ValueError("it ends in the middle")
        # Slices of numpy's memory maps are slow, and vocabularies have 100,000s of items.
        return np.frombuffer(self.data, kind, int(count), int(offset))


class GgufFile:
    """A GGUF file opened for reading. Tensor bytes are memory-mapped, never copied unless asked."""

    def __init__(self, path: Path) -> None:
        """Raises QuantkitError when the file is missing, truncated or not GGUF."""
        self.path = path
        try:
            self.reader = _Reader(path)
        except FileNotFoundError:
            raise QuantkitError(f"There is no file {path}.", "Check the path.") from None
        except (
            Exception
        ) as error:  # the reader raises whatever numpy or struct raise on broken files
            raise QuantkitError(
                f"{path.name} is not a whole GGUF file ({error}).", "Download or make it again."
            ) from error
        self.tensors = {
            t.name: StoredTensor(
                t.name,
                tuple(int(n) for n in reversed(t.shape)),
                QuantType.of(t.tensor_type),
                int(t.data_offset),
                int(t.n_bytes),
            )
            for t in self.reader.tensors
        }
        for tensor in self.tensors.values():
            # An offset that wraps around 64 bits ends up before the data.
            if tensor.offset < self.reader.data_offset or 0 in tensor.shape:
                raise QuantkitError(
                    f"{path.name} is broken: {tensor.name} lies in the header or has no elements.",
                    "Download or make it again.",
                )

    def packed(self, name: str) -> native.Bytes:
        """Rows of a tensor as stored: uint8 (n_rows, row_bytes), mapped from the file for as long
        as somebody has them.
        """
        tensor = self.tensors[name]
        shape = (-1, tensor.qtype.row_bytes(tensor.shape[-1]))
        mapped = np.memmap(self.path, np.uint8, "r", tensor.offset, (tensor.n_bytes,))
        return mapped.reshape(shape)

    def values(self, name: str) -> native.Floats:
        """A tensor's values as llama.cpp reads them: float32 (n_rows, n_columns)."""
        return native.dequantize(self.packed(name), self.tensors[name].qtype)

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """All key-value pairs, decoded."""
        fields = self.reader.fields.values()
        return {f.name: f.contents() for f in fields if not f.name.startswith("GGUF.")}

    @property
    def alignment(self) -> int:
        """Tensors begin at multiples of this many bytes."""
        return int(self.reader.alignment)

    @property
    def n_elements(self) -> int:
        return sum(int(np.prod(t.shape)) for t in self.tensors.values())
