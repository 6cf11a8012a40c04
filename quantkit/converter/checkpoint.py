"""Headers of safetensors files: read and checked, or written as a shell without data.

A safetensors file is 8 bytes (the length of the header, little endian), the header as JSON
(`{name: {"dtype", "shape", "data_offsets": [begin, end]}}`) and the data. A *shell* has the header
of the real file and a hole instead of the data: the converter reads shapes and types from it, so a
skeleton GGUF (`convert(skeleton=True)`) can be made of a model that was never downloaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import QuantkitError

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}


@dataclass(frozen=True)
class StoredTensor:
    """One entry of a header."""

    dtype: str
    shape: tuple[int, ...]
    n_bytes: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Names, types and shapes of a safetensors file.

    Raises QuantkitError where the file is truncated or its header makes no sense.
    """
    remedy = "Download the file again."
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise QuantkitError(f"{path.name} is truncated or no safetensors file.", remedy)
        header = file.read(length)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {}
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            tensor = StoredTensor(entry["dtype"], tuple(map(int, entry["shape"])), end - begin)
            item = ITEM_BYTES.get(tensor.dtype)
            if begin < 0 or end < begin or min(tensor.shape, default=0) < 0:
                raise ValueError(f"{name} has impossible offsets")
            if item is not None and tensor.n_elements * item != tensor.n_bytes:
                raise ValueError(f"{name} has {tensor.n_bytes} bytes for shape {tensor.shape}")
            if end > size - 8 - length:
                raise QuantkitError(
                    f"{path.name} is truncated: the data of {name} ends beyond its end.", remedy
                )
            tensors[name] = tensor
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise QuantkitError(f"The header of {path.name} is broken: {error}.", remedy) from None
    return tensors


def write_shell(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Write a safetensors file of `{name: (dtype, shape)}` whose data is a hole: it takes no disk
    but its header, and reads as zeros.
    """
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the library aligns the data to 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
