"""What calibration text is worth: weight KL of a model at one type, by mix and by number of tokens.

    python dev/experiments/calibration.py CHECKPOINT OUT --mix builtin --mix builtin,prose-de \
        --tokens 8192,32768,131072 --text wiki=FILE.txt --text de=FILE.txt [--type Q4_0]

Every linear layer of the blocks is quantized by GPTQ with descent, as a run does it, for the first
so many tokens of each mix; embeddings and head stay as they are. Of each it prints the error on
held-out inputs of the mix over that of imatrix on the same grid (the geometric mean over tensors),
and the KL against the original on every text: float32, second half of windows of 512 tokens.

OUT keeps the tokens of each mix, what was measured (results.json) and nothing else: started again,
it goes on with what is missing. --minutes ends it before the next measurement.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from quantkit.calibration.documents import interleave, pack, split
from quantkit.calibration.mix import Reader
from quantkit.config import PROFILES
from quantkit.ggml import native
from quantkit.ggml.types import QuantType
from quantkit.gptq.select import Inputs, solve_tensor
from quantkit.gptq.solver import factorize
from quantkit.model.blockwise import BlockwiseModel, compute_dtype, load_model, load_tokenizer
from quantkit.statistics.hessian import HessianCollector, is_linear

N_CTX = 512
DAMPING = 0.1  # of the median of diag H, as in the package
HELDOUT = 16_384


def tokens_of(
    mix: str, folder: Path, out: Path, n_tokens: int, device: str
) -> dict[str, torch.Tensor]:
    """The mix's train and held-out sequences, int64 (n, N_CTX), as a run would read them."""
    path = out / f"tokens-{hashlib.sha256(mix.encode()).hexdigest()[:8]}.npz"
    if not path.exists():
        model = load_model(folder, compute_dtype(device), device)
        tokenizer = load_tokenizer(folder)
        reader = Reader(model, tokenizer, None, 0, lambda done, total, message: None)
        read = reader.mix(mix, n_tokens + HELDOUT, N_CTX)
        print(read.note, [(d.name, round(w, 3)) for d, w in read.domains], flush=True)
        texts = [split(domain, 0) for domain, _ in read.domains]
        shares = [share for _, share in read.domains]
        found = {}
        for part, n in (("train", n_tokens // N_CTX), ("heldout", HELDOUT // N_CTX)):
            rows = [pack(text[part], tokenizer, n, N_CTX) for text in texts]
            found[part] = interleave(rows, shares, n)
        np.savez(path, **found)
    return {part: torch.from_numpy(ids) for part, ids in np.load(path).items()}


def blocks_of(
    base: BlockwiseModel, parts: dict[str, torch.Tensor], batch: int
) -> Iterator[dict[str, HessianCollector]]:
    """Block by block the sums of x xᵀ of every part."""
    batches = [(part, ids) for part, all_ids in parts.items() for ids in all_ids.split(batch)]
    device = base.model.device
    hidden = [base.trace(ids.to(device))[0] for _, ids in batches]
    for index, block in enumerate(base.blocks):
        prefix = base.block_name(index)
        linears = {f"{prefix}.{n}": m for n, m in block.named_modules() if is_linear(m)}
        collectors = {part: HessianCollector(linears) for part in parts}
        for i, (part, ids) in enumerate(batches):
            call = base.trace(ids.to(device))[1][index]
            with torch.no_grad(), collectors[part].watching():
                hidden[i] = base.run_block(index, hidden[i], call)
        yield collectors


def quantized(
    base: BlockwiseModel,
    parts: dict[str, torch.Tensor],
    counts: list[int],
    qtype: QuantType,
    n_sweeps: int,
) -> dict[int, tuple[dict[str, torch.Tensor], list[float]]]:
    """By number of tokens every linear layer's decoded weight, and the ratios of errors."""
    pieces, start = {}, 0
    for count in counts:  # each piece adds to those before
        pieces[str(count)] = parts["train"][start : count // N_CTX]
        start = count // N_CTX
    found: dict[int, tuple[dict[str, torch.Tensor], list[float]]] = {c: ({}, []) for c in counts}
    modules = dict(base.model.named_modules())
    for collectors in blocks_of(base, {**pieces, "heldout": parts["heldout"]}, 8):
        heldout = collectors["heldout"].means()
        for group, names in collectors["heldout"].members.items():
            total = torch.zeros_like(heldout[group])
            n_tokens = 0
            for count in counts:
                own = collectors[str(count)]
                total += own.means()[group] * own.n_tokens[group]
                n_tokens += own.n_tokens[group]
                hessian = total / n_tokens
                importance = hessian.diagonal().cpu().numpy().copy()
                inputs = Inputs(importance, hessian, heldout[group], factorize(hessian, DAMPING))
                for name in names:
                    weight = modules[name].weight.float().cpu()
                    one = solve_tensor(
                        weight, [qtype], ("gptq", "imatrix"), inputs, None, n_sweeps
                    )[qtype]
                    weights, ratios = found[count]
                    ratios.append(one.errors["gptq"].relative / one.errors["imatrix"].relative)
                    weights[name] = torch.from_numpy(native.dequantize(one.packed, qtype)).half()
    return found


@torch.no_grad()
def kl(base: Any, other: Any, ids: torch.Tensor) -> list[float]:
    """Mean KL of every window."""
    found = []
    for window in ids.to(base.device).split(4):
        log_p, log_q = (
            m(input_ids=window, use_cache=False).logits[:, N_CTX // 2 :].float().log_softmax(-1)
            for m in (base, other)
        )
        found += (log_p.exp() * (log_p - log_q)).sum(-1).mean(1).tolist()
    return found


def windows(tokenizer: Any, path: str, n_windows: int) -> torch.Tensor:
    ids = tokenizer(Path(path).read_text("utf-8"), verbose=False).input_ids
    n = min(n_windows, len(ids) // N_CTX)
    return torch.tensor(ids[: n * N_CTX]).reshape(n, N_CTX)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mix", action="append", required=True)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--tokens", default="32768")
    parser.add_argument("--type", type=QuantType, default=QuantType("Q4_0"))
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=math.inf)
    options = parser.parse_args()
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    counts = sorted(int(n) for n in options.tokens.split(","))
    kept = options.out / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    tokenizer = load_tokenizer(options.checkpoint)
    texts = dict(text.split("=", 1) for text in options.text)
    for mix in options.mix:
        keys = {n: f"{mix} {options.type} {n}" for n in counts}
        if all(key in results for key in keys.values()):
            continue
        parts = tokens_of(mix, options.checkpoint, options.out, max(counts), options.device)
        if time.monotonic() - started > 60 * options.minutes:
            break
        dtype = compute_dtype(options.device)
        blocks = BlockwiseModel(load_model(options.checkpoint, dtype, options.device))
        n_sweeps = PROFILES["standard"].n_sweeps
        found = quantized(blocks, parts, counts, options.type, n_sweeps)
        print(f"{mix}: quantized after {time.monotonic() - started:.0f} s", flush=True)
        base, other = (
            load_model(options.checkpoint, torch.float32, options.device) for _ in range(2)
        )
        modules = dict(other.named_modules())
        for n, (weights, ratios) in found.items():
            for name, weight in weights.items():
                modules[name].weight.copy_(weight)
            row = {"error": math.exp(sum(map(math.log, ratios)) / len(ratios))}
            for name, path in texts.items():
                per_window = kl(base, other, windows(tokenizer, path, options.windows))
                row[name] = sum(per_window) / len(per_window)
            results[keys[n]] = row
            kept.write_text(json.dumps(results, indent=1))
    for key, row in results.items():
        print(f"{key:44}", *(f"{name} {value:.5f}" for name, value in row.items()))


if __name__ == "__main__":
    main()
