"""Tokens a second of llama.cpp by type of the weights: what a smaller file costs or saves in time.

    python benchmarks/type_speed.py [--layers 6] [--threads 2] [--types Q4_K,IQ3_S]

Every matrix of a Llama of 2,048 by 5,632 with random weights is stored in one type (32 rows are
quantized and repeated: the time does not depend on values) and run by `evaluators.speed`: prompts
of 64 tokens, answers of 24, the best of five. The last column is the speed of answers over Q4_K's.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
from tiny_gguf import Shape, write_llama  # noqa: E402

from evaluators import speed  # noqa: E402
from evaluators.llama_runtime import Runtime  # noqa: E402
from quantkit.ggml import native  # noqa: E402
from quantkit.ggml.types import BF16, F16, QUANTIZED, QuantType  # noqa: E402
from quantkit.gguf_file.read import GgufFile  # noqa: E402
from quantkit.gguf_file.write import SlotFile, lay_out  # noqa: E402
from quantkit.markdown import table  # noqa: E402

_ROWS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--types")
    options = parser.parse_args()
    asked = options.types.split(",") if options.types else [q.name for q in (*QUANTIZED, F16, BF16)]
    rates: dict[QuantType, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        shape = Shape(n_embd=2048, n_ff=5632, n_layer=options.layers, n_vocab=512)
        base = GgufFile(write_llama(Path(folder, "base.gguf"), shape))
        for qtype in sorted(map(QuantType, asked)):
            path = store(base, qtype, Path(folder, "one.gguf"))
            found = speed.measure(path, 128, 64, 24, 5, Runtime(n_threads=options.threads))
            rates[qtype] = max(found.prompt.repeats), max(found.generation.repeats)
            print(qtype, *(f"{rate:.1f}" for rate in rates[qtype]), flush=True)
    of_q4 = rates.get(QuantType("Q4_K"), (0.0, float("nan")))[1]
    rows = [
        [
            str(q),
            f"{8 * q.block_bytes / q.block_size:.2f}",
            f"{prompt:.0f}",
            f"{answer:.1f}",
            f"{answer / of_q4:.2f}",
        ]
        for q, (prompt, answer) in rates.items()
    ]
    print(table(["type", "bits", "prompt tokens/s", "answer tokens/s", "over Q4_K"], rows))


def store(base: GgufFile, qtype: QuantType, path: Path) -> Path:
    """Write the model of `base` with all of its matrices in one type."""
    types = {name: qtype for name, t in base.tensors.items() if len(t.shape) == 2}
    file = SlotFile(path, lay_out(base, types))
    for name, tensor in base.tensors.items():
        if name not in types:
            file.write(name, base.packed(name))
            continue
        few = np.ascontiguousarray(base.values(name)[:_ROWS])
        importance = np.ones(few.shape[1], np.float32)
        packed = native.quantize(few, qtype, importance)
        file.write(name, np.tile(packed, (-(-tensor.shape[0] // _ROWS), 1))[: tensor.shape[0]])
    file.finish()
    return path


if __name__ == "__main__":
    main()
