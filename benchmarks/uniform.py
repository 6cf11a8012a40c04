"""Every tensor at one type, ours beside llama.cpp's: KL of the weights on text that nobody
calibrated on, measured by llama-perplexity.

    bash benchmarks/llamacpp_peer.sh build PEER            # llama.cpp's own programs, once
    python benchmarks/uniform.py MODEL PEER --out FOLDER --types Q4_0,Q5_0 --text A [--text B]

One run of quantkit up to its level files, then `llama-quantize --pure` with that run's imatrix: the
same base, the same statistics, the same bytes. Every file is expanded to F16 and its KL to the base
measured, so that how a type rounds activations plays no part. What is there already is not made
again.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from frontier import Peer

from quantkit import pipeline
from quantkit.config import PROFILES, RunConfig, Target
from quantkit.qtypes import QuantType
from quantkit.rundir import RunDir
from quantkit.stages import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("peer", type=Path, help="folder with llama.cpp's programs in bin/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--types", required=True)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--profile", choices=PROFILES, default="fast")
    parser.add_argument("--calibration", default="english")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--chunks", type=int, default=40, help="of 512 tokens, of each text")
    parser.add_argument("--jobs", type=int, default=1, help="files measured at a time")
    arguments = parser.parse_args()
    types = tuple(arguments.types.split(","))
    config = RunConfig(
        model=arguments.model,
        targets=(Target("bpw", str(max(QuantType(t).bpw for t in types))),),
        levels=types,
        profile=arguments.profile,
        calibration=arguments.calibration,
        device=arguments.device,
    )
    run, scratch = RunDir(arguments.out / "run"), arguments.out / "llama.cpp"
    scratch.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    pipeline.run(config, run.path, until="quantize")
    print(f"quantkit {time.monotonic() - started:.0f} s", file=sys.stderr)
    base = convert.load_base(run).path
    peer = Peer(arguments.peer, base, scratch, arguments.chunks, arguments.jobs)
    imatrix = run.stage_dir("calibrate") / "imatrix.gguf"
    theirs = [peer.quantize(qtype, True, imatrix) for qtype in types]
    ours = [run.stage_dir("quantize") / f"{qtype}.gguf" for qtype in types]
    for text in arguments.text:
        peer.logits(text)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        kl = list(pool.map(lambda f: peer.weight_kl(f, arguments.text), [*theirs, *ours]))
    names = [text.name for text in arguments.text]
    print(f"| type |{''.join(f' {name} theirs | ours | ratio |' for name in names)}")
    print("|---|" + "---:|---:|---:|" * len(names))
    for qtype, their, our in zip(types, kl[: len(types)], kl[len(types) :], strict=True):
        cells = (f" {their[n]:.5f} | {our[n]:.5f} | {our[n] / their[n]:.2f} |" for n in names)
        print(f"| {qtype} |{''.join(cells)}")


if __name__ == "__main__":
    main()
