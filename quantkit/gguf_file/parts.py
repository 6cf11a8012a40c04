"""Models in several files, as llama.cpp's `gguf-split` writes them: NAME-00001-of-00003.gguf has
all metadata, each file says which part it is and of how many, and has some of the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantkit.gguf_file.fields import Field
from quantkit.gguf_file.header import Broken, StoredTensor, read_header, shown

NUMBER, COUNT, N_TENSORS = "split.no", "split.count", "split.tensors.count"
MOST = 65_535  # what 16 bits count

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class Whole:
    """A model in one file or in parts: metadata without what is said of parts, tensors in order,
    and the file that each lies in.
    """

    paths: tuple[Path, ...]
    fields: Mapping[str, Field]
    tensors: Mapping[str, StoredTensor]
    places: Mapping[str, Path]
    alignment: int


def part_name(stem: str, number: int, n_parts: int) -> str:
    """Return the name of a part; `number` counts from 0."""
    return f"{stem}-{number + 1:05d}-of-{n_parts:05d}.gguf"


def part_names(first: str) -> tuple[str, ...]:
    """Return the names of all parts of a model of which this is the first; the name alone of any
    other file.
    """
    match = _NAME.fullmatch(first)
    if match is None or int(match[2]) != 1:
        return (first,)
    return tuple(part_name(match[1], i, int(match[3])) for i in range(int(match[3])))


def stem_of(name: str) -> str | None:
    """Return what the parts of a model are called after; None of a name that is no part's."""
    match = _NAME.fullmatch(name)
    return match[1] if match else None


def read_whole(path: Path) -> Whole:
    """Read the headers of a model, given its file or its first part.

    Raises OSError for a file that cannot be read, Broken for one that is not a whole GGUF, a later
    part, or parts that do not belong together.
    """
    header = read_header(path)
    n_parts = _whole_number(header.fields, COUNT)
    if n_parts <= 1:
        places = dict.fromkeys(header.tensors, path)
        return Whole((path,), header.fields, header.tensors, places, header.alignment)
    names = part_names(path.name)
    number = _whole_number(header.fields, NUMBER)
    if number != 0:
        raise Broken(f"it is part {number + 1} of {n_parts}, and the first is what to open")
    if len(names) != n_parts:
        raise Broken(f"it is the first of {n_parts} parts, and not called {_example(n_parts)}")
    tensors = dict(header.tensors)
    places = dict.fromkeys(tensors, path)
    paths = [path.with_name(name) for name in names]
    for i, other in enumerate(paths[1:], 1):
        try:
            part = read_header(other)
        except FileNotFoundError:
            raise Broken(f"its part {shown(other.name)} is missing") from None
        except Broken as error:
            raise Broken(f"its part {shown(other.name)} is broken: {error}") from None
        if _whole_number(part.fields, NUMBER) != i:
            raise Broken(f"{shown(other.name)} is another part than its name says")
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise Broken(f"its parts have the tensor {shown(name)} twice")
            tensors[name], places[name] = tensor, other
    if _whole_number(header.fields, N_TENSORS) != len(tensors):
        raise Broken(f"its parts have {len(tensors):,} tensors, and it says another number")
    said = {NUMBER, COUNT, N_TENSORS}
    fields = {name: field for name, field in header.fields.items() if name not in said}
    return Whole(tuple(paths), fields, tensors, places, header.alignment)


def _whole_number(fields: Mapping[str, Field], name: str) -> int:
    """A number of the metadata; 0 where it is missing or something else, as llama.cpp has it."""
    field = fields.get(name)
    value = None if field is None else field.value
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _example(n_parts: int) -> str:
    return part_name("NAME", 0, n_parts)
