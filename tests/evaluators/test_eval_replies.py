"""Measures of answers: where two part, loops, JSON and tool calls; honest and hostile texts."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluators.replies import (
    Call,
    first_difference,
    fits,
    loops,
    read_json,
    split_thought,
    tool_calls,
    valid_json,
)

TOKENS = st.lists(st.integers(0, 5), max_size=40)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)


@given(TOKENS, TOKENS)
def test_where_answers_part(a: list[int], b: list[int]) -> None:
    at = first_difference(a, b)
    if at is None:
        assert a == b
    else:
        assert a[:at] == b[:at] and a[at : at + 1] != b[at : at + 1]
    assert at == first_difference(b, a)


@given(TOKENS, st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(3, 9))
def test_what_goes_round(start: list[int], round_: list[int], n: int) -> None:
    said = [*start, *(round_ * n)]
    if len(round_) * n >= 24:
        assert loops(said)
        assert loops(said + round_[: len(round_) // 2]), "cut off within a round"
    assert not loops([*said, 99, *range(100, 124)]), "it has found out of it"


@given(st.lists(st.integers(), unique=True, max_size=60))
def test_what_never_repeats_does_not_go_round(tokens: list[int]) -> None:
    assert not loops(tokens)
    assert not loops([7] * 23)


def test_thought() -> None:
    assert split_thought("<think>a\nb</think>\nc") == ("a\nb", "\nc", True)
    assert split_thought("<think>for ever") == ("for ever", "", False)
    assert split_thought("no, <think> is a word") == ("", "no, <think> is a word", True)


@given(VALUES)
def test_json_is_read_as_it_is_written(value: Any) -> None:
    written = json.dumps(value)
    assert read_json(written) == value
    assert valid_json(f"```json\n{written}\n```") and valid_json(f"<think>hm</think>{written}")


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "[" * 5000 + "]" * 5000, "NaN", "[Infinity]", "1e999"]
    + ["9" * 10_000, "-" + "1" * 2_000_001, '"' + "a" * 1_000_001 + '"', "", "'a'", "{}{}"],
)
def test_json_that_nobody_should_read(text: str) -> None:
    with pytest.raises(ValueError):
        read_json(text)
    assert not valid_json(text)
    assert not tool_calls(f'<tool_call>{{"name": "f", "arguments": {text}}}</tool_call>')


def test_json_has_the_keys_that_were_asked_for() -> None:
    assert valid_json('{"a": 1, "b": 2}', ("a",)) and not valid_json('{"a": 1}', ("a", "b"))
    assert not valid_json('["a"]', ("a",)) and valid_json('["a"]')
    assert not valid_json('Here it is: {"a": 1}', ("a",)), "words around it break a parser"


ARGUMENTS = {"city": "Oslo", "days": 2}
ONE = {"name": "weather", "arguments": ARGUMENTS}
CALL = (Call("weather", '{"city": "Oslo", "days": 2}'),)


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>\n{json.dumps(ONE)}\n</tool_call>",
        f"I'll look. <tool_call>{json.dumps(ONE)}",  # the last tag ended the answer
        f"<think>hm, <tool_call></think><tool_call>{json.dumps(ONE)}</tool_call>",
        "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n2"
        "\n</parameter>\n</function>\n</tool_call>",
        json.dumps({"name": "weather", "parameters": ARGUMENTS}),
        "<|python_tag|>" + json.dumps({"name": "weather", "parameters": ARGUMENTS}),
        "[TOOL_CALLS]" + json.dumps([ONE]),
        "[TOOL_CALLS] weather[ARGS]" + json.dumps(ARGUMENTS),
        "[TOOL_CALLS]weather" + json.dumps(ARGUMENTS),
        "```json\n" + json.dumps([{"type": "function", "function": ONE}]) + "\n```",
        json.dumps({"name": "weather", "arguments": json.dumps({"days": 2.0, "city": "Oslo"})}),
    ],
)
def test_a_call_is_the_same_in_every_format(text: str) -> None:
    assert tool_calls(text) == CALL


def test_several_calls_and_none() -> None:
    two = f"<tool_call>{json.dumps(ONE)}</tool_call>\n" * 2
    assert tool_calls(two) == CALL * 2
    assert tool_calls("[TOOL_CALLS]" + json.dumps([ONE, ONE])) == CALL * 2
    llama = json.dumps({"name": "weather", "parameters": ARGUMENTS})
    assert tool_calls(f"{llama}; {llama}") == CALL * 2
    assert tool_calls("It is cold in Oslo.") == ()
    assert tool_calls('{"temperature": 2}') == (), "JSON that is no call"


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>weather(Oslo)</tool_call>",
        '<tool_call>{"name": "weather", "arguments": {"city": "Os',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
        "<tool_call><function=weather><parameter=city>Oslo",
        "[TOOL_CALLS]weather{",
        '{"name": "weather", "parameters": {"city"',
        "<|python_tag|>weather.get()",
    ],
)
def test_a_call_that_cannot_be_read(text: str) -> None:
    assert tool_calls(text) is None


TOOLS = {
    "weather": {
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"enum": ["c", "f"]},
        },
        "required": ["city"],
    }
}


def test_a_call_fits_its_tool() -> None:
    def fit(name: str, **arguments: Any) -> bool:
        return fits(Call(name, json.dumps(arguments)), TOOLS)

    assert fit("weather", city="Oslo") and fit("weather", city="Oslo", days=2, unit="c")
    assert not fit("other", city="Oslo") and not fit("weather", days=2)
    assert not fit("weather", city=3) and not fit("weather", city="Oslo", days=True)
    assert not fit("weather", city="Oslo", unit="k") and not fit("weather", city="Oslo", x=1)


_PIECES = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<function=", "<parameter=", "```", "\n"]
_PIECES += ["</parameter>", '{"name": ', "{", "}", "[", "]", ";", '"', "<think>", "</think>", ">"]
_PIECES += ["<|python_tag|>", "\ud800", "\x00", "é", "1e999", " "]


@given(st.lists(st.sampled_from(_PIECES) | st.text(max_size=3), max_size=30).map("".join))
def test_whatever_is_said_has_an_outcome(text: str) -> None:
    found = tool_calls(text)
    assert found is None or all(isinstance(call.name, str) for call in found)
    for call in found or ():
        fits(call, TOOLS)
    assert valid_json(text) in (True, False)
    split_thought(text)


@pytest.mark.parametrize(
    "piece",
    ["<tool_call>", " ", "```\n", "<tool_call><function=a><parameter=b>", "[TOOL_CALLS]", "{", ";"]
    + ["<think>", "[TOOL_CALLS] \t", '{"name":'],
)
def test_long_answers_take_no_time(piece: str) -> None:
    started = time.process_time()
    for text in (piece * (900_000 // len(piece)), "```\n" + piece * 200_000 + "x"):
        tool_calls(text)
        valid_json(text)
        split_thought(text)
    assert time.process_time() - started < 5
