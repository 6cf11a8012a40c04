"""Safetensors files written as shells: headers without data.

A safetensors file is 8 bytes (the length of the header, little endian), the header as JSON
(`{name: {"dtype", "shape", "data_offsets": [begin, end]}}`) and the data. A *shell* has the header
of the real file and a hole instead of the data: the converter reads shapes and types from it, so a
skeleton GGUF (`convert(skeleton=True)`) can be made of a model that was never downloaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}


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
