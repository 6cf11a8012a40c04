"""Run the checkpoint's tokenizer, which a stranger wrote, in a sandboxed process of its own."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit import sandbox
from quantkit.checkpoint.codeless import codeless
from quantkit.errors import QuantkitError
from quantkit.llamacpp.answering import Answering
from quantkit.llamacpp.templates import readable
from quantkit.sandbox import untrusted
from quantkit.sandbox.outcome import plain

_LIMITS = sandbox.Limits(cpu_seconds=86_400, wall_seconds=7 * 86_400, memory_bytes=4 * 2**30)
_MOST_BYTES = 256 * 2**20  # of the ids of one text


@dataclass(frozen=True)
class Encoded:
    """A text as token ids: a list, or int64 (1, n_tokens) where tensors were asked for."""

    input_ids: Any


@dataclass(frozen=True)
class _Facts:
    chat_template: str | None
    eos_token_id: int | None
    special_tokens_map: dict[str, str]


@dataclass(frozen=True)
class _Failed:
    error: str
    remedy: str


class Tokenizer:
    """The part of transformers' tokenizer that is used here, under the same names."""

    def __init__(self, folder: Path) -> None:
        """Raise QuantkitError for a tokenizer that transformers does not load."""
        # The process may make no links: what it is shown has no code already.
        self._view = ExitStack()  # ends with this object
        view = self._view.enter_context(codeless(folder.absolute()))
        given = {"folder": str(view)}
        function, shown = f"{__name__}:serve", (view, *readable(folder))
        self._process = Answering(function, given, _LIMITS, _MOST_BYTES, shown, preload=True)
        facts: _Facts = self._ask(_Facts, "facts")
        self.chat_template = facts.chat_template
        self.eos_token_id = facts.eos_token_id if _is_id(facts.eos_token_id) else None
        self.special_tokens_map = facts.special_tokens_map

    def get_chat_template(self) -> str:
        """Return the chat template. Raise ValueError without one."""
        if self.chat_template is None:
            raise ValueError("the tokenizer has no chat template")
        return self.chat_template

    def __call__(
        self,
        text: str,
        add_special_tokens: bool = True,
        verbose: bool = False,
        return_tensors: str | None = None,
    ) -> Encoded:
        """Return the ids of a text."""
        ids = self._ask(list[int], "ids", text, add_special_tokens)
        if not all(map(_is_id, ids)):
            raise QuantkitError("The tokenizer returned values that are not token ids.")
        return Encoded(torch.tensor([ids]) if return_tensors == "pt" else ids)

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """Return the text of token ids."""
        return str(self._ask(str, "text", ids, skip_special_tokens))

    def _ask(self, shape: Any, *question: Any) -> Any:
        try:
            answer = self._process.ask(question, shape | _Failed)
        except untrusted.Damaged:
            raise QuantkitError("The tokenizer answers what was not asked for.") from None
        except (OSError, ValueError, RecursionError):
            why = f"its process {self._process.close()}"
            raise QuantkitError(f"The tokenizer cannot be used: {why}.") from None
        if isinstance(answer, _Failed):
            message = plain(answer.error) or "The tokenizer cannot be used."
            raise QuantkitError(message, plain(answer.remedy))
        return answer


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def serve(requests: int, answers: int, folder: str) -> None:
    """Answer one question for each line of `requests`. Runs in the sandbox."""
    import json

    from quantkit.model.blockwise import load_tokenizer

    with open(requests, "rb") as asked, open(answers, "wb") as told:
        tokenizer: Any = None
        for line in asked:
            try:
                tokenizer = tokenizer or load_tokenizer(Path(folder))
                answer = _answer(tokenizer, *json.loads(line))
            except Exception as error:  # a tokenizer can raise anything
                said = getattr(error, "message", f"{type(error).__name__}: {str(error)[:300]}")
                answer = _Failed(said, getattr(error, "remedy", ""))
            told.write(json.dumps(answer, default=vars).encode() + b"\n")
            told.flush()


def _answer(tokenizer: Any, what: str, *given: Any) -> Any:
    if what == "ids":
        text, add_special_tokens = given
        return tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
    if what == "text":
        ids, skip_special_tokens = given
        return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return _Facts(template, tokenizer.eos_token_id, special)
