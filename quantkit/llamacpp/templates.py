"""Render a stranger's chat template where it can do no harm.

A template is a program: it may loop forever, or make a text of gigabytes. transformers runs it in
Jinja's sandbox; here that happens in a limited process of its own, and the outcome is a text or a
sentence.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

# A conversation that every template takes: turns in order, no system message, no tools.
CONVERSATION: tuple[dict[str, str], ...] = (
    {"role": "user", "content": "Name three things that float on water, and say why."},
    {
        "role": "assistant",
        "content": "Wood, ice and a cork: each is lighter than the water it displaces (1 g/cm³).",
    },
    {
        "role": "user",
        "content": "Write it as code:\n\n```python\ndef floats(density: float) -> bool:\n    "
        "return density < 1.0  # g/cm³\n```\nUnd auf Deutsch? И по-русски? 用中文呢？",
    },
)
SECONDS = 20  # for one conversation; a real template takes milliseconds
_MAX_LETTERS = 1_000_000


def readable(folder: Path) -> tuple[Path, ...]:
    """Return what a process needs to be shown for the files of a folder, which may be links: to the
    blobs of the Hub's cache. Where a stranger's links lead else is not shown.
    """
    real = folder.resolve()
    blobs = real.parent.parent / "blobs"
    in_cache = real.parent.name == "snapshots" and blobs.is_dir()
    return tuple(sorted({real, folder.absolute(), *([blobs] if in_cache else [])}))


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise TimeoutError when what is inside takes longer. Only for a process's main thread."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"it is not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def rendered(tokenizer: Any, messages: Sequence[dict[str, str]]) -> dict[str, str]:
    """Return `text`, or `error`, a sentence; neither without a template. Only for the main thread
    of a limited process: an endless loop is ended by an alarm, a huge text by the process's limits.
    """
    if not tokenizer.chat_template:
        return {}

    try:
        with within(SECONDS):
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
    except Exception as error:  # a template can raise anything
        about = (str(error).splitlines() or [type(error).__name__])[0][:300].rstrip(".")
        return {"error": f"The chat template cannot be rendered: {about or type(error).__name__}."}
    if not isinstance(text, str) or len(text) > _MAX_LETTERS:
        return {"error": f"The chat template makes more than {_MAX_LETTERS:,} characters."}
    return {"text": text}
