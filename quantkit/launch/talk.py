"""Try a finished file: one prompt, one answer, in a process that can do no harm.

    python -m quantkit.launch.talk FILE.gguf    # a request as JSON on stdin, answers as JSON lines

The prompt goes through the file's own chat template, which a stranger may have written: Jinja runs
it in its sandbox, and the process around it has little memory, processor time and no token.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quantkit.converter.entry import close_network
from quantkit.errors import QuantkitError

MAX_PROMPT = 4000  # characters
MAX_TOKENS = 200
_CONTEXT = 2048
_CPU_SECONDS, _WALL_SECONDS = 240, 120
_EXTRA_BYTES = 6 * 2**30  # of address space beside the file: libraries, buffers, the context
_AT_ONCE = threading.BoundedSemaphore(2)
COMMAND: tuple[str, ...] = (sys.executable, "-m", "quantkit.launch.talk")
# All that the process sees of the environment: no token, no proxy.
_KEPT = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")


def say(path: Path, messages: Sequence[dict[str, str]]) -> Iterator[str]:
    """The answer as it grows. Raises QuantkitError; closing the iterator ends the process."""
    if not _AT_ONCE.acquire(timeout=30):
        raise QuantkitError("Too many people are trying files.", "Try again in a minute.")
    try:
        yield from _say(path, messages)
    finally:
        _AT_ONCE.release()


def _say(path: Path, messages: Sequence[dict[str, str]]) -> Iterator[str]:
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    environment |= {"HOME": "/nonexistent", "OMP_WAIT_POLICY": "PASSIVE", "LANG": "C.UTF-8"}
    child = subprocess.Popen(
        [*COMMAND, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
        start_new_session=True,
    )
    watchdog = threading.Timer(_WALL_SECONDS, child.kill)
    watchdog.start()
    text = ""
    try:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(json.dumps(list(messages)))
        child.stdin.close()
        for line in child.stdout:
            value = json.loads(line)
            if "error" in value:
                raise QuantkitError(str(value["error"])[:300], "Try another prompt.")
            text += str(value["text"])
            yield text
        if child.wait() != 0:
            raise QuantkitError(
                "The answer took too long or too much memory.", "Download the file to try it."
            )
    except (BrokenPipeError, ValueError):
        raise QuantkitError(
            "The file could not be loaded here.", "Download it and try it in llama.cpp."
        ) from None
    finally:
        watchdog.cancel()
        child.kill()
        child.wait()


def check_prompt(prompt: object) -> str:
    """The prompt. Raises QuantkitError for an empty or a very long one."""
    text = prompt.strip() if isinstance(prompt, str) else ""
    if not text:
        raise QuantkitError("There is nothing to answer.", "Write something first.")
    if len(text) > MAX_PROMPT:
        raise QuantkitError(
            f"The prompt is longer than {MAX_PROMPT:,} characters.", "Write a shorter one."
        )
    return text


def main(argv: Sequence[str]) -> int:
    """Answer one request. Returns 0, or 1 after an error was told."""
    path = Path(argv[1])
    _limit(path.stat().st_size)
    close_network()
    messages = json.loads(sys.stdin.read(200_000))
    try:
        for text in _answer(path, messages):
            _tell({"text": text})
    except Exception as error:  # whatever a strange file makes llama.cpp or its template raise
        _tell({"error": f"The file does not answer ({type(error).__name__}: {error})"[:300]})
        return 1
    return 0


def _limit(n_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    memory = 2 * n_bytes + _EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _tell(value: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _answer(path: Path, messages: list[dict[str, str]]) -> Iterator[str]:
    from llama_cpp import Llama

    model: Any = Llama(
        str(path), n_ctx=_CONTEXT, verbose=False, seed=0, n_threads=max(1, os.cpu_count() or 1)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv))
