"""Read the header of a GGUF, its metadata and table of tensors, with bounds before anything is
allocated. The file may be anybody's, and whatever is wrong with it is a `Broken`.

gguf-py's own reader believes counts and lengths, makes several arrays of every item, and raises
whatever numpy or struct raise.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType

from quantkit.ggml.types import KNOWN, QuantType
from quantkit.gguf_file.fields import LENGTH, SCALARS, Field, pass_texts

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
# Far above what any model has; with them the largest header takes seconds and some 100 MB.
_MOST_TENSORS = _MOST_KEYS = 65_536
_MOST_ITEMS = 8_000_000  # of all arrays together; a vocabulary of 262k has a million
_MOST_BYTES = 256 * 2**20
_WINDOW, _PER_TEXT = 2**18, 64  # bytes that are looked at for texts at once, at most and for each
_MOST_NAME = 256
_MOST_DIMENSIONS = 4
_ALIGNMENTS = tuple(2**i for i in range(3, 17))
_LEAST_KEY, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8  # bytes
_TYPES = {qtype.ggml: qtype for qtype in KNOWN}


class Broken(ValueError):
    """A file is broken: a clause says how."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: shape rows first, byte offset from the start of the file."""

    name: str
    shape: tuple[int, ...]
    qtype: QuantType
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Header:
    fields: Mapping[str, Field]
    tensors: Mapping[str, StoredTensor]
    alignment: int


def shown(name: str) -> str:
    """Return a name that a stranger gave, short and without control characters, for a sentence."""
    cut = name if len(name) <= 100 else f"{name[:100]}..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


def read_header(path: Path) -> Header:
    """Raise OSError for a file that cannot be read, Broken for one that is not a whole GGUF."""
    with path.open("rb") as file:
        n_bytes = path.stat().st_size
        if n_bytes < 24:
            raise Broken("it is too short")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data, n_bytes).header()


class _Cursor:
    """Reads on from where it is, and never beyond the end."""

    def __init__(self, data: mmap.mmap, n_bytes: int) -> None:
        self._data, self._n_bytes, self._at = data, n_bytes, 0
        self._n_items = 0

    def header(self) -> Header:
        if self._data[:4] != b"GGUF":
            raise Broken("it does not start with GGUF")
        self._at = 4
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise Broken(f"it is of version {version}, and not 2 or 3 of little-endian GGUF")
        n_tensors, n_keys = self._scalar("Q"), self._scalar("Q")
        self._check_count(n_tensors, _LEAST_TENSOR, _MOST_TENSORS, "tensors")
        self._check_count(n_keys, _LEAST_KEY, _MOST_KEYS, "keys of metadata")
        fields: dict[str, Field] = {}
        for _ in range(n_keys):
            field = self._field()
            if field.name in fields:
                raise Broken(f"it has {shown(field.name)} twice")
            fields[field.name] = field
        alignment = _alignment(fields)
        infos = [self._tensor() for _ in range(n_tensors)]
        begin = -(-self._at // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        for name, shape, qtype, offset in infos:
            if name in tensors:
                raise Broken(f"it has the tensor {shown(name)} twice")
            if offset % alignment:
                raise Broken(f"{shown(name)} does not lie at a multiple of {alignment} bytes")
            tensors[name] = StoredTensor(name, shape, qtype, begin + offset, qtype.n_bytes(shape))
        _check_places(tensors, self._n_bytes)
        return Header(fields, tensors, alignment)

    def _take(self, n_bytes: int) -> int:
        """Where the next bytes begin."""
        at, self._at = self._at, self._at + n_bytes
        if self._at > self._n_bytes:
            raise Broken("it ends in the middle")
        if self._at > _MOST_BYTES:
            raise Broken(f"its header has more than {_MOST_BYTES:,} bytes")
        return at

    def _check_count(self, n: int, least: int, most: int, what: str) -> None:
        if n > most:
            raise Broken(f"it says that it has {n:,} {what}")
        if n * least > self._n_bytes - self._at:
            raise Broken("it ends in the middle")

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self._take(struct.calcsize(code)))
        return value

    def _bytes(self) -> bytes:
        n = self._scalar("Q")
        at = self._take(n)
        return self._data[at : at + n]

    def _name(self) -> str:
        try:
            name = self._bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise Broken("a name in it is not UTF-8") from error
        if not 0 < len(name) <= _MOST_NAME or "\0" in name:
            raise Broken(f"{shown(name)!r} is no name")
        return name

    def _kind(self) -> GGUFValueType:
        number = self._scalar("I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise Broken(f"it has a value of the unknown kind {number}") from None

    def _field(self) -> Field:
        name, kind = self._name(), self._kind()
        if kind != GGUFValueType.ARRAY:
            return Field(name, kind, self._values(kind, 1))
        item, n = self._kind(), self._scalar("Q")
        if item == GGUFValueType.ARRAY:
            raise Broken(f"{shown(name)} is an array of arrays")
        self._n_items += n
        self._check_count(n, _least(item), _MOST_ITEMS, f"items in {shown(name)}")
        if self._n_items > _MOST_ITEMS:
            raise Broken(f"its arrays have more than {_MOST_ITEMS:,} items")
        return Field(name, kind, self._values(item, n), item, n)

    def _values(self, kind: GGUFValueType, n: int) -> bytes:
        """The bytes of `n` values, gone past."""
        begin = self._at
        if kind != GGUFValueType.STRING:
            self._take(n * _least(kind))
            return self._data[begin : self._at]
        try:
            self._pass_texts(n)
        except UnicodeDecodeError as error:
            raise Broken("a text in it is not UTF-8") from error
        return self._data[begin : self._at]

    def _pass_texts(self, n: int) -> None:
        while n > 0:
            window = self._data[self._at : self._at + min(_WINDOW, n * _PER_TEXT)]
            n_passed, n_bytes = pass_texts(window, n)
            self._take(n_bytes)
            if not n_passed:  # the next one may be larger than a window
                self._bytes().decode("utf-8")
                n_passed = 1
            n -= n_passed

    def _tensor(self) -> tuple[str, tuple[int, ...], QuantType, int]:
        name, n_dimensions = self._name(), self._scalar("I")
        if not 0 < n_dimensions <= _MOST_DIMENSIONS:
            raise Broken(f"{shown(name)} has {n_dimensions:,} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(n_dimensions))[::-1]
        number, offset = self._scalar("I"), self._scalar("Q")
        qtype = _TYPES.get(number)
        if qtype is None:
            raise Broken(f"{shown(name)} is of a type that is not known here, number {number}")
        if 0 in shape:
            raise Broken(f"{shown(name)} has no elements")
        if not qtype.fits(shape[-1]):
            raise Broken(f"rows of {shape[-1]:,} of {shown(name)} are no whole blocks of {qtype}")
        return name, shape, qtype, offset


def _least(kind: GGUFValueType) -> int:
    """The bytes that a value takes at least."""
    return LENGTH.size if kind == GGUFValueType.STRING else struct.calcsize(SCALARS[kind])


def _alignment(fields: Mapping[str, Field]) -> int:
    field = fields.get("general.alignment")
    if field is None:
        return _DEFAULT_ALIGNMENT
    if field.kind != GGUFValueType.UINT32 or field.value not in _ALIGNMENTS:
        raise Broken("its alignment is no power of two that can be meant")
    return int(field.value)


def _check_places(tensors: Mapping[str, StoredTensor], n_bytes: int) -> None:
    """All within the file, none in another."""
    end, before = 0, ""
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        if tensor.offset < end:
            raise Broken(f"{shown(tensor.name)} lies in {shown(before)}")
        end, before = tensor.offset + tensor.n_bytes, tensor.name
        if end > n_bytes:
            raise Broken(f"it ends before {shown(tensor.name)} does")
