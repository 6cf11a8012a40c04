"""Cut a GGUF into parts of at most so many bytes, and know what the parts are together.

The rules are those of llama.cpp's tools/gguf-split: tensors stay in their order, so that a part is
a header and one slice of the whole file, which is copied on the way through a small buffer. Other
than there the header counts, too: no part is larger than was asked for, unless it is one tensor.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from gguf import GGUFValueType

from quantkit.errors import QuantkitError
from quantkit.files import replacing
from quantkit.gguf_file.fields import Field
from quantkit.gguf_file.header import StoredTensor
from quantkit.gguf_file.parts import COUNT, MOST, N_TENSORS, NUMBER, part_name
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.write import pack_header, slot_bytes

_ALIGNMENT, _DEFAULT = "general.alignment", 32
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class Part:
    """A part before it is written: its header, and the slice of the whole file that follows it."""

    name: str
    header: bytes
    begin: int
    end: int

    @property
    def n_bytes(self) -> int:
        return len(self.header) + self.end - self.begin


def cut(path: Path, most: int) -> tuple[Part, ...]:
    """Return the parts of a GGUF of more than `most` bytes, in order; none of a smaller one.
    Nothing is written.

    Raises QuantkitError for what is not a whole GGUF, and for more parts than llama.cpp can count.
    """
    n_bytes = path.stat().st_size
    if n_bytes <= most:
        return ()
    file = GgufFile(path)
    tensors = sorted(file.tensors.values(), key=lambda tensor: tensor.offset)
    ends = [tensor.offset for tensor in tensors[1:]] + [n_bytes]  # padding goes with its tensor
    groups: list[list[StoredTensor]] = []
    left = 0  # bytes that the part which is being filled may still take
    for tensor, end in zip(tensors, ends, strict=True):
        n = _entry_bytes(tensor) + end - tensor.offset
        if not groups or n > left:
            left = most - len(_header(file, len(groups), MOST, ())) - file.alignment
            groups.append([])
        groups[-1].append(tensor)
        left -= n
    if len(groups) > MOST:
        raise QuantkitError(
            f"{path.name} would be {len(groups):,} parts, and llama.cpp counts up to {MOST:,}.",
            "Allow larger parts.",
        )
    n, stem = len(groups), path.name.removesuffix(".gguf")
    places = pairwise([*(group[0].offset for group in groups), n_bytes])
    return tuple(
        Part(part_name(stem, i, n), _header(file, i, n, group), begin, end)
        for i, (group, (begin, end)) in enumerate(zip(groups, places, strict=True))
    )


def _header(file: GgufFile, number: int, n_parts: int, tensors: Sequence[StoredTensor]) -> bytes:
    fields = dict(file.fields) if number == 0 else {}
    if file.alignment != _DEFAULT:  # gguf-split leaves it out of all but the first
        fields[_ALIGNMENT] = file.fields[_ALIGNMENT]
    fields |= {
        NUMBER: Field(NUMBER, GGUFValueType.UINT16, struct.pack("<H", number)),
        N_TENSORS: Field(N_TENSORS, GGUFValueType.INT32, struct.pack("<i", len(file.tensors))),
        COUNT: Field(COUNT, GGUFValueType.UINT16, struct.pack("<H", n_parts)),
    }
    begin = tensors[0].offset if tensors else 0
    entries = [(t.name, t.shape, t.qtype, t.offset - begin) for t in tensors]
    return pack_header(fields.values(), entries, file.alignment)


def _entry_bytes(tensor: StoredTensor) -> int:
    """The bytes of a tensor's row in a header."""
    return len(pack_header((), [(tensor.name, tensor.shape, tensor.qtype, 0)], 1)) - len(
        pack_header((), (), 1)
    )


def write(whole: Path, part: Part, target: Path) -> None:
    """Write a part of the file `whole`; it has its name only when it is whole."""
    with replacing(target) as partial, partial.open("wb") as out:
        for data in _stream(whole, part):
            out.write(data)


def sha256(whole: Path, part: Part) -> str:
    """Return the hex sha256 of a part, whether it is written or not."""
    digest = hashlib.sha256()
    for data in _stream(whole, part):
        digest.update(data)
    return digest.hexdigest()


def _stream(whole: Path, part: Part) -> Iterator[bytes]:
    yield part.header
    yield from _slice(whole, part.begin, part.end)


def _slice(path: Path, begin: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(begin)
        while begin < end:
            data = file.read(min(_BLOCK_BYTES, end - begin))
            if not data:
                raise QuantkitError(f"{path.name} became shorter while it was read.")
            begin += len(data)
            yield data


def whole_sha256(file: GgufFile) -> str:
    """Return the hex sha256 of the file that `cut` made these parts of."""
    entries, end = [], 0
    for tensor in file.tensors.values():
        entries.append((tensor.name, tensor.shape, tensor.qtype, end))
        end += slot_bytes(file, tensor.n_bytes)
    digest = hashlib.sha256(pack_header(file.fields.values(), entries, file.alignment))
    for path in file.paths:
        here = [t.offset for t in file.tensors.values() if file.places[t.name] == path]
        for data in _slice(path, min(here), path.stat().st_size):
            digest.update(data)
    return digest.hexdigest()
