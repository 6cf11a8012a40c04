"""Metadata of a GGUF: pairs are kept as the bytes they are stored as, and decoded when asked for.

A vocabulary is 100,000s of texts behind their lengths, which most readers only want to go past, and
every file that is laid out like another takes over as they are.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from gguf import GGUFValueType

SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
LENGTH = struct.Struct("<Q")
_SHORT = 256  # bytes: what a length of one byte says
_MANY, _BY_HAND = 1000, 256  # texts


@dataclass(frozen=True)
class Field:
    """One metadata pair; `item` is the kind of an array's `n_items`. `stored` is the value as the
    file has it, of an array its items.
    """

    name: str
    kind: GGUFValueType
    stored: bytes
    item: GGUFValueType | None = None
    n_items: int = 1

    @classmethod
    def string(cls, name: str, value: str) -> Field:
        return cls(name, GGUFValueType.STRING, packed_text(value))

    @classmethod
    def uint32(cls, name: str, value: int) -> Field:
        return cls(name, GGUFValueType.UINT32, struct.pack("<I", value))

    @classmethod
    def strings(cls, name: str, values: Sequence[str]) -> Field:
        stored = b"".join(map(packed_text, values))
        return cls(name, GGUFValueType.ARRAY, stored, GGUFValueType.STRING, len(values))

    @cached_property
    def value(self) -> Any:
        """The value, decoded: of an array a list."""
        item = self.kind if self.item is None else self.item
        if item == GGUFValueType.STRING:
            values = _texts(self.stored, self.n_items)
        else:
            values = list(struct.unpack(f"<{self.n_items}{SCALARS[item]}", self.stored))
        return values[0] if self.item is None else values

    def packed(self) -> bytes:
        """Return the pair as a file has it."""
        head = packed_text(self.name) + struct.pack("<I", self.kind)
        if self.item is not None:
            head += struct.pack("<IQ", self.item, self.n_items)
        return head + self.stored


def packed_text(value: str) -> bytes:
    """Return a text as a file has it, behind its length."""
    data = value.encode()
    return LENGTH.pack(len(data)) + data


def _texts(stored: bytes, n: int) -> list[str]:
    found, at = [], 0
    for _ in range(n):
        (n_bytes,) = LENGTH.unpack_from(stored, at)
        end = at + 8 + n_bytes
        found.append(str(stored[at + 8 : end], "utf-8"))
        at = end
    return found


def pass_texts(window: bytes, most: int) -> tuple[int, int]:
    """Go past at most `most` texts, each behind its length in eight bytes, from the start of a
    window to the last that lies whole in it.

    A length below 256 is a byte before seven zeros, and hardly anything else is. So all places that
    look like one are found at once; as far as each leads to the next they are what they look like.
    From where one does not, some lengths are followed one by one.

    Returns:
        How many texts, and the bytes that they take.

    Raises:
        UnicodeDecodeError: one of them is not UTF-8.
    """
    end, padded = len(window), window + b"\xff" * 8  # behind it no length can be true
    places = ends = stops = np.zeros(0, np.int64)
    if most >= _MANY:
        # The eight bytes from every place on, as a number.
        numbers = np.ndarray(end + 1, "<u8", padded, strides=(1,))
        places = np.flatnonzero(numbers < _SHORT)
        ends = places + 8 + numbers[places].astype(np.int64)
        places, ends = places[ends <= end], ends[ends <= end]
        stops = np.flatnonzero(np.append(ends[:-1] != places[1:], True))
    texts = np.frombuffer(window, np.uint8).copy()  # without the lengths they are decoded as one
    by_hand: list[int] = []
    n, at, before = 0, 0, -1
    while before < at and n < most:
        before = at
        first = int(np.searchsorted(places, at))
        if first < len(places) and places[first] == at:
            last = min(int(stops[np.searchsorted(stops, first)]), first + most - n - 1)
            texts[places[first : last + 1]] = 0
            n, at = n + last + 1 - first, int(ends[last])
        for _ in range(min(_BY_HAND, most - n)):
            behind = at + 8 + LENGTH.unpack_from(padded, at)[0]
            if behind > end:
                break
            by_hand.append(at)
            n, at = n + 1, behind
    texts[np.array(by_hand, np.int64)[:, None] + np.arange(8)] = 0
    str(texts[:at].data, "utf-8")
    return n, at
