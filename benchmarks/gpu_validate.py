"""Validate on a GPU: the evaluators' tests there, its distance from the CPU, what its parts take.

    python benchmarks/gpu_validate.py                      # with llama-cpp-python built for the GPU
    python benchmarks/gpu_validate.py --device cpu --small # to try it without one

The model is made here with random weights (470M parameters, --small 2M): only shapes matter. KL is
KL(CPU || GPU) of one and the same file, over 8 windows of 512 tokens: as the evaluators run it,
with products of unquantized weights summed up in 32 bits, and as llama.cpp does by itself. The
figures are written to --out, one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import llama_cpp.llama_cpp as lib  # noqa: E402
import numpy as np  # noqa: E402
from eval_fixtures import TEXT, TinySpec, log_softmax, write_tiny  # noqa: E402

from evaluators import choice_items, kl, llama_native, speed, zeroshot  # noqa: E402
from evaluators.base_logits import BaseLogits  # noqa: E402
from evaluators.devices import described  # noqa: E402
from evaluators.llama_runtime import CPU, Runtime  # noqa: E402

FTYPES = {"F16": 1, "BF16": 32, "Q8_0": 7, "Q4_K": 15, "Q5_1": 9}
N_CTX, N_WINDOWS = 512, 8
SHAPES = TinySpec(n_vocab=32_000, n_embd=2048, n_head=16, n_ff=5632, n_layer=8, n_ctx_train=2048)
SMALL = TinySpec(n_vocab=512, n_embd=256, n_head=4, n_ff=512, n_layer=2, n_ctx_train=2048)


def make_files(folder: Path, spec: TinySpec) -> dict[str, Path]:
    """A random model as F32, and what llama.cpp makes of it, by type."""
    llama_native.LOG.start()  # keeps llama.cpp's lines
    source = write_tiny(folder / "F32.gguf", spec)
    files = {name: folder / f"{name}.gguf" for name in FTYPES}
    for name, path in files.items():
        params = lib.llama_model_quantize_default_params()
        params.ftype, params.pure = FTYPES[name], True
        paths = (os.fsencode(source), os.fsencode(path))
        if lib.llama_model_quantize(*paths, ctypes.byref(params)):
            sys.exit(f"llama.cpp cannot make {name}.")
    return files


def logits(file: Path, runtime: Runtime, exact: bool) -> np.ndarray:
    """Logits of the second half of the windows, [n, n_vocab], in this very process."""
    rows = []
    positions = np.arange(N_CTX, dtype=np.int32)
    wanted = (positions >= N_CTX // 2).astype(np.int8)
    with llama_native.Model(file, runtime, exact) as model:
        ids = np.random.default_rng(0).integers(300, model.n_vocab, (N_WINDOWS, N_CTX))
        with llama_native.Context(model, N_CTX, N_CTX, N_CTX) as context:
            for window in ids.astype(np.int32):
                context.clear()
                rows.append(context.decode(window, positions, wanted).copy())
    return np.concatenate(rows)


def divergence(p_logits: np.ndarray, q_logits: np.ndarray) -> float:
    total = 0.0
    for start in range(0, len(p_logits), 64):
        p, q = (log_softmax(x[start : start + 64]) for x in (p_logits, q_logits))
        total += float((np.exp(p) * (p - q)).sum())
    return total / len(p_logits)


def parts(
    files: dict[str, Path], runtime: Runtime, text: str, folder: Path
) -> dict[str, dict[str, float]]:
    """Seconds of everything that validate measures of one file, and processor seconds."""
    took: dict[str, dict[str, float]] = {}

    def clocked(name: str, do: Callable[[], Any]) -> Any:
        began, before = time.perf_counter(), os.times()
        value = do()
        after = os.times()
        cpu = sum(after[:4]) - sum(before[:4])
        took[name] = {"seconds": time.perf_counter() - began, "cpu_seconds": cpu}
        return value

    items = choice_items.load("everyday", limit=60)
    texts = {"text": text}
    with clocked(
        "base logits",
        lambda: BaseLogits.compute(files["BF16"], texts, N_CTX, N_WINDOWS, runtime=runtime),
    ) as base:
        clocked("KL", lambda: kl.measure(base, files["Q4_K"], runtime))
        clocked("weight KL", lambda: kl.measure_weights(base, files["Q4_K"], folder, runtime))
    clocked("tasks", lambda: zeroshot.run(files["Q4_K"], items, runtime=runtime))
    clocked("speed", lambda: speed.measure(files["Q4_K"], 2048, 512, 64, 3, runtime))
    return took


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try it")
    parser.add_argument("--no-tests", action="store_true", help="leave the evaluators' tests out")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    runtime = Runtime(n_gpu_layers=-1 if options.device == "cuda" else 0)
    found: dict[str, Any] = {"device": described(runtime), "kl": {}, "parts": {}}
    print(found["device"], flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = make_files(folder, SMALL if options.small else SHAPES)
        text = "".join(TEXT.replace("cat", word) for word in ("cat", "dog", "sun", "rat"))
        for kind, file in files.items():
            on_cpu = logits(file, CPU, True)
            row = {
                "32-bit sums": divergence(on_cpu, logits(file, runtime, True)),
                "llama.cpp's": divergence(on_cpu, logits(file, runtime, False)),
            }
            found["kl"][kind] = row
            print(kind, {key: f"{value:.2e}" for key, value in row.items()}, flush=True)
        for device in dict.fromkeys((runtime, CPU)):
            took = parts(files, device, text, folder)
            found["parts"][described(device)] = took
            for part, seconds in took.items():
                shown = f"{seconds['seconds']:.2f} s, {seconds['cpu_seconds']:.1f} CPU s"
                print(f"{described(device)}: {part}: {shown}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
    if options.no_tests:
        return 0
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "tests/evaluators",
        "tests/evidence/test_devices.py",
    ]
    settings = {"TEST_LLAMA_DEVICE": options.device, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}).returncode


if __name__ == "__main__":
    sys.exit(main())
