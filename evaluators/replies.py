"""Look at answers: where two part, whether one runs in circles, whether JSON and tool calls in it
can be read. An answer is a stranger's text: whatever it holds, the outcome is a value.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MOST_LETTERS = 1_000_000
_LEAST_LOOP = 24  # tokens that go round, at the end of an answer
_LEAST_ROUNDS = 3
_THOUGHT = re.compile(r"\A\s*<(think|thought|reasoning)>(.*?)(</\1>|\Z)", re.DOTALL)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Return the index of the first token that differs, or that only one has; None for equal
    answers.
    """
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def loops(tokens: Sequence[int]) -> bool:
    """Return whether the end of an answer goes round: its last tokens are one sequence three times
    or more, and at least 24 tokens of that.
    """
    n = len(tokens)
    for period in range(1, n // _LEAST_ROUNDS + 1):
        length = period
        while length < n and tokens[n - 1 - length] == tokens[n - 1 - length + period]:
            length += 1
        if length >= max(_LEAST_ROUNDS * period, _LEAST_LOOP):
            return True
    return False


def split_thought(text: str) -> tuple[str, str, bool]:
    """Return what an answer thinks, what it says, and whether it comes to an end of thinking (as
    one does that does not think).
    """
    found = _THOUGHT.match(text)
    if found is None:
        return "", text, True
    return found[2], text[found.end() :], bool(found[3])


# ---- JSON


def read_json(text: str) -> Any:
    """Return what strict JSON holds: no NaN, no infinity, no number that overflows; whole numbers
    are equal however they are written. Raises ValueError for anything else, whatever is wrong.
    """
    if len(text) > _MOST_LETTERS:
        raise ValueError("it is too long")
    try:
        value = json.loads(text, parse_constant=_refused, parse_float=_number)
        json.dumps(value)  # as deep as others can write it
    except RecursionError:
        raise ValueError("it is too deep") from None
    return value


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _number(text: str) -> int | float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return int(value) if value.is_integer() else value


def valid_json(text: str, keys: Sequence[str] = ()) -> bool:
    """Return whether an answer is JSON, with nothing around it but a fence; and, given `keys`, an
    object that has them.
    """
    try:
        value = read_json(_unfenced(split_thought(text)[1]))
    except ValueError:
        return False
    return not keys or (isinstance(value, dict) and all(key in value for key in keys))


def _unfenced(text: str) -> str:
    """What stands in ```json ... ```, or the text itself."""
    text = text.strip()
    if not (text.startswith("```") and text.endswith("```") and "\n" in text):
        return text
    return text[:-3].partition("\n")[2].strip()


# ---- tool calls


@dataclass(frozen=True)
class Call:
    """A call of a function. `arguments` is JSON with sorted keys: equal texts are equal calls."""

    name: str
    arguments: str


_HERMES, _HERMES_END = "<tool_call>", "</tool_call>"
_XML, _XML_PARAMETER, _XML_PARAMETER_END = "<function=", "<parameter=", "</parameter>"
_MISTRAL = "[TOOL_CALLS]"
_MISTRAL_NAMED = re.compile(r"\A\s{0,8}([\w.-]{1,200})\s{0,8}(?:\[ARGS\])?\s{0,8}(?=\{)")
_LLAMA_TAG = "<|python_tag|>"


def tool_calls(text: str) -> tuple[Call, ...] | None:
    """Return the calls in an answer, none where it makes none; None where it begins one that cannot
    be read.

    Formats: Hermes and Qwen (`<tool_call>{...}</tool_call>`), Qwen3-Coder (`<tool_call>` with
    `<function=...>`), Mistral (`[TOOL_CALLS]`), Llama 3 (an object of `name` and `parameters`
    alone, or behind `<|python_tag|>`), and a list of such objects.
    """
    said = split_thought(text)[1].strip()
    if len(said) > _MOST_LETTERS:
        return None
    try:
        if _HERMES in said:
            parts = [part.partition(_HERMES_END)[0] for part in said.split(_HERMES)[1:]]
            found = [call for part in parts for call in _of_part(part.strip())]
        elif _MISTRAL in said:
            parts = said.split(_MISTRAL)[1:]
            found = [call for part in parts for call in _mistral(part)]
        elif said.startswith(_LLAMA_TAG):
            found = _listed(said.removeprefix(_LLAMA_TAG))
        else:
            return _bare(said)
    except ValueError:
        return None
    return tuple(found) or None


def _of_part(part: str) -> list[Call]:
    if not part.startswith(_XML):
        return _listed(part)
    name, _, rest = part.removeprefix(_XML).partition(">")
    arguments: dict[str, Any] = {}
    for parameter in rest.split(_XML_PARAMETER)[1:]:
        key, _, value = parameter.partition(">")
        value, end, _ = value.partition(_XML_PARAMETER_END)
        if not end:
            raise ValueError("a parameter has no end")
        try:
            arguments[key] = read_json(value)
        except ValueError:
            arguments[key] = value.removeprefix("\n").removesuffix("\n")
    return [Call(name, _text(arguments))]


def _mistral(part: str) -> list[Call]:
    named = _MISTRAL_NAMED.match(part)
    if named is None:
        return _listed(part)
    arguments = read_json(part[named.end() :])
    if not isinstance(arguments, dict):
        raise ValueError("arguments are no object")
    return [Call(named[1], _text(arguments))]


def _listed(text: str) -> list[Call]:
    """One call, a list of them, or several with ; between."""
    try:
        value = read_json(text)
    except ValueError:
        # An object may hold a semicolon, so this is the second try.
        parts = text.split(";")
        if len(parts) == 1:
            raise
        value = [read_json(part) for part in parts if part.strip()]
    return [_call(item) for item in (value if isinstance(value, list) else [value])]


def _bare(said: str) -> tuple[Call, ...] | None:
    """The calls of an answer without any mark: all of it is JSON, and of calls."""
    inside = _unfenced(said)
    if not inside.startswith(("{", "[{")):
        return ()
    try:
        return tuple(_listed(inside))
    except ValueError:
        return None if '"name"' in inside else ()


def _call(value: Any) -> Call:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("it names no function")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = read_json(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("arguments are no object")
    return Call(value["name"], _text(arguments))


def _text(arguments: Mapping[str, Any]) -> str:
    return json.dumps(arguments, sort_keys=True)


def fits(call: Call, tools: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether a call is of one of the tools, with all arguments that it needs and no others,
    of the right JSON types.
    """
    tool = tools.get(call.name)
    if tool is None:
        return False
    arguments, properties = json.loads(call.arguments), tool.get("properties", {})
    return all(name in arguments for name in tool.get("required", ())) and all(
        name in properties and _is_of(value, properties[name]) for name, value in arguments.items()
    )


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def _is_of(value: Any, schema: Mapping[str, Any]) -> bool:
    wanted = schema.get("type")
    if wanted in _TYPES and not isinstance(value, _TYPES[wanted]):
        return False
    if wanted in ("integer", "number") and isinstance(value, bool):
        return False
    return "enum" not in schema or value in schema["enum"]
