"""The process that opens a stranger's file in llama.cpp; `evaluators.session` is its other end.

It reads requests from one pipe and answers on another, one line of JSON each, until the first is
closed. Logits are left in memory that both sides see.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evaluators.errors import EvaluationError
from evaluators.llama_runtime import Runtime
from evaluators.session import Memory

if TYPE_CHECKING:
    from evaluators.llama_native import Context, Model

_RENDER_SECONDS = 20  # a real template takes milliseconds
_RENDER_BYTES = 1 << 30
_MOST_LETTERS = 1_000_000


class _Server:
    """The open model and its one context. Every method without a _ is a request."""

    def __init__(self, memory: Memory, weights: int | None = None) -> None:
        self._memory = memory
        self._weights = None if weights is None else f"/proc/self/fd/{weights}"
        self._model: Model | None = None
        self._context: Context | None = None
        self._shared = np.empty(0, np.float32)

    @property
    def _opened(self) -> Model:
        assert self._model is not None
        return self._model

    def open(self, file: str, n_threads: int, n_gpu_layers: int) -> dict[str, Any]:
        from evaluators.llama_native import Model

        model = self._model = Model(Path(file), Runtime(n_threads, n_gpu_layers))
        facts = ("n_vocab", "n_params", "n_ctx_train", "adds_bos", "bos", "eos", "is_recurrent")
        return {name: getattr(model, name) for name in facts}

    def can_expand(self) -> bool:
        return self._weights is not None and os.access(self._weights, os.R_OK | os.W_OK)

    def expand(self) -> None:
        """Go on with the weights at F16, in the memory that was given for them."""
        from evaluators.weights import expand

        assert self._weights is not None
        before = self._opened
        self.close()
        expand(str(before.path), self._weights, before.runtime.threads)
        self.open(self._weights, before.runtime.n_threads, before.runtime.n_gpu_layers)

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        return self._opened.tokenize(text, add_special, parse_special).tolist()

    def texts(self, sequences: list[list[int]], special: bool) -> list[str]:
        return [self._opened.text_of(ids, special) for ids in sequences]

    def ends(self) -> list[int]:
        return self._opened.ends()

    def context(self, n_ctx: int, n_step: int, n_outputs: int, n_seqs: int, apart: bool) -> None:
        from evaluators.llama_native import Context

        model = self._opened
        self._context = Context(model, n_ctx, n_step, n_outputs, n_seqs, apart)
        self._shared = self._memory(n_outputs * model.n_vocab)

    def clear(self) -> None:
        assert self._context is not None
        self._context.clear()

    def copy(self, source: int, target: int) -> None:
        assert self._context is not None
        self._context.copy(source, target)

    def forget(self, sequence: int, kept: int) -> None:
        assert self._context is not None
        self._context.forget(sequence, kept)

    def decode(
        self,
        tokens: list[int],
        positions: list[int],
        wanted: list[int],
        sequences: Sequence[Sequence[int]] | None,
    ) -> None:
        assert self._context is not None
        rows = self._context.decode(
            np.array(tokens, np.int32),
            np.array(positions, np.int32),
            np.array(wanted, np.int8),
            sequences,
        )
        self._shared[: rows.size] = rows.ravel()

    def close_context(self) -> None:
        if self._context is not None:
            self._context.close()
            self._context = None

    def close(self) -> None:
        self.close_context()
        if self._model is not None:
            self._model.close()

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        asks: bool,
        thinks: bool | None,
    ) -> str | None:
        """Render the chat template, a stranger's program: it can loop forever or ask for all
        memory.
        """
        source = self._opened.chat_template()
        if source is None:
            return None
        _import_the_rest()
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        def stop(_signal: int, _frame: FrameType | None) -> None:
            raise TimeoutError(f"it is not done after {_RENDER_SECONDS} seconds")

        before = signal.signal(signal.SIGALRM, stop)
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        try:
            if sys.platform == "linux":
                most = _data_bytes() + _RENDER_BYTES
                least = most if soft == resource.RLIM_INFINITY else min(most, soft)
                resource.setrlimit(resource.RLIMIT_DATA, (least, hard))
            signal.alarm(_RENDER_SECONDS)
            formatter = Jinja2ChatFormatter(
                source, self._opened.token_text("eos"), self._opened.token_text("bos"), asks
            )
            said: dict[str, Any] = {"messages": messages, "tools": tools}
            if thinks is not None:
                said |= {"enable_thinking": thinks, "thinking": thinks}
            prompt = formatter(**said).prompt
        except Exception as error:  # a template can raise anything
            about = str(error).rstrip(". ") or type(error).__name__
            raise EvaluationError(f"The chat template cannot be rendered: {about}.") from error
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        if len(prompt) > _MOST_LETTERS:
            raise EvaluationError(
                f"The chat template makes more than {_MOST_LETTERS:,} characters."
            )
        return prompt

    def call(self, function: str, file: str, arguments: dict[str, Any]) -> Any:
        """Run a function of this package in this process."""
        module, _, name = function.partition(":")
        assert module.startswith("evaluators.")
        return getattr(importlib.import_module(module), name)(file, **arguments)


def _data_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * mmap.PAGESIZE


def answer_requests(
    requests: int, answers: int, memory: Memory, weights: int | None = None
) -> None:
    """Answer until there are no more requests."""
    server = _Server(memory, weights)
    with open(requests, "rb") as asked, open(answers, "wb", buffering=0) as told:
        for line in asked:
            asking = json.loads(line)
            try:
                answer = {"value": getattr(server, asking.pop("request"))(**asking)}
            except EvaluationError as error:
                answer = {"error": [error.message, error.remedy]}
            except MemoryError:
                answer = {"error": ["llama.cpp's process has too little memory.", "Free some."]}
            data = memoryview(json.dumps(answer).encode() + b"\n")
            while data:
                data = data[told.write(data) :]
    server.close()


def _import_bindings_alone() -> None:
    """Have `llama_cpp` be a package without its front door, which imports all that chats and
    servers need: half of what it takes to start.
    """
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.submodule_search_locations is None or "llama_cpp" in sys.modules:
        return
    package = ModuleType("llama_cpp")
    package.__path__ = list(found.submodule_search_locations)
    package.__spec__ = found
    sys.modules["llama_cpp"] = package


def _import_the_rest() -> None:
    """Have it be the whole package again: chat formats need what its front door imports."""
    package = importlib.import_module("llama_cpp")
    if not hasattr(package, "Llama"):
        assert package.__spec__ is not None and package.__spec__.loader is not None
        package.__spec__.loader.exec_module(package)
        from evaluators.llama_native import LOG

        LOG.start()  # the package has taken llama.cpp's log over


def serve(requests: int, answers: int, logits: int, weights: int | None = None) -> None:
    """Answer requests until there are no more, then end this process. `weights` is a file in memory
    for those of an expanded model.
    """
    os.environ["GGML_NO_BACKTRACE"] = "1"  # made by a debugger that it would start
    _import_bindings_alone()

    def memory(n_floats: int) -> NDArray[np.float32]:
        n_bytes = max(4 * n_floats, mmap.PAGESIZE)
        return np.frombuffer(mmap.mmap(logits, n_bytes), np.float32, n_floats)

    answer_requests(requests, answers, memory, weights)
    os._exit(0)  # nothing is left to be done that could keep it


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))
