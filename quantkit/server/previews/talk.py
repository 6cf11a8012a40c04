"""Try a finished file: one prompt, one answer, in a process that can do no harm.

The prompt goes through the file's own chat template, which a stranger may have written: Jinja runs
it in its sandbox, and the process around it is quantkit's own sandbox.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from quantkit import sandbox
from quantkit.errors import QuantkitError
from quantkit.gguf_file.parts import part_names

MAX_PROMPT = 4000  # characters
MAX_TOKENS = 200
_CONTEXT = 2048
_MOST_PIECES, _MOST_ANSWER = 2 * MAX_TOKENS, 100 * MAX_TOKENS  # characters: no token is as long
_CPU_SECONDS, _WALL_SECONDS = 240, 120
_EXTRA_BYTES = 6 * 2**30  # of memory beside the file: buffers, the context
_AT_ONCE = threading.BoundedSemaphore(2)
ANSWER = f"{__name__}:answer"  # runs inside


def say(path: Path, messages: Sequence[dict[str, str]]) -> Iterator[str]:
    """Yield the answer as it grows. Raises QuantkitError; closing the iterator ends the process."""
    if not _AT_ONCE.acquire(timeout=30):
        raise QuantkitError("Too many people are trying files right now.", "Try again in a minute.")
    try:
        yield from _say(path, messages)
    finally:
        _AT_ONCE.release()


def _say(path: Path, messages: Sequence[dict[str, str]]) -> Iterator[str]:
    parts = (path.with_name(name) for name in part_names(path.name))
    files = [part for part in parts if part.exists()]
    n_bytes = sum(file.stat().st_size for file in files) + _EXTRA_BYTES
    limits = sandbox.Limits(_CPU_SECONDS, _WALL_SECONDS, n_bytes, n_processes=256)
    arguments = {"path": str(path.absolute()), "messages": list(messages)}
    text = ""
    try:
        said = sandbox.stream(ANSWER, arguments, limits=limits, readable=files, shape=str)
        for piece in islice(said, _MOST_PIECES):
            text = (text + piece)[:_MOST_ANSWER]
            yield text
    except sandbox.Crashed as error:
        if error.reason.startswith(("was stopped", "used up", "needed more")):
            raise QuantkitError(
                "The answer took too long or too much memory.", "Download the file to try it."
            ) from None
        raise QuantkitError(
            f"The file does not answer: the process {error.reason}."[:300], "Try another prompt."
        ) from None


def check_prompt(prompt: object) -> str:
    """Return the prompt. Raises QuantkitError for an empty or a very long one."""
    text = prompt.strip() if isinstance(prompt, str) else ""
    if not text:
        raise QuantkitError("The prompt is empty.", "Write something first.")
    if len(text) > MAX_PROMPT:
        raise QuantkitError(
            f"The prompt is longer than {MAX_PROMPT:,} characters.", "Write a shorter one."
        )
    return text


def answer(path: str, messages: list[dict[str, str]]) -> Iterator[str]:
    """Yield what llama.cpp says, piece by piece. Runs in the sandbox."""
    from llama_cpp import Llama

    model: Any = Llama(
        path, n_ctx=_CONTEXT, verbose=False, seed=0, n_threads=max(1, os.cpu_count() or 1)
    )
    # Greedy: the same prompt gives the same answer, so that two files can be compared.
    if "tokenizer.chat_template" in model.metadata:
        for part in model.create_chat_completion(
            messages, max_tokens=MAX_TOKENS, temperature=0.0, stream=True
        ):
            yield part["choices"][0]["delta"].get("content") or ""
    else:
        prompt = messages[-1]["content"]
        for part in model.create_completion(
            prompt, max_tokens=MAX_TOKENS, temperature=0.0, stream=True
        ):
            yield part["choices"][0]["text"]
