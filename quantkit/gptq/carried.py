"""Rows that a quantized source has itself: what convert carried over competes with what is made
here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open

from quantkit.ggml import native
from quantkit.ggml.types import QuantType


def carried_files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by the tensors whose rows they hold; none where it is not."""
    return {path.name.removesuffix(path.suffix): path for path in sorted(folder.glob("*"))}


def carried_rows(
    files: Mapping[str, Path], tensor: str, types: Sequence[QuantType], rows: slice
) -> dict[tuple[QuantType, str], native.Bytes]:
    """Return some rows of a tensor in those of `types` that hold them, by type and method: uint8
    (n_rows, row_bytes).
    """
    path = files.get(tensor)
    if path is None:
        return {}
    with safe_open(path, "np") as file:
        keys = [key.split("/") for key in file.keys()]
        return {
            (QuantType(name), method): file.get_slice(f"{name}/{method}")[rows]
            for name, method in keys
            if QuantType(name) in types
        }
