"""Check the headers of safetensors files against their sizes, and scan their weights.

A file is 8 bytes (little endian: n), n bytes of JSON (tensor name -> dtype, shape, offsets), and
the tensors' bytes without gaps. The checks are those of the safetensors library, made here on a
header alone, so that a truncated file on the Hub is refused before it is downloaded. A stranger
wrote the header: what parsing it can cost is bounded first, by what models of today need.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.sandbox.untrusted import Damaged, integer

LENGTH_BYTES = 8
# A model of a trillion parameters, its experts one by one and packed with three tensors each, has
# 210,000 tensors in 60 files and 30 MB of headers; one of 30 billion in a single file has 19,000.
MAX_HEADER_BYTES = 32_000_000
MAX_TENSORS = 100_000
MAX_TENSORS_IN_ALL, MAX_HEADERS_IN_ALL = 500_000, 200_000_000
MAX_DIMENSIONS = 8
MAX_NAME = 500  # characters
_MAX_DTYPE = 16
_COMMAS = 4 + MAX_DIMENSIONS  # of one tensor
_LIBRARY_BYTES = 100_000_000  # the safetensors library's own limit of a header
_CHUNK_BYTES = 1 << 20  # stays in the second-level cache between the passes

DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}

# A float is infinite or not a number when all bits of its exponent are set. 8-bit floats are not
# looked at: their scales, stored as F32, are.
_EXPONENT_BITS: dict[str, np.unsignedinteger[Any]] = {
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
    "F32": np.uint32(0x7F80_0000),
    "F64": np.uint64(0x7FF0_0000_0000_0000),
}

# Constants that old checkpoints store beside the weights; the converter drops them too.
_IGNORED = (
    ".attention.masked_bias",
    ".attention.bias",
    ".attn.masked_bias",
    ".rotary_emb.inv_freq",
)

_REMEDY = "Download the model again; if the file is like this on the Hub, tell its author."


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file; `start` and `stop` count from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file. Tensors are in the order of their bytes."""

    n_bytes: int  # of the length field and the JSON
    tensors: tuple[StoredTensor, ...]

    @property
    def n_file_bytes(self) -> int:
        return self.n_bytes + (self.tensors[-1].stop if self.tensors else 0)


@dataclass(frozen=True)
class Scan:
    """The result of reading a whole file."""

    sha256: str | None  # None where it was not asked for
    non_finite: str | None  # the first tensor with NaN or infinite weights


def header_length(start: bytes, name: str) -> int:
    """Return the bytes of length field and JSON together, from the first 8 bytes of the file.

    Raises QuantkitError when no safetensors file starts like this.
    """
    if len(start) < LENGTH_BYTES:
        raise QuantkitError(f"{name} is truncated: it has only {len(start)} bytes.", _REMEDY)
    n_json = int.from_bytes(start[:LENGTH_BYTES], "little")
    if MAX_HEADER_BYTES < n_json <= _LIBRARY_BYTES:
        raise QuantkitError(
            f"{name} has a header of {n_json:,} bytes, more than any known model"
            f" ({MAX_HEADER_BYTES:,}).",
            "Save the model again in several files.",
        )
    if not 2 <= n_json <= MAX_HEADER_BYTES:
        raise QuantkitError(f"{name} is broken: it does not start like safetensors.", _REMEDY)
    return LENGTH_BYTES + n_json


def parse_header(data: bytes, name: str, n_file_bytes: int) -> Header:
    """Parse the header at the start of `data`, checked against a file of `n_file_bytes`.

    Raises QuantkitError when the header is malformed or does not describe exactly this many bytes.
    """
    n_header = header_length(data, name)
    if n_file_bytes < n_header or len(data) < n_header:
        raise QuantkitError(f"{name} is truncated: it ends inside its header.", _REMEDY)
    try:
        entries = _entries(data[LENGTH_BYTES:n_header])
        tensors = [
            _stored_tensor(tensor, entry)
            for tensor, entry in entries.items()
            if tensor != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f" ({error})" if isinstance(error, Damaged) else ""
        raise QuantkitError(f"{name} is broken: its header cannot be read{why}.", _REMEDY) from None
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    end = 0
    for tensor in tensors:
        if tensor.start != end:
            raise QuantkitError(
                f"{name} is broken: the bytes of {tensor.name} overlap others or leave a gap.",
                _REMEDY,
            )
        end = tensor.stop
    header = Header(n_header, tuple(tensors))
    if header.n_file_bytes > n_file_bytes:
        raise QuantkitError(
            f"{name} is truncated: its header describes {header.n_file_bytes:,} bytes and the "
            f"file has {n_file_bytes:,}.",
            _REMEDY,
        )
    if header.n_file_bytes < n_file_bytes:
        raise QuantkitError(
            f"{name} is broken: it has {n_file_bytes - header.n_file_bytes:,} bytes more than its "
            "header describes.",
            _REMEDY,
        )
    return header


def _entries(text: bytes) -> dict[str, object]:
    """The JSON of a header. Raises Damaged before it is parsed when it has more lists, objects or
    values than MAX_TENSORS tensors have, and ValueError for what is not JSON.
    """
    counts = (text.count(b"{"), text.count(b"[") // 2, text.count(b",") // _COMMAS)
    if max(counts) > MAX_TENSORS + 2:  # the header itself and its metadata
        raise Damaged(f"more than {MAX_TENSORS:,} tensors in one file, or long lists")
    entries: dict[str, object] = json.loads(
        text.decode("utf-8"),
        parse_int=integer,
        parse_float=_no_float,
        parse_constant=_no_float,
        object_pairs_hook=_without_repeats,
    )
    return entries


def _no_float(text: str) -> float:
    raise Damaged("a number that is not whole")


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The one reader takes the first of two tensors of a name, the next reader the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Damaged("it has a name twice")
    return found


def _stored_tensor(name: str, entry: Any) -> StoredTensor:
    """Raises ValueError, KeyError or TypeError when `entry` is not one tensor's description."""
    dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if len(name) > MAX_NAME or not name.isprintable():  # it would be shown to the user
        raise Damaged("an invalid name")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise Damaged(f"a tensor of more than {MAX_DIMENSIONS} dimensions")
    if not isinstance(dtype, str) or len(dtype) > _MAX_DTYPE or not dtype.isprintable():
        raise ValueError("not a dtype")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("not a shape")
    if not (type(start) is int and type(stop) is int and 0 <= start <= stop):
        raise ValueError("not offsets")
    tensor = StoredTensor(name, dtype, tuple(shape), start, stop)
    if dtype in DTYPE_BYTES and stop - start != tensor.n_elements * DTYPE_BYTES[dtype]:
        raise ValueError("offsets that do not fit the shape")
    return tensor


class Count:
    """Adds up the headers of one model. Safe in several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_tensors = self._n_bytes = 0

    def add(self, header: Header) -> Header:
        """Count the header and return it. Raises QuantkitError when the model has more than any
        known one.
        """
        with self._lock:
            self._n_tensors += len(header.tensors)
            self._n_bytes += header.n_bytes
            many = self._n_tensors > MAX_TENSORS_IN_ALL or self._n_bytes > MAX_HEADERS_IN_ALL
        if many:
            raise QuantkitError(
                f"The model has more than {MAX_TENSORS_IN_ALL:,} tensors, more than any known"
                " model.",
                "Check where it came from.",
            )
        return header


def read_header(path: Path) -> Header:
    """Read the header of a file on disk. Raises QuantkitError when the file is broken or
    truncated.
    """
    return parse_header(header_bytes(path), path.name, path.stat().st_size)


def header_bytes(path: Path) -> bytes:
    """Read the length field and the JSON as they are stored. Raises QuantkitError when cut
    short.
    """
    with path.open("rb") as file:
        start = file.read(LENGTH_BYTES)
        return start + file.read(header_length(start, path.name) - LENGTH_BYTES)


def write_shell(path: Path, header: bytes, n_file_bytes: int) -> None:
    """Write a file of the right name, header and size whose weights are a hole: it takes no disk,
    and reads as zeros. The converter makes a skeleton of a model from it that was never downloaded.
    """
    with path.open("wb") as file:
        file.write(header)
        file.truncate(n_file_bytes)


def write_shell_of(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Write the shell of `{name: (dtype, shape)}`."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the library aligns the data to 8 bytes
    header_bytes = len(text).to_bytes(LENGTH_BYTES, "little") + text
    write_shell(path, header_bytes, len(header_bytes) + end)


def scan(
    path: Path, *, hashing: bool = False, on_bytes: Callable[[int], None] | None = None
) -> Scan:
    """Read the whole file once: look for NaN and infinite weights, and hash it when asked.

    `on_bytes` is called with the number of bytes just read. Stops at the first bad tensor. Raises
    QuantkitError when the header is malformed or the file ends early.
    """
    header = read_header(path)
    sha256 = hashlib.sha256() if hashing else None
    buffer = np.empty(_CHUNK_BYTES, np.uint8)
    masked = np.empty(_CHUNK_BYTES, np.uint8)
    with path.open("rb", buffering=0) as file:
        regions = [("", "", header.n_bytes)]
        regions += [(t.name, t.dtype, t.stop - t.start) for t in header.tensors]
        for name, dtype, n_left in regions:
            bits = None if name.endswith(_IGNORED) else _EXPONENT_BITS.get(dtype)
            while n_left:
                chunk = buffer[: min(n_left, _CHUNK_BYTES)]
                _fill(file, chunk, path)
                n_left -= chunk.nbytes
                if sha256 is not None:
                    sha256.update(chunk.data)
                if bits is not None and _has_exponent(chunk, bits, masked):
                    return Scan(None, name)
                if on_bytes is not None:
                    on_bytes(chunk.nbytes)
    return Scan(None if sha256 is None else sha256.hexdigest(), None)


def _has_exponent(chunk: np.ndarray, bits: np.unsignedinteger[Any], scratch: np.ndarray) -> bool:
    """Whether any float of the chunk has all the exponent's bits set. Two vectorised passes."""
    floats = chunk.view(bits.dtype)
    masked = scratch[: chunk.nbytes].view(bits.dtype)
    np.bitwise_and(floats, bits, out=masked)
    return bool(masked.max() == bits)


def _fill(file: Any, chunk: np.ndarray, path: Path) -> None:
    """Read until `chunk` is full. Raises QuantkitError at an early end of the file."""
    view, n_read = chunk.data, 0
    while n_read < len(view):
        n = file.readinto(view[n_read:])
        if not n:
            raise QuantkitError(f"{path.name} was cut short while it was read.", _REMEDY)
        n_read += n
