"""Do what gguf-py does one value or sixteen rows at a time for all at once: the same bytes. Runs
inside the sandbox, beside the converter's own classes.

Of a model with 262,144 tokens gguf-py packs 786,432 values by a call each. BF16 weights are float32
on their way through the converter, and rounded back in sixteens of rows.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def install() -> None:
    """Put it into the `gguf` that is imported here."""
    import gguf

    pack_one = gguf.GGUFWriter._pack_val
    by_groups = gguf.quants._apply_over_grouped_rows

    def pack(self: Any, val: Any, vtype: Any, add_vtype: bool, sub_type: Any = None) -> bytes:
        is_array = vtype == gguf.GGUFValueType.ARRAY and self.endianess == gguf.GGUFEndian.LITTLE
        packed = packed_items(val) if is_array and sub_type is None else None
        if packed is None:
            return pack_one(self, val, vtype, add_vtype, sub_type)
        head = struct.pack("<I", vtype) if add_vtype else b""
        kind = gguf.GGUFValueType.get_type(val[0])
        return head + struct.pack("<IQ", kind, len(val)) + packed

    def apply(func: Callable[..., Any], arr: Any, otype: Any, oshape: tuple[int, ...]) -> Any:
        if func == gguf.quants.BF16.quantize_rows:
            return to_bfloat16(arr).reshape(oshape)
        return by_groups(func, arr, otype, oshape)

    gguf.GGUFWriter._pack_val = pack  # type: ignore[method-assign]
    gguf.quants._apply_over_grouped_rows = apply


def packed_items(values: Any) -> bytes | None:
    """Return an array's items as a little-endian GGUF has them, None for those of another kind than
    texts, floats or integers, or of several.
    """
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or not values:
        return None
    kinds = set(map(type, values))
    if kinds <= {str, bytes}:
        parts: list[bytes] = []
        for value in values:
            text = value.encode("utf-8") if isinstance(value, str) else value
            parts += (struct.pack("<Q", len(text)), text)
        return b"".join(parts)
    if kinds == {float}:
        return struct.pack(f"<{len(values)}f", *values)
    if all(issubclass(kind, int) and kind is not bool for kind in kinds):  # enums, too
        return struct.pack(f"<{len(values)}i", *values)
    return None


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return float32 values as BF16, rounded to the nearest, to even between two: uint8, two for
    each. What is not a number may get other bits; it is refused when it is written.
    """
    import torch

    floats = torch.from_numpy(np.require(values, np.float32, ["C", "W"]))
    found: np.ndarray = floats.to(torch.bfloat16).view(torch.uint8).numpy()
    return found
