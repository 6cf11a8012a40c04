"""Measure what a context costs in memory when llama.cpp runs a model: caches of keys, values and
states, and the buffers of one batch.

llama.cpp itself is asked, in the sandbox: it lays everything out without allocating it, and its log
says how large each cache and buffer would be. Sliding windows, compressed keys, layers
that share their keys, and recurrent states are counted as it counts them: for float16 caches of one
sequence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantkit import sandbox
from quantkit.errors import QuantkitError
from quantkit.gguf_file.read import GgufFile

RUNTIME_BYTES = 200_000_000  # the program, its libraries and what it allocates for bookkeeping
_PROBES = tuple(2**i for i in range(9, 19))  # contexts that llama.cpp is asked about
_CELLS = 256  # caches are made of so many, and whole numbers of them
_USUAL_TOKENS = 8192
_LIMITS = sandbox.Limits(cpu_seconds=120, wall_seconds=120, n_processes=256)
_MIB = 2**20
_MOST = 2.0**50  # bytes: no machine has as many
_CACHE = re.compile(r"size\s*=\s*([\d.]+) MiB \(\s*(\d+) cells")
_BUFFER = re.compile(r"(?:compute|output) buffer size\s*=\s*([\d.]+) MiB")


@dataclass(frozen=True)
class ContextMemory:
    """Bytes in addition to the file itself: caches that grow with every token of context, caches
    that grow with the first `window_tokens` of them, logits and activations of one batch, and the
    rest.
    """

    bytes_per_token: int
    window_bytes_per_token: int
    window_tokens: int
    buffers: tuple[tuple[int, int], ...]  # tokens, bytes; between them no more than a line
    fixed_bytes: int  # recurrent states, the program
    trained_tokens: int | None  # the context that the model was trained for
    note: str = ""  # why llama.cpp could not be asked

    @property
    def usual_tokens(self) -> int:
        """Return what is asked about where no context is named."""
        return min(_USUAL_TOKENS, self.trained_tokens or _USUAL_TOKENS)

    def n_bytes(self, n_tokens: int) -> int:
        n_tokens = _CELLS * math.ceil(n_tokens / _CELLS)
        caches = n_tokens * self.bytes_per_token
        caches += min(n_tokens, self.window_tokens) * self.window_bytes_per_token
        contexts, n_bytes = zip(*self.buffers, strict=True)
        buffers = np.interp(n_tokens, contexts, n_bytes)
        if n_tokens > contexts[-1]:  # of masks then
            buffers *= n_tokens / contexts[-1]
        return self.fixed_bytes + caches + math.ceil(buffers)


def context_memory(base: GgufFile) -> ContextMemory:
    """Return what contexts of a GGUF take; its header is enough. Where llama.cpp does not open it,
    counted from its metadata as for a model without any of what makes caches smaller, and the
    `note` says so.
    """
    trained = _value(base, "context_length")
    trained_tokens = int(trained) if trained else None
    try:
        layouts = ask(base.path, _PROBES)
    except (QuantkitError, ValueError):
        return _counted(base, trained_tokens)
    many = layouts[-1]
    whole = sum(n_bytes for n_bytes, n_cells in many.caches if n_cells >= many.n_tokens)
    windows = [(b, n_cells) for b, n_cells in many.caches if 1 < n_cells < many.n_tokens]
    states = sum(n_bytes for n_bytes, n_cells in many.caches if n_cells <= 1)
    window_tokens = max((n_cells for _, n_cells in windows), default=0)
    return ContextMemory(
        round(whole / many.n_tokens),
        round(sum(n_bytes / n_cells for n_bytes, n_cells in windows)),
        window_tokens,
        tuple((layout.n_tokens, round(layout.buffers)) for layout in layouts),
        round(states) + RUNTIME_BYTES,
        trained_tokens,
    )


@dataclass(frozen=True)
class Layout:
    """The memory that llama.cpp would allocate for a context: bytes and cells of its caches (a
    recurrent state is one cell), and the bytes of buffers.
    """

    n_tokens: int
    caches: tuple[tuple[float, int], ...]
    buffers: float


def ask(path: Path, contexts: Sequence[int]) -> list[Layout]:
    """Ask llama.cpp for its layouts of contexts of these lengths. Raises QuantkitError if it does
    not survive the model and ValueError if it reports nothing.
    """
    logs = sandbox.call(
        f"{logs_of.__module__}:{logs_of.__name__}",
        {"path": str(path.absolute()), "contexts": list(contexts)},
        limits=_LIMITS,
        readable=[path.absolute()],
        shape=list[str],
    )
    found = [
        Layout(
            n_tokens,
            tuple((float(mib) * _MIB, int(cells)) for mib, cells in _CACHE.findall(log)),
            sum(map(float, _BUFFER.findall(log))) * _MIB,
        )
        for n_tokens, log in zip(contexts, logs, strict=True)
    ]
    if not all(layout.caches and 0 < layout.buffers < _MOST for layout in found) or any(
        n_bytes > _MOST for layout in found for n_bytes, _ in layout.caches
    ):
        raise ValueError("llama.cpp reports no caches or buffers")
    return found


def _counted(base: GgufFile, trained_tokens: int | None) -> ContextMemory:
    """From the metadata, all layers with keys and values of their own for the whole context."""
    n_layers, width = (int(_value(base, name, 0)) for name in ("block_count", "embedding_length"))
    n_heads = _most(_value(base, "attention.head_count", 1)) or 1
    key = int(_value(base, "attention.key_length", width // n_heads))
    value = int(_value(base, "attention.value_length", width // n_heads))
    heads = _value(base, "attention.head_count_kv", n_heads)
    kv_heads = list(heads) if isinstance(heads, (list, tuple)) else [int(heads)] * n_layers
    rows = [t.shape[0] for name, t in base.tensors.items() if name == "token_embd.weight"]
    feed_forward = _most(_value(base, "feed_forward_length", 4 * width))
    buffers = 512 * 4 * ((rows[0] if rows else 0) + 4 * width + 2 * feed_forward)
    return ContextMemory(
        2 * sum(int(n) for n in kv_heads) * (key + value),
        0,
        0,
        ((_PROBES[-1], buffers),),
        RUNTIME_BYTES,
        trained_tokens,
        "llama.cpp could not say what a context takes: it may be less",
    )


def _value(base: GgufFile, name: str, default: Any = None) -> Any:
    return base.metadata.get(f"{base.metadata.get('general.architecture', '')}.{name}", default)


def _most(value: Any) -> int:
    return int(max(value)) if isinstance(value, (list, tuple)) else int(value)


def logs_of(path: str, contexts: Sequence[int]) -> list[str]:
    """Return what llama.cpp says when it lays out contexts and allocates nothing. Empty where it
    does not open the file.
    """
    import llama_cpp

    from quantkit.llamacpp.stock import captured_log

    params = llama_cpp.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    params.n_gpu_layers = 0
    found = []
    with captured_log() as parts:
        model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not model:
            return [""] * len(contexts)
        for n_tokens in contexts:
            asked = llama_cpp.llama_context_default_params()
            asked.n_ctx, asked.n_batch, asked.n_ubatch = n_tokens, 2048, 512
            asked.swa_full = False
            parts.clear()
            context = llama_cpp.llama_init_from_model(model, asked)
            found.append("".join(parts))
            if context:
                llama_cpp.llama_free(context)
    return found
