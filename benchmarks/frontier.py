"""Our files against llama.cpp's at the same bytes: KL of the weights on text that nobody calibrated
on, measured by llama-perplexity.

    bash benchmarks/llamacpp_peer.sh build PEER            # llama.cpp's own programs, once
    python benchmarks/frontier.py MODEL PEER --out FOLDER \\
        --imatrix-text wiki.a.txt --text wiki.b.txt [--text other.txt]

Makes llama.cpp's files with its imatrix, mixes and pure ones; then one run of quantkit whose
budgets are the bytes of these files; then expands every file to F16 and measures its KL to the base
(`llama-perplexity --kl-divergence`), so that how a type rounds activations plays no part. MODEL is
what `quantkit run` takes. What is there already is not made again. The table goes to standard
output and as JSON to FOLDER/frontier.json. With --proposals our files are what the search begins
with, the knapsack's answers, neither searched nor tuned: minutes instead of hours on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from quantkit.config.targets import FileSize, LikeMix
from quantkit.gguf_file.base import load_base
from quantkit.llamacpp.output import load_provenance
from quantkit.run.outputs import load_outputs
from quantkit.search.database import load_database

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent.parent))

from quantkit import pipeline
from quantkit.config import PROFILES, RunConfig
from quantkit.files import sha256_file, write_json
from quantkit.gguf_file.stitch import stitch as stitch_file
from quantkit.llamacpp.output import lay_out_output
from quantkit.run.events import EventLog
from quantkit.run.folder import RunDir, read_json
from quantkit.search.allocation import pruned
from quantkit.search.propose import estimated_costs, knapsack
from quantkit.stages import search

MIXES = ("Q2_K", "IQ3_M", "IQ4_XS", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K")
PURE = ("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@dataclass(frozen=True)
class Row:
    """One of llama.cpp's files beside ours of at most its bytes; KL by text."""

    name: str
    n_bytes: int
    kl: dict[str, float]
    our_bytes: int
    our_kl: dict[str, float]


class Peer:
    """llama.cpp's programs."""

    def __init__(self, folder: Path, base: Path, scratch: Path, n_chunks: int, n_jobs: int) -> None:
        self._bin, self._base, self._scratch = folder / "bin", base, scratch
        self._n_chunks = n_chunks
        self._threads = max(1, (os.cpu_count() or 1) // n_jobs)

    def _call(self, program: str, *arguments: object) -> str:
        done = subprocess.run(
            [self._bin / program, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{program} failed:\n{done.stderr[-2000:]}")
        return done.stdout + done.stderr

    def imatrix(self, text: Path) -> Path:
        path = self._scratch / f"{text.name}.imatrix.gguf"
        if not path.exists():
            options = ("-c", 512, "--chunks", 100, "-o", path)
            self._call("llama-imatrix", "-m", self._base, "-f", text, *options)
        return path

    def quantize(self, label: str, pure: bool, imatrix: Path) -> Path:
        path = self._scratch / f"{label}{'.pure' if pure else ''}.gguf"
        if not path.exists():
            flags = ["--pure"] if pure else []
            made = path.with_suffix(".making")
            self._call(
                "llama-quantize",
                *flags,
                "--imatrix",
                imatrix,
                self._base,
                made,
                label,
                os.cpu_count(),
            )
            made.rename(path)
        return path

    def logits(self, text: Path) -> Path:
        """The base's logits on a text, as llama-perplexity keeps them."""
        path = self._scratch / f"{text.name}.{self._n_chunks}.kld"
        if not path.exists():
            made = path.with_suffix(".making")
            options = ("-c", 512, "--chunks", self._n_chunks, "-t", os.cpu_count())
            self._call(
                *("llama-perplexity", "-m", self._base, "-f", text, *options),
                *("--kl-divergence-base", made),
            )
            made.rename(path)
        return path

    def weight_kl(self, file: Path, texts: list[Path]) -> dict[str, float]:
        """Mean KL by text; what was measured before is read again."""
        known = self._scratch / f"{sha256_file(file)[:16]}.{self._n_chunks}.json"
        found: dict[str, float] = read_json(known) if known.exists() else {}
        missing = [text for text in texts if text.name not in found]
        if missing:
            write_json(known, found | self._measured(file, missing))
        return read_json(known)

    def _measured(self, file: Path, texts: list[Path]) -> dict[str, float]:
        exact = self._scratch / f"{file.name}.{os.getpid()}.f16"
        self._call("llama-quantize", "--allow-requantize", file, exact, "F16", self._threads)
        found = {}
        for text in texts:
            said = self._call(
                *("llama-perplexity", "-m", exact, "-c", 512, "-t", self._threads),
                *("--kl-divergence", "--kl-divergence-base", self.logits(text)),
            )
            match = re.search(r"^Mean\s+KLD:\s*([0-9.]+)", said, re.MULTILINE)
            if match is None:
                sys.exit(f"no KL in what llama-perplexity said:\n{said[-2000:]}")
            found[text.name] = float(match[1])
        exact.unlink()
        return found


def our_files(arguments: argparse.Namespace, run: Path, sizes: list[int]) -> list[Path]:
    """What one run of quantkit makes within these bytes."""
    config = RunConfig(
        model=arguments.model,
        targets=tuple(FileSize(str(n)) for n in sizes),
        profile=arguments.profile,
        calibration=arguments.calibration,
        device=arguments.device,
        seed=arguments.seed,
    )
    started = time.monotonic()
    records = pipeline.run(config, run, until="stitch")
    for name, record in records.items():
        print(f"{name:10} {record.seconds:6.0f} s", flush=True)
    print(f"quantkit   {time.monotonic() - started:6.0f} s", flush=True)
    directory = RunDir(run)
    return [directory.artifacts.stitched / made.file for made in load_outputs(directory).outputs]


def proposed_files(config: RunConfig, run: Path, sizes: list[int]) -> list[Path]:
    """The knapsack's answer within each of these bytes, stitched from the levels of a run."""
    pipeline.run(config, run, until="quantize")
    directory = RunDir(run)
    work = pipeline.Run(config, directory, EventLog(directory.events_path))
    base, made = load_base(directory), load_provenance(work.dir)
    whole, index = pruned(search.make_space(work, base)), load_database(directory.artifacts)
    folder = run.with_name("proposals")
    folder.mkdir(exist_ok=True)
    found = []
    for n_bytes in sizes:
        space = replace(whole, limit_bytes=n_bytes)
        if not space.fits(space.smallest):
            continue
        chosen = knapsack(space, estimated_costs(space))
        keys = space.keys(chosen)
        types = {name: key.qtype for name, key in keys.items()}
        path = folder / f"{n_bytes}.gguf"
        levels = directory.artifacts.levels
        sources = {name: levels / index.find(key).file for name, key in keys.items()}
        stitch_file(path, lay_out_output(base, types, made, "Q4_K_M"), base, sources)
        found.append(path)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("peer", type=Path, help="folder with llama.cpp's programs in bin/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, action="append", required=True)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--imatrix-text", type=Path)
    given.add_argument("--imatrix", type=Path)
    parser.add_argument("--mixes", default=",".join(MIXES))
    parser.add_argument("--pure", default=",".join(PURE))
    parser.add_argument("--profile", choices=PROFILES, default="standard")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--proposals", action="store_true", help="neither search nor tune")
    parser.add_argument("--chunks", type=int, default=80, help="of 512 tokens, of each text")
    parser.add_argument("--jobs", type=int, default=1, help="files measured at a time")
    arguments = parser.parse_args()
    run, scratch = arguments.out / "run", arguments.out / "llama.cpp"
    scratch.mkdir(parents=True, exist_ok=True)
    # The base first: llama.cpp's files are made of the same GGUF as ours.
    shared = {"profile": arguments.profile, "calibration": arguments.calibration}
    shared |= {"device": arguments.device, "seed": arguments.seed}
    first = RunConfig(model=arguments.model, targets=(LikeMix("Q4_K_M"),), **shared)
    pipeline.run(first, arguments.out / "base", until="convert")
    base = load_base(RunDir(arguments.out / "base")).path
    peer = Peer(arguments.peer, base, scratch, arguments.chunks, arguments.jobs)
    imatrix = arguments.imatrix or peer.imatrix(arguments.imatrix_text)
    wanted = [(label, False) for label in filter(None, arguments.mixes.split(","))]
    wanted += [(label, True) for label in filter(None, arguments.pure.split(","))]
    theirs = {(f"pure {x}" if pure else x): peer.quantize(x, pure, imatrix) for x, pure in wanted}
    for text in arguments.text:
        peer.logits(text)
    sizes = sorted({p.stat().st_size for p in theirs.values()})
    if arguments.proposals:
        ours = proposed_files(first, run, sizes)
    else:
        ours = our_files(arguments, run, sizes)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        files = [*theirs.values(), *ours]
        kl = dict(
            zip(files, pool.map(lambda f: peer.weight_kl(f, arguments.text), files), strict=True)
        )
    rows = []
    for name, path in sorted(theirs.items(), key=lambda item: item[1].stat().st_size):
        n_bytes = path.stat().st_size
        fitting = [file for file in ours if file.stat().st_size <= n_bytes]
        if not fitting:
            print(f"{name}: nothing of ours is that small")
            continue
        best = max(fitting, key=lambda file: file.stat().st_size)
        rows.append(Row(name, n_bytes, kl[path], best.stat().st_size, kl[best]))
    show(rows, [text.name for text in arguments.text])
    table = json.dumps([asdict(row) for row in rows], indent=1)
    (arguments.out / "frontier.json").write_text(table + "\n", "utf-8")


def show(rows: list[Row], texts: list[str]) -> None:
    head = "".join(f" {text} theirs | ours | ratio |" for text in texts)
    print(f"| file | bytes | our bytes |{head}")
    print("|---|---:|---:|" + "---:|---:|---:|" * len(texts))
    for row in rows:
        cells = "".join(
            f" {row.kl[t]:.5f} | {row.our_kl[t]:.5f} | {row.our_kl[t] / row.kl[t]:.2f} |"
            for t in texts
        )
        print(f"| {row.name} | {row.n_bytes:,} | {row.our_bytes:,} |{cells}")


if __name__ == "__main__":
    main()
