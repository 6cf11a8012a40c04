"""Ask a model through the chat template of its file, as llama.cpp's server does: tools given,
thinking switched on where the template has a switch.

A template may be anybody's and do less than others: refuse a system message, know of no tools, want
arguments as text. What is missing is written into the conversation instead, in the format of
Hermes, which most small models know; without a template that can be used the turns are plain text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluators.errors import EvaluationError
from evaluators.llama_runtime import Model

I32 = NDArray[np.int32]
Message = Mapping[str, Any]

TEMPLATE, PLAIN = "chat template", "plain text"
_PROBE = "quantkit_probe"  # no template says this by itself
_TOOL_NOTE = (
    "You can call these functions, each given as JSON:\n<tools>\n{tools}\n</tools>\nTo call one,"
    ' answer with <tool_call>{{"name": ..., "arguments": {{...}}}}</tool_call>, one for each call.'
)


@dataclass(frozen=True)
class Conversation:
    """Messages as the OpenAI API has them; `tools` are schemas by name. Where the last message is
    the assistant's, it is what would be answered.
    """

    messages: tuple[Message, ...]
    tools: Mapping[str, Mapping[str, Any]]


class Gone(EvaluationError):
    """The template ended the process that rendered it; the file has to be opened again."""


class Chat:
    """Renders conversations for one open model. `asked` is TEMPLATE or PLAIN, `reason` why plain
    text is asked for though the file has a template.
    """

    def __init__(self, model: Model, without: str = "") -> None:
        """Find out what the template can do. `without` a template: the reason.

        Raises Gone when the template ends the process.
        """
        self._model = model
        self.reason = without
        self.asked = PLAIN
        self.takes_system = self.takes_tools = self.can_think = False
        if without:
            return
        hello = {"role": "user", "content": "Hello"}
        said = self._tried([hello])
        if said is None:
            return
        self.asked = TEMPLATE
        system = self._tried([{"role": "system", "content": _PROBE}, hello])
        self.takes_system = system is not None and _PROBE in system
        with_tools = self._tried([hello], schemas({_PROBE: {"properties": {}}}))
        self.takes_tools = with_tools is not None and _PROBE in with_tools
        self.can_think = self._tried([hello], thinks=False) != self._tried([hello], thinks=True)
        self.reason = ""  # of what was only tried

    def _tried(self, messages: Sequence[Message], *more: Any, **options: Any) -> str | None:
        """A rendered conversation; None without a template, or where it cannot be used."""
        try:
            return self._model.chat_prompt(messages, *more, **options)
        except EvaluationError as error:
            self.reason = error.message
            if not self._model.session.is_alive:
                raise Gone(error.message, error.remedy) from error
            return None

    def prompt(self, talk: Conversation) -> I32:
        """Return the tokens of a conversation that the assistant is to go on with, thinking if it
        can. Raises EvaluationError for one that cannot be rendered.
        """
        return self.tokens_of(self.prompt_text(talk, thinks=True))

    def prompt_text(self, talk: Conversation, thinks: bool) -> str:
        """Return the text of `prompt`."""
        messages = self._written_out(talk)
        if self.asked == PLAIN:
            turns = [f"{str(m['role']).capitalize()}: {m['content']}" for m in messages]
            return "\n\n".join([*turns, "Assistant:"])
        return self._rendered(messages, talk, True, thinks)

    def with_reply(self, talk: Conversation) -> tuple[I32, I32]:
        """Return the tokens of the conversation without its last message, and those of that message
        as the assistant would write it, up to the one that ends it. No thinking stands before it.

        Raises EvaluationError for one that cannot be rendered.
        """
        asked = Conversation(talk.messages[:-1], talk.tools)
        before = self.prompt_text(asked, thinks=False)
        plain = str(self._written_out(talk)[-1]["content"])
        reply = (" " if self.asked == PLAIN else "") + plain
        if self.asked == TEMPLATE:
            try:
                whole = self._rendered(self._written_out(talk), talk, False, False)
            except Gone:
                raise
            except EvaluationError:
                whole = ""  # a template that only takes what asks for an answer
            said = whole[len(before) :] if whole.startswith(before) else ""
            if all(word in said for word in _essentials(talk.messages[-1])):
                reply = said
        asked_ids = self.tokens_of(before)
        # Cut with what stands before it: alone it may get a space in front that nobody would say.
        both = self.tokens_of(before + reply)
        if np.array_equal(both[: len(asked_ids)], asked_ids):
            ids = both[len(asked_ids) :]
        else:
            ids = self._model.tokenize(reply, add_special=False, parse_special=True)
        at = np.flatnonzero(np.isin(ids, list(self._model.ends())))
        return asked_ids, ids[: at[0] + 1] if len(at) else ids

    def _rendered(
        self, messages: Sequence[Message], talk: Conversation, asks: bool, thinks: bool
    ) -> str:
        tools = schemas(talk.tools) if talk.tools and self.takes_tools else None
        switch = thinks if self.can_think else None
        last: EvaluationError | None = None
        # Templates want a call's arguments as an object, or as the text of one.
        for as_text in (False, True) if any("tool_calls" in m for m in messages) else (False,):
            try:
                said = self._model.chat_prompt(_calls(messages, as_text), tools, asks, switch)
            except EvaluationError as error:
                if not self._model.session.is_alive:
                    raise Gone(error.message, error.remedy) from error
                last = error
            else:
                return said or ""
        assert last is not None
        raise last

    def _written_out(self, talk: Conversation) -> list[Message]:
        """The messages with what the template does not know written into them."""
        messages: list[Message] = list(talk.messages)
        if talk.tools and not self.takes_tools:
            listed = "\n".join(json.dumps(tool) for tool in schemas(talk.tools))
            note = _TOOL_NOTE.format(tools=listed)
            if messages[0]["role"] == "system":
                note = f"{messages.pop(0)['content']}\n\n{note}"
            messages = [{"role": "system", "content": note}, *map(_in_words, messages)]
        if messages[0]["role"] == "system" and not self.takes_system:
            if self.asked == PLAIN or len(messages) == 1:
                return messages
            said = f"{messages[0]['content']}\n\n{messages[1]['content']}"
            messages = [{**messages[1], "content": said}, *messages[2:]]
        return messages

    def tokens_of(self, text: str) -> I32:
        """Return the tokens of a rendered text, behind the BOS that the vocabulary asks for; one
        that the template has written stays the only one.
        """
        ids = self._model.tokenize(text, add_special=False, parse_special=True)
        if self._model.adds_bos and (len(ids) == 0 or ids[0] != self._model.bos):
            ids = np.concatenate([np.array([self._model.bos], np.int32), ids])
        return ids


def schemas(tools: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return tools as the OpenAI API has them."""
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": tool.get("description", ""),
                "parameters": {
                    "type": "object",
                    "properties": tool.get("properties", {}),
                    "required": tool.get("required", []),
                },
            },
        }
        for name, tool in tools.items()
    ]


def _calls(messages: Sequence[Message], as_text: bool) -> list[Message]:
    """Messages whose tool calls have ids, and arguments as an object or as text."""
    found: list[Message] = []
    for message in messages:
        if "tool_calls" in message:
            calls = [
                {
                    "type": "function",
                    "id": f"call{i:05d}",  # Mistral wants nine letters or digits
                    "function": {
                        "name": call["name"],
                        "arguments": json.dumps(call["arguments"], ensure_ascii=False)
                        if as_text
                        else call["arguments"],
                    },
                }
                for i, call in enumerate(message["tool_calls"])
            ]
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            message = {**message, "tool_call_id": "call00000"}
        found.append(message)
    return found


def _in_words(message: Message) -> Message:
    """A message of or to a tool as plain content."""
    if "tool_calls" in message:
        said = [
            f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"
            for call in message["tool_calls"]
        ]
        return {"role": "assistant", "content": "\n".join(said)}
    if message["role"] == "tool":
        said_by = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": said_by}
    return message


def _essentials(message: Message) -> list[str]:
    """What has to be in a rendered answer, so that it is known to be there."""
    if "tool_calls" in message:
        return [call["name"] for call in message["tool_calls"]]
    return [str(message["content"]).strip()[:40]]
