"""llama.cpp's own choice of types, made of a run's levels, as they are and tuned.

    python dev/experiments/tuned_mix.py RUN OUT --like Q4_K_M [--steps 200] [--device cuda]

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
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from quantkit.gguf_file.base import load_base
from quantkit.search.database import load_database
from quantkit.sources.snapshot import load_snapshot

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from quantkit.gguf_file.stitch import stitch
from quantkit.llamacpp.output import lay_out_output
from quantkit.llamacpp.stock import StockRecipe, stock_types
from quantkit.model.streaming import open_model
from quantkit.run.folder import RunDir
from quantkit.run.recipe import Provenance
from quantkit.tuning.tuned import load_stored, load_tuner, tune_file
from quantkit.tuning.tuner import Tuner


def tuned(
    run: RunDir, out: Path, recipe: StockRecipe, steps: int, device: str
) -> tuple[Path, Path]:
    """The file of a run's levels at a recipe's types, and the tuned one, written into `out`: the
    same where tuning did not help.
    """
    base, index = load_base(run), load_database(run.artifacts)
    types = stock_types(base.path, recipe)
    chosen = {
        name: next(c for c in candidates if c.qtype == types[name])
        for name, candidates in index.candidates.items()
    }
    levels = {c.file: run.artifacts.levels / c.file for c in chosen.values()}
    stored = load_stored(chosen, levels)
    made = Provenance(load_snapshot(run).info.sha, (), 0, 0)
    layout = lay_out_output(base, {n: s.qtype for n, s in stored.items()}, made, recipe.label)
    out.mkdir(parents=True, exist_ok=True)
    sources = {n: levels[c.file] for n, c in chosen.items()}
    stitch(out / "levels.gguf", layout, base, sources)

    def tuner() -> AbstractContextManager[Tuner]:
        made = load_tuner(
            open_model(load_snapshot(run).folder, torch.float32, device),
            run.artifacts.row_maps,
            run.artifacts.tokens,
            stored,
            steps,
            out,
            exact=False,
        )
        return nullcontext(made)

    started = time.monotonic()

    def progress(done: int, total: int, message: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {message}", file=sys.stderr, flush=True)

    path = out / f"tuned-{layout.n_bytes}.gguf"
    outcome, _ = tune_file(path, layout, base, stored, tuner, steps, progress)
    said = f"held-out KL {outcome.kl_before:.5f} -> {outcome.kl_after:.5f}"
    print(f"{recipe.label}: {said}", file=sys.stderr, flush=True)
    return out / "levels.gguf", path if outcome.tensors else out / "levels.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--like", default="Q4_K_M")
    parser.add_argument("--pure", action="store_true", help="every tensor at that type")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()
    recipe = StockRecipe(given.like, given.pure)
    tuned(RunDir(given.run), given.out, recipe, given.steps, given.device)


if __name__ == "__main__":
    main()
