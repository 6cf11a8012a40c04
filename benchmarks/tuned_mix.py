"""llama.cpp's own choice of types, made of a run's levels, as they are and tuned.

    python benchmarks/tuned_mix.py RUN OUT --like Q4_K_M [--steps 200] [--device cuda]

RUN is the folder of a run that has its levels and its database (`quantkit run`, not cleaned). The
types are those that llama-quantize would give, so that quantizers are compared and nothing else.
Writes OUT/levels.gguf and OUT/tuned-BYTES.gguf; `benchmarks/torch_kl.py` or `llamacpp_peer.sh
weight-kl` measures them. A killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from quantkit.ggufio.stitch import stitch
from quantkit.kquants.stock import StockRecipe, stock_types
from quantkit.output import Provenance, lay_out_output
from quantkit.rundir import RunDir
from quantkit.stages import convert, database, fetch
from quantkit.streaming import open_model
from quantkit.tuned import load_stored, load_tuner, tune_file, tuned_name
from quantkit.tuning import Tuner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--like", default="Q4_K_M")
    parser.add_argument("--pure", action="store_true", help="every tensor at that type")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()
    run = RunDir(given.run)
    base, index = convert.load_base(run), database.load(run)
    types = stock_types(base.path, StockRecipe(given.like, given.pure))
    chosen = {
        name: next(c for c in candidates if c.key.qtype == types[name])
        for name, candidates in index.candidates.items()
    }
    levels = run.stage_dir("quantize")
    stored = load_stored(chosen, levels)
    made = Provenance(fetch.load(run).info.sha, (), 0, 0)
    layout = lay_out_output(base, {n: s.qtype for n, s in stored.items()}, made, given.like)
    given.out.mkdir(parents=True, exist_ok=True)
    stitch(given.out / "levels.gguf", layout, base, {n: levels / c.file for n, c in chosen.items()})

    def tuner() -> Tuner:
        return load_tuner(
            open_model(fetch.load(run).folder, torch.float32, given.device),
            run.stage_dir("convert") / "rowmaps.safetensors",
            run.stage_dir("calibrate") / "tokens.safetensors",
            stored,
            given.steps,
            given.out,
            exact=False,
        )

    started = time.monotonic()

    def progress(done: int, total: int, message: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {message}", flush=True)

    path = given.out / tuned_name(layout.n_bytes)
    outcome, _ = tune_file(path, layout, base, stored, tuner, given.steps, progress)
    print(f"held-out KL {outcome.kl_before:.5f} -> {outcome.kl_after:.5f}")


if __name__ == "__main__":
    main()
