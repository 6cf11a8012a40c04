"""The prompts and conversations that come with this package, and files of others like them: one
JSON object a line.

    {"name": "ice", "kind": "chat", "language": "en", "tools": ["get_weather"],
     "json_keys": ["name"], "messages": [{"role": "user", "content": "Why does ice ..."}]}

`tools` names entries of data/tools.json, or is an object of schemas by name. With `json_keys` the
answer has to be JSON, an object with those keys (a list, or any JSON, where there are none). All
texts of this package were written for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from evaluators.chat import Conversation
from evaluators.errors import EvaluationError
from evaluators.texts import read_text

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Prompt:
    """A conversation that the model is to go on with. `json_keys` None: no JSON is asked for."""

    name: str
    kind: str
    language: str
    talk: Conversation
    json_keys: tuple[str, ...] | None


@dataclass(frozen=True)
class Dialogue:
    """A conversation whose last message, the assistant's, is scored. `group`: what its domain and
    others are together, such as languages.
    """

    domain: str
    group: str | None
    talk: Conversation


def prompts(path: Path | None = None, limit: int | None = None) -> tuple[Prompt, ...]:
    """Return the first prompts of a file, or of the 40 of this package, of which the first 12 have
    every kind. Raises EvaluationError for a file that does not hold any.
    """
    rows = _rows(path, "prompts.jsonl")
    found = tuple(_prompt(row, where) for where, row in rows)[:limit]
    if not found:
        raise EvaluationError(f"There are no prompts in {path}.", "Write one JSON object a line.")
    return found


def dialogues(path: Path | None = None, limit: int | None = None) -> tuple[Dialogue, ...]:
    """Return the first `limit` conversations of every domain, of a file or of this package. Raises
    EvaluationError for a file that does not hold any.
    """
    by_domain: dict[str, list[Dialogue]] = {}
    for where, row in _rows(path, "conversations.jsonl"):
        talk = _talk(row, where)
        if talk.messages[-1]["role"] != "assistant" or len(talk.messages) < 2:
            raise _wrong(where, "its last message is not an assistant's answer")
        domain = str(row.get("domain", "chat"))
        group = str(row["group"]) if row.get("group") else None
        by_domain.setdefault(domain, []).append(Dialogue(domain, group, talk))
    found = tuple(one for of in by_domain.values() for one in of[:limit])
    if not found:
        raise EvaluationError(
            f"There are no conversations in {path}.", "Write one JSON object a line."
        )
    return found


@cache
def _tools() -> dict[str, dict[str, Any]]:
    value: dict[str, dict[str, Any]] = json.loads(_packaged("tools.json"))
    return value


def _packaged(name: str) -> str:
    return files("evaluators").joinpath("data", name).read_text("utf-8")


def _rows(path: Path | None, packaged: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a file, each with where it stands."""
    text = _packaged(packaged) if path is None else read_text(path)
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"line {number} of {packaged if path is None else path}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise _wrong(where, "it is not JSON") from None
        if not isinstance(row, dict):
            raise _wrong(where, "it is not an object")
        found.append((where, row))
    return found


def _wrong(where: str, why: str) -> EvaluationError:
    return EvaluationError(
        f"{where[:1].upper()}{where[1:]} cannot be used: {why}.",
        'Write {"messages": [{"role": "user", "content": "..."}]}, one object a line.',
    )


def _prompt(row: Mapping[str, Any], where: str) -> Prompt:
    keys = row.get("json_keys")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(k, str) for k in keys)):
        raise _wrong(where, "its json_keys are not a list of texts")
    talk = _talk(row, where)
    if talk.messages[-1]["role"] not in ("user", "tool"):
        raise _wrong(where, "there is nothing to answer after its last message")
    return Prompt(
        name=str(row.get("name", where.partition(" of ")[0])),
        kind=str(row.get("kind", "chat")),
        language=str(row.get("language", "")),
        talk=talk,
        json_keys=None if keys is None else tuple(keys),
    )


def _talk(row: Mapping[str, Any], where: str) -> Conversation:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong(where, "it has no messages")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise _wrong(where, f"a message has no role of {', '.join(_ROLES)}")
        if not isinstance(message.get("content"), str):
            raise _wrong(where, "a message has no text as its content")
        if "tool_calls" in message and not _are_calls(message["tool_calls"]):
            raise _wrong(where, "its tool_calls are not a list of names and arguments")
    tools = row.get("tools", {})
    if isinstance(tools, list):
        unknown = [n for n in tools if not isinstance(n, str) or n not in _tools()]
        if unknown:
            raise _wrong(where, f"there is no tool {unknown[0]!r} in this package")
        tools = {name: _tools()[name] for name in tools}
    if not isinstance(tools, dict) or not all(isinstance(tool, dict) for tool in tools.values()):
        raise _wrong(where, "its tools are neither names nor an object of schemas")
    return Conversation(tuple(messages), tools)


def _are_calls(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(call, dict)
        and isinstance(call.get("name"), str)
        and isinstance(call.get("arguments"), dict)
        for call in value
    )
