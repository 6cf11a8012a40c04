"""Read values that a stranger, another version or a failing disk may have written: JSON within
bounds, and dataclasses built from it by their annotations.

One mechanism for every record that is read: what passes here is plain, finite, not deep and of the
types that its class declares, so that nothing behind it has to look again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import stat
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from quantkit.errors import QuantkitError

T = TypeVar("T")

MOST_DEPTH = 32
MOST_ITEMS = 2_000_000  # of lists and objects together
MOST_DIGITS = 19  # of an integer: 64 bits
LATEST = 4_102_444_800.0  # the year 2100: no clock is right that is beyond it
_SURROGATE = re.compile(r"\\u[dD][89abAB]")


class Damaged(ValueError):
    """A value is damaged; a clause says how: "it is no object"."""


class Settings(Mapping[str, object]):
    """An object of JSON that somebody wrote for other programs: a model's config.json, the top of
    its card. It is kept whole, and asked by name for what may be there, or of another type.
    """

    def __init__(self, values: Mapping[str, object] | None = None) -> None:
        self._values = dict(values or {})

    def __getitem__(self, name: str) -> object:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    @classmethod
    def parse(cls, data: bytes, name: str) -> Settings:
        """Return those of a file of the model. Raises QuantkitError for what is no object."""
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise QuantkitError(
                f"{name} is not a JSON object.", "Tell the model's author, or use another revision."
            )
        return cls(value)

    @property
    def parts(self) -> tuple[Settings, Settings]:
        """Return a model's own and its text model's, if there are any."""
        return self, self.section("text_config")

    def section(self, name: str) -> Settings:
        """Return the settings within these; empty where there are none."""
        value = self.get(name)
        return Settings(value if isinstance(value, dict) else None)

    def text(self, name: str, otherwise: str = "") -> str:
        """Return a value as text, whatever it is; `otherwise` where it is missing or empty."""
        return str(self.get(name) or otherwise)

    def texts(self, name: str) -> tuple[str, ...]:
        """Return what may be one text or a list of them."""
        value = self.get(name)
        if isinstance(value, str):
            return (value,)
        return tuple(map(str, value)) if isinstance(value, (list, tuple)) else ()

    def integer(self, name: str) -> int:
        """Return a whole number, 0 where there is none."""
        value = self.get(name)
        return value if type(value) is int else 0


def read_json(path: Path, most_bytes: int, most_items: int = MOST_ITEMS) -> Any:
    """Read the JSON of a plain file. Raises Damaged, or OSError if it cannot be opened."""
    return parse(read_bytes(path, most_bytes), most_items)


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """Read all of a plain file. Raises Damaged for anything else, and OSError."""
    with open_plain(path) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise Damaged(f"it is larger than {most_bytes:,} bytes")
    return data


def open_plain(path: Path) -> BinaryIO:
    """Open a plain file for reading. Raises Damaged for anything else: a pipe could block
    forever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Damaged("it is no plain file")
    return os.fdopen(descriptor, "rb")


def parse(data: bytes, most_items: int = MOST_ITEMS) -> Any:
    """Parse JSON as everybody understands it: UTF-8, finite numbers of 64 bits, at most MOST_DEPTH
    deep.

    Raises Damaged. Its cost is bounded before it is parsed: there are no more values than commas
    and brackets.
    """
    if data.count(b",") + data.count(b"[") + data.count(b"{") > most_items:
        raise Damaged("it holds too much")
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text, parse_int=integer, parse_float=_finite, parse_constant=_no_constant
        )
        if _SURROGATE.search(text):  # half a character could not be sent to anybody
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except Damaged:
        raise
    except RecursionError:
        raise Damaged("it is nested too deeply") from None
    except ValueError as error:
        raise Damaged(f"it is not JSON ({' '.join(str(error).split())[:100]})") from None
    _check_depth(value, MOST_DEPTH)
    return value


def integer(text: str) -> int:
    """Parse an integer for json.loads: Python's own takes quadratic time in the number of
    digits.
    """
    if len(text) > MOST_DIGITS + text.startswith("-"):
        raise Damaged(f"it has a number of {len(text):,} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text) if len(text) <= 100 else math.inf
    if not math.isfinite(number):
        raise Damaged(f"it has a number that is none ({text[:20]})")
    return number


def _no_constant(text: str) -> float:
    raise Damaged(f"it has a number that is none ({text})")


def _check_depth(value: Any, left: int) -> None:
    inner = value.values() if isinstance(value, dict) else value
    if not isinstance(value, (dict, list)):
        return
    if not left:
        raise Damaged("it is nested too deeply")
    for item in inner:
        if isinstance(item, (dict, list)):
            _check_depth(item, left - 1)


def build(cls: type[T], value: Any) -> T:
    """Build `cls`, a dataclass, from a JSON object. Names that it does not know are another
    version's and are left out. Raises Damaged where a field is missing or of another type than is
    declared.
    """
    if not isinstance(value, dict):
        raise Damaged("it is no object")
    for name, tag in _tags(typing.cast(Any, cls)).items():
        if value.get(name) != tag:
            raise Damaged(f"its {name} is another")
    fields = _fields(cls, value)
    try:
        return cls(**fields)
    except TypeError:
        missing = sorted(_hints(typing.cast(Any, cls)).keys() - fields.keys())
        raise Damaged(f"it has no {' or '.join(missing)[:100]}") from None


def updated(record: T, value: Any) -> T:
    """`record` with those of its fields that a JSON object has. Raises Damaged as `build` does."""
    return dataclasses.replace(typing.cast(Any, record), **_fields(type(record), value))


def _fields(cls: Any, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Damaged("it is no object")
    hints = _hints(cls)
    return {name: _typed(hints[name], item, name) for name, item in value.items() if name in hints}


@cache
def _hints(cls: Any) -> dict[str, object]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


@cache
def _tags(cls: Any) -> dict[str, object]:
    """Fields that say which class of several this is: what all of its objects have."""
    return {field.name: field.default for field in dataclasses.fields(cls) if not field.init}


def typed(hint: Any, value: Any) -> Any:
    """Return `value` as type `hint` has it: a list can become a tuple, an object a dataclass; a
    class with `from_json` makes itself. Raises Damaged where it is something else.
    """
    return _typed(hint, value, "value")


def _typed(hint: Any, value: Any, name: str) -> Any:
    if hint in (Any, object):
        return value
    if type(value) is hint and hint in (int, str, bool, types.NoneType):
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _one_of(arguments, value, name)
    if origin is tuple and isinstance(value, list):
        if arguments[-1] is Ellipsis:
            return tuple(_typed(arguments[0], item, name) for item in value)
        if len(arguments) == len(value):
            return tuple(_typed(h, v, name) for h, v in zip(arguments, value, strict=True))
    elif origin in (dict, Mapping) and isinstance(value, dict):
        return {key: _typed(arguments[1], item, name) for key, item in value.items()}
    elif origin is list and isinstance(value, list):
        return [_typed(arguments[0], item, name) for item in value]
    elif typing.is_typeddict(hint) and isinstance(value, dict):
        hints = typing.get_type_hints(hint)
        if hint.__required_keys__ <= value.keys() <= hints.keys():
            return {key: _typed(hints[key], item, key) for key, item in value.items()}
    elif hint is Settings and isinstance(value, dict):
        return Settings(value)
    elif hasattr(hint, "from_json"):
        return hint.from_json(value)
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return build(hint, value)
    elif hint is float and type(value) in (int, float):
        return float(value)
    raise Damaged(f"its {name} is of a wrong type")


def _one_of(hints: tuple[Any, ...], value: Any, name: str) -> Any:
    """Of several types the first that fits."""
    for hint in hints:
        try:
            return _typed(hint, value, name)
        except Damaged:
            continue
    raise Damaged(f"its {name} is of a wrong type")


def moment(value: float) -> float:
    """Return a time in seconds since 1970. Raises Damaged for one that no clock shows."""
    if not 0 <= value <= LATEST:
        raise Damaged("it has a time that no clock shows")
    return value


def shortened(text: str, most: int) -> str:
    """Return text of at most `most` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"
