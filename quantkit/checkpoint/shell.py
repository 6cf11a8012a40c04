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

from quantkit.checkpoint.safetensors import DTYPE_BYTES


def write_shell(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Write a safetensors file of `{name: (dtype, shape)}` whose data is a hole: it takes no disk
    but its header, and reads as zeros.
    """
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the library aligns the data to 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
