"""Render many conversations with a tokenizer's chat template in one sandboxed process.

A template is a program that a stranger wrote: it may loop forever, or make a text of gigabytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit import sandbox
from quantkit.errors import QuantkitError
from quantkit.llamacpp.answering import Answering
from quantkit.llamacpp.templates import SECONDS, within
from quantkit.sandbox.outcome import plain

_MOST_BYTES = 8 * 2**20  # of one rendered conversation
_LIMITS = sandbox.Limits(cpu_seconds=86_400, wall_seconds=7 * 86_400, memory_bytes=2 * 2**30)


@dataclass(frozen=True)
class _Rendered:
    """An answer: a text, or why there is none."""

    text: str | None = None
    error: str = ""


class ChatTemplate:
    """Renders conversations as `tokenizer.apply_chat_template(..., tokenize=False)` does."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._process: Answering | None = None

    @property
    def exists(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    def render(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False
    ) -> str:
        """Raise QuantkitError for a template that cannot be used on these messages."""
        if self._process is None:
            special = self._tokenizer.special_tokens_map
            arguments = {
                "template": self._tokenizer.get_chat_template(),
                "special": json.loads(json.dumps(special, default=str)),
            }
            most = 2 * _MOST_BYTES
            self._process = Answering(f"{__name__}:serve", arguments, _LIMITS, most)
        try:
            answer = self._process.ask([list(messages), add_generation_prompt], _Rendered)
        except (OSError, ValueError, RecursionError) as error:
            why = f"its process {self._process.close()}"
            self._process = None
            if isinstance(error, TimeoutError):
                why = "it takes too long"
            raise QuantkitError(f"The chat template cannot be rendered: {why}.") from None
        if answer.text is None:
            raise QuantkitError(f"The chat template cannot be rendered: {plain(answer.error)}.")
        return str(answer.text)[:_MOST_BYTES]


def serve(requests: int, answers: int, template: str, special: dict[str, Any]) -> None:
    """Render one conversation for each line of `requests`. Runs in the sandbox."""
    from transformers.utils.chat_template_utils import render_jinja_template

    with open(requests, "rb") as asked, open(answers, "wb") as told:
        for line in asked:
            messages, add_generation_prompt = json.loads(line)
            try:
                with within(SECONDS):
                    made: Any = render_jinja_template(
                        [messages],
                        chat_template=template,
                        add_generation_prompt=add_generation_prompt,
                        **special,
                    )
                text = made[0][0]
                too_long = len(text) > _MOST_BYTES // 8
                answer = (
                    _Rendered(error="it makes too long a text") if too_long else _Rendered(text)
                )
            except Exception as error:  # a template can raise anything
                answer = _Rendered(error=f"{type(error).__name__}: {str(error)[:300]}")
            told.write(json.dumps(vars(answer)).encode() + b"\n")
            told.flush()
