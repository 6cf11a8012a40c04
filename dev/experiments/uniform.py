"""Every tensor at one type, ours beside llama.cpp's: KL of the weights on text that nobody
calibrated on, measured by llama-perplexity.

    bash benchmarks/llamacpp_peer.sh build PEER            # llama.cpp's own programs, once
    python dev/experiments/uniform.py MODEL PEER --out FOLDER --types Q4_0,Q5_0 --text A [--text B]

One run of quantkit up to its level files, then `llama-quantize --pure` with that run's imatrix: the
same base, the same statistics, the same bytes. Every file is expanded to F16 and its KL to the base
measured, so that how a type rounds activations plays no part. With --tuning every level file is
also tuned as a whole, block after block, by so many steps. What is there already is not made again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from frontier import Peer
from tuned_mix import tuned

from quantkit import pipeline
from quantkit.config import PROFILES, RunConfig
from quantkit.config.targets import BitsPerWeight
from quantkit.ggml.types import QuantType, file_label
from quantkit.gguf_file.base import load_base
from quantkit.llamacpp.stock import StockRecipe
from quantkit.run.folder import RunDir


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
    parser.add_argument("--tuning", type=int, default=0, help="steps a block; 0: not tuned")
    parser.add_argument("--chunks", type=int, default=40, help="of 512 tokens, of each text")
    parser.add_argument("--jobs", type=int, default=1, help="files measured at a time")
    arguments = parser.parse_args()
    types, device = tuple(arguments.types.split(",")), arguments.device
    config = RunConfig(
        model=arguments.model,
        targets=(BitsPerWeight(str(max(QuantType(t).bpw for t in types))),),
        levels=types,
        profile=arguments.profile,
        calibration=arguments.calibration,
        device=device,
    )
    run, scratch = RunDir(arguments.out / "run"), arguments.out / "llama.cpp"
    scratch.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    pipeline.run(config, run.path, until="quantize")
    print(f"quantkit {time.monotonic() - started:.0f} s", file=sys.stderr)
    base = load_base(run).path
    peer = Peer(arguments.peer, base, scratch, arguments.chunks, arguments.jobs)
    imatrix = run.artifacts.imatrix
    found = {
        "theirs": [peer.quantize(qtype, True, imatrix) for qtype in types],
        "level": [run.artifacts.levels / f"{qtype}.gguf" for qtype in types],
    }
    if arguments.tuning:
        recipes = {q: StockRecipe(file_label(QuantType(q)), True) for q in types}
        made = [
            tuned(run, arguments.out / qtype, recipe, arguments.tuning, device)
            for qtype, recipe in recipes.items()
        ]
        found |= {"level": [level for level, _ in made], "tuned": [path for _, path in made]}
    for text in arguments.text:
        peer.logits(text)
    files = [path for paths in found.values() for path in paths]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        measured = pool.map(lambda f: peer.weight_kl(f, arguments.text), files)
        kl = dict(zip(files, measured, strict=True))
    show(types, [text.name for text in arguments.text], found, kl)


def show(
    types: Sequence[str],
    texts: Sequence[str],
    found: Mapping[str, Sequence[Path]],
    kl: Mapping[Path, Mapping[str, float]],
) -> None:
    """A row for every type and text."""
    ours = [who for who in found if who != "theirs"]
    print(f"| type | text | theirs |{''.join(f' {who} | ratio |' for who in ours)}")
    print("|---|---|---:|" + "---:|---:|" * len(ours))
    for position, qtype in enumerate(types):
        for text in texts:
            values = {who: kl[paths[position]][text] for who, paths in found.items()}
            their = values["theirs"]
            cells = "".join(f" {values[who]:.5f} | {values[who] / their:.2f} |" for who in ours)
            print(f"| {qtype} | {text} | {their:.5f} |{cells}")


if __name__ == "__main__":
    main()
