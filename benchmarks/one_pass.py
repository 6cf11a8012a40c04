"""What the statistics of one block take: seconds and peak memory, whole and in turns.

    python benchmarks/one_pass.py                       # the GPU: an 8B block, 128 experts
    python benchmarks/one_pass.py --device cpu --small  # tiny shapes, to try it

Models of one or two blocks are made here with random weights; only shapes matter. The mixture runs
under a cap (`QUANTKIT_MEMORY`): its Hessians come in turns, and are compared with those of a pass
that has all memory. One line of JSON for each row of the table follows it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from quantkit.markdown import table
from quantkit.model.blockwise import BlockwiseModel
from quantkit.statistics.collect import walk
from quantkit.statistics.inputs import BlockStatistics

N_VOCAB = 2048  # the head is no part of this


@dataclass(frozen=True)
class Row:
    """One pass over a block."""

    model: str
    cap: str
    n_tokens: int
    n_turns: int
    seconds: float
    gib: float  # the most that tensors had on the device
    largest_difference: float  # of a Hessian to that of the first pass, over its largest value


def llama(small: bool, device: str) -> BlockwiseModel:
    """Two blocks of Llama-3.1-8B's shapes."""
    width, inner = (256, 512) if small else (4096, 14336)
    config = LlamaConfig(
        vocab_size=N_VOCAB,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=width // 128,
        num_key_value_heads=max(1, width // 512),
        max_position_embeddings=1024,
    )
    return opened(LlamaForCausalLM, config, device)


def mixture(small: bool, device: str) -> BlockwiseModel:
    """One block of Qwen3-30B-A3B's shapes: 128 experts of 2048 x 768, 8 a token."""
    return experts(device, *((128, 64, 16) if small else (2048, 768, 128)))


def large_mixture(small: bool, device: str) -> BlockwiseModel:
    """One block with DeepSeek-V3's experts: 256 of 7168 x 2048, 8 a token."""
    return experts(device, *((256, 64, 16) if small else (7168, 2048, 256)))


def experts(device: str, width: int, inner: int, n_experts: int) -> BlockwiseModel:
    """One block of Qwen3's kind with so many experts."""
    config = Qwen3MoeConfig(
        vocab_size=N_VOCAB,
        hidden_size=width,
        moe_intermediate_size=inner,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=n_experts,
        num_experts_per_tok=8,
        max_position_embeddings=1024,
    )
    return opened(Qwen3MoeForCausalLM, config, device)


def opened(kind: type, config: object, device: str) -> BlockwiseModel:
    """A random model in 16 bits, made where it runs."""
    torch.manual_seed(0)
    with torch.device(device):
        model = kind(config).to(torch.bfloat16)
    return BlockwiseModel(model.requires_grad_(False).eval())


def measure(
    name: str, model: BlockwiseModel, n: int, cap: str, seen: dict[str, torch.Tensor]
) -> Row:
    """One pass over the first block, of `n` sequences of 512 tokens. `seen` holds sums over a
    Hessian's columns by module, part and expert; the first pass fills it.
    """
    os.environ.pop("QUANTKIT_MEMORY", None)
    if cap:
        os.environ["QUANTKIT_MEMORY"] = cap
    ids = np.random.default_rng(0).integers(0, N_VOCAB, (n, 512))
    tokens = {"train": ids[: n * 4 // 5], "heldout": ids[n * 4 // 5 :]}
    n_turns, worst, is_cuda = 0, 0.0, model.device.type == "cuda"

    def compare(key: str, hessian: torch.Tensor) -> None:
        nonlocal worst
        columns = hessian.sum(-1).cpu()
        known = seen.setdefault(key, columns)
        difference = (columns - known).abs().max() / known.abs().max().clamp_min(1e-30)
        worst = max(worst, float(difference))

    def see(turn: BlockStatistics) -> None:
        for inputs in turn.inputs:
            compare(f"{inputs.modules[0]} train", inputs.train)
            compare(f"{inputs.modules[0]} heldout", inputs.heldout)
        for experts in turn.experts:
            for i in range(len(experts.train)):
                compare(f"{experts.modules[0]} {experts.first + i}", experts.train[i])

    def use(unit: str, turns: Iterable[BlockStatistics]) -> None:
        nonlocal n_turns
        for turn in turns:
            n_turns += 1
            see(turn)
            del turn  # or it would stay while the next turn's are summed

    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    done = [f"block-{index:03d}" for index in range(1, len(model.blocks))] + ["head"]
    with tempfile.TemporaryDirectory() as folder:
        walk(model, tokens, done, use, Path(folder) / "states")
    if is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    gib = torch.cuda.max_memory_allocated() / 2**30 if is_cuda else 0.0
    return Row(name, cap or "none", ids.size, n_turns, round(seconds, 2), round(gib, 2), worst)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--sequences", type=int, default=320, help="of 512 tokens (default: 320)")
    parser.add_argument("--caps", default="4GiB,2GiB", help="of the mixture (default: 4GiB,2GiB)")
    given = parser.parse_args()
    rows = []
    model = llama(given.small, given.device)
    measure("warm-up", model, 8, "", {})
    rows.append(measure("8B", model, given.sequences, "", {}))
    del model
    model = mixture(given.small, given.device)
    measure("warm-up", model, 8, "", {})
    seen: dict[str, torch.Tensor] = {}
    for cap in ("", *given.caps.split(",")):
        rows.append(measure("128 experts", model, given.sequences // 5, cap, seen))
    names = ["model", "cap", "tokens", "turns", "seconds", "GiB", "largest difference"]
    print(table(names, [[str(value) for value in asdict(row).values()] for row in rows]))
    for row in rows:
        print(json.dumps(asdict(row)))


if __name__ == "__main__":
    main()
