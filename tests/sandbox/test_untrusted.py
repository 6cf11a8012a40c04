"""Headers and JSON that strangers write: what parsing can cost is bounded before it is done."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from quantkit.checkpoint import safetensors
from quantkit.checkpoint.safetensors import Count, Header, StoredTensor, parse_header
from quantkit.errors import QuantkitError
from quantkit.sandbox import untrusted
from quantkit.sandbox.untrusted import Damaged, build, parse, read_bytes


def header_file(text: str | bytes, n_data: int = 0) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return len(data).to_bytes(8, "little") + data + bytes(n_data)


def empty_tensors(n: int) -> str:
    one = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return "{" + ",".join(f'"t{i}":{one}' for i in range(n)) + "}"


# Each froze the server for a minute or more, or took hundreds of megabytes.
BOMBS: dict[str, Callable[[], str | bytes]] = {
    "200,000 dimensions": lambda: json.dumps(
        {"a": {"dtype": "F32", "shape": [2**62] * 200_000, "data_offsets": [0, 4]}}
    ),
    "dimensions of one": lambda: json.dumps(
        {"a": {"dtype": "F32", "shape": [1] * 300_000, "data_offsets": [0, 4]}}
    ),
    "nine dimensions": lambda: json.dumps(
        {"a": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}}
    ),
    "400,000 empty tensors": lambda: empty_tensors(400_000),
    "lists": lambda: "[" + "[]," * 10_000_000 + "[]]",
    "objects": lambda: "[" + "{}," * 10_000_000 + "{}]",
    "numbers": lambda: "[" + "1," * 15_000_000 + "1]",
    "deep": lambda: "[" * 190_000,
    "deep objects": lambda: '{"a":' * 90_000,
    "a number of many digits": lambda: '{"a":' + "9" * 30_000_000 + "}",
    "many of many digits": lambda: "[" + ",".join(["9" * 4299] * 7000) + "]",
    "a long fraction": lambda: '{"a":0.' + "1" * 30_000_000 + "}",
    "a long name": lambda: '{"' + "n" * 20_000_000 + '":[]}',
    "a long dtype": lambda: json.dumps(
        {"a": {"dtype": "F" * 10_000_000, "shape": [1], "data_offsets": [0, 4]}}
    ),
    "no UTF-8": lambda: b'{"\xff":[]}',
    "a name twice": lambda: (
        '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
        '"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    ),
    "a fraction": lambda: '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4.0]}}',
    "infinity": lambda: '{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}',
    "a shape that is text": lambda: '{"a":{"dtype":"F32","shape":"1","data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_costs_little(name: str, tmp_path: Path) -> None:
    data = header_file(BOMBS[name](), 4)
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(QuantkitError, match="broken"):
        parse_header(data, "x", len(data))
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 20 and peak < 150_000_000, f"{seconds:.1f} s, {peak:,} bytes"
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(QuantkitError):
        safetensors.read_header(path)


def test_the_largest_headers_that_are_read_are_cheap() -> None:
    data = header_file(empty_tensors(safetensors.MAX_TENSORS))
    began = time.process_time()
    assert len(parse_header(data, "x", len(data)).tensors) == safetensors.MAX_TENSORS
    assert time.process_time() - began < 20


def test_a_header_above_the_limit_is_named_as_such() -> None:
    start = (safetensors.MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}"
    with pytest.raises(QuantkitError, match="more than any known model"):
        parse_header(start, "x", 10)


def test_all_files_of_a_model_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "MAX_TENSORS_IN_ALL", 5)
    two = Header(10, tuple(StoredTensor(f"t{i}", "F32", (0,), 0, 0) for i in range(2)))
    count = Count()
    count.add(two)
    count.add(two)
    with pytest.raises(QuantkitError, match="more than 5 tensors"):
        count.add(two)


@pytest.mark.parametrize(
    "text",
    [
        *("NaN", "[1e400]", "[-Infinity]", "9" * 20, '{"a":' * 50 + "1" + "}" * 50, "[" * 100_000),
        *('"\\ud800"', "\ufeff{}", "", "{", "[1,]", "[" + "1," * 3_000_000 + "1]"),
    ],
)
def test_json_that_is_not_read(text: str) -> None:
    with pytest.raises(Damaged):
        parse(text.encode())


def test_json_that_is_read() -> None:
    value = {"a": [1, -(2**62), 0.5, "größer \u2028", None, True], "pair": "\U0001f600"}
    assert parse(json.dumps(value).encode()) == value
    with pytest.raises(Damaged):
        parse(json.dumps(value).encode("utf-16"))


def test_only_plain_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * 11)
    for name in ("pipe", "large", "."):
        with pytest.raises(Damaged):
            read_bytes(tmp_path / name, 10)
    with pytest.raises(Damaged):
        read_bytes(Path("/dev/zero"), 10)
    (tmp_path / "small").write_bytes(b"x" * 10)
    assert read_bytes(tmp_path / "small", 10) == b"x" * 10


@dataclass(frozen=True)
class Inner:
    n: int


@dataclass(frozen=True)
class Outer:
    name: str
    share: float
    inner: Inner | None = None
    pairs: tuple[tuple[str, int], ...] = ()
    rest: dict[str, Any] | None = None


def test_dataclasses_are_built_by_their_types() -> None:
    value = {"name": "a", "share": 1, "inner": {"n": 2}, "pairs": [["x", 1]], "rest": {"y": [1]}}
    assert build(Outer, {**value, "later": 1}) == Outer("a", 1.0, Inner(2), (("x", 1),), {"y": [1]})
    wrong: list[Any] = [[], 7, None, {"name": "a"}, {"name": 1, "share": 1}]
    wrong += [{**value, **one} for one in ({"share": True}, {"share": "1"}, {"inner": {"n": 1.5}})]
    wrong += [{**value, **one} for one in ({"inner": []}, {"pairs": [["x"]]}, {"pairs": "x"})]
    for item in wrong:
        with pytest.raises(Damaged):
            build(Outer, item)


@pytest.mark.parametrize("value", [-1.0, 5e9, 1e300])
def test_moments(value: float) -> None:
    with pytest.raises(Damaged):
        untrusted.moment(value)
