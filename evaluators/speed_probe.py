"""Speed and memory of one GGUF, measured in this very process.

`evaluators.speed` has it run in a process for each file: peak memory is a property of a process,
and only a fresh one has that of a single model.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluators.llama_runtime import MAX_STEP, Runtime, check_context

if TYPE_CHECKING:
    from evaluators.llama_native import Context

# "load_tensors:   CPU_Mapped model buffer size =   258.13 MiB", and so for KV, RS, compute, output
_BUFFER = re.compile(r"(\S+)\s+(model|KV|RS|compute|output)\s+buffer size\s*=\s*([\d.]+) MiB")


@dataclass(frozen=True)
class ProbeRequest:
    """What to measure: a context of `n_ctx` cells, `n_prompt` tokens decoded together, then
    `n_generate` one by one, all of it `n_repeats` times.
    """

    n_ctx: int
    n_prompt: int
    n_generate: int
    n_repeats: int
    n_threads: int
    n_gpu_layers: int


def probe(file: str, **asked: int) -> dict[str, Any]:
    """Load time, tokens per second, and memory, for the fields of a `ProbeRequest`. Raises
    EvaluationError as `Model` does.
    """
    from evaluators.llama_native import LOG, Context, Model

    request = ProbeRequest(**asked)
    runtime = Runtime(request.n_threads, request.n_gpu_layers)
    started = time.perf_counter()
    with Model(file, runtime, exact=False) as model:
        load_seconds = time.perf_counter() - started
        lines = list(LOG.lines)
        check_context(Path(file), request.n_ctx, model.n_ctx_train)
        n_step = min(request.n_ctx, MAX_STEP)
        with Context(model, request.n_ctx, n_step, n_outputs=1) as context:
            lines += context.log_lines
            # Which tokens they are does not matter for speed; llama-bench draws them, too.
            prompt = np.random.default_rng(0).integers(0, model.n_vocab, request.n_prompt)
            ids = prompt.astype(np.int32)
            _prompt_seconds(context, ids)  # pages the weights in, builds the graph
            prompt_rates, generation_rates = [], []
            for _ in range(request.n_repeats):
                prompt_rates.append(len(ids) / _prompt_seconds(context, ids))
                seconds = _generation_seconds(context, len(ids), request.n_generate)
                generation_rates.append(request.n_generate / seconds)
    return {
        "load_seconds": round(load_seconds, 4),
        "prompt": _rates(prompt_rates, request.n_prompt),
        "generation": _rates(generation_rates, request.n_generate),
        "peak_rss_bytes": peak_rss(),
        "buffers": _buffers(lines),
    }


def _prompt_seconds(context: Context, ids: np.ndarray) -> float:
    context.clear()
    started = time.perf_counter()
    for start in range(0, len(ids), context.n_step):
        part = ids[start : start + context.n_step]
        wanted = np.zeros(len(part), dtype=np.int8)
        wanted[-1] = 1
        positions = np.arange(start, start + len(part), dtype=np.int32)
        context.decode(part, positions, wanted)
    return time.perf_counter() - started


def _generation_seconds(context: Context, n_past: int, n_generate: int) -> float:
    token = np.zeros(1, dtype=np.int32)
    wanted = np.ones(1, dtype=np.int8)
    started = time.perf_counter()
    for position in range(n_past, n_past + n_generate):
        logits = context.decode(token, np.array([position], dtype=np.int32), wanted)
        token[0] = logits[0].argmax()
    return time.perf_counter() - started


def _rates(rates: Sequence[float], n_tokens: int) -> dict[str, Any]:
    """The best of the repeats (what others do on the machine only ever slows one), and all."""
    return {
        "tokens": n_tokens,
        "tokens_per_second": round(max(rates), 2),
        "repeats": [round(rate, 2) for rate in rates],
    }


def _buffers(lines: Sequence[str]) -> dict[str, int]:
    """Bytes that llama.cpp allocated or mapped, by kind and summed over devices."""
    sizes: dict[str, int] = {}
    for line in lines:
        if match := _BUFFER.search(line):
            _, kind, mib = match.groups()
            key = f"{kind.lower()}_bytes"
            sizes[key] = sizes.get(key, 0) + int(float(mib) * (1 << 20))
    return sizes


def peak_rss() -> int:
    """Return the bytes that this process held at most. On Linux ru_maxrss starts with what the
    parent held when it started this one, so the kernel's own mark of this program is read.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB
