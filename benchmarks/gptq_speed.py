"""How fast GPTQ, descent, Hessians and decoding are, on the shapes of a real model.

    python benchmarks/gptq_speed.py                              # the GPU, Llama-3.1-8B
    python benchmarks/gptq_speed.py --device cpu --model smollm2

Weights and inputs are random (heavy-tailed, correlated); only shapes matter for speed. The kernels
are checked against their references before they are timed. One tensor of each shape is timed and
the whole model's time extrapolated: times of the shapes, times how often they occur. The report
goes to standard output, its numbers as JSON to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from quantkit.ggml import native
from quantkit.ggml.formats import FORMATS
from quantkit.ggml.types import QuantType
from quantkit.gptq import descent, select, solver
from quantkit.gptq.products import product
from quantkit.statistics.hessian import HessianCollector, add_outer, symmetrize

DAMPING = 0.1
K_LEVELS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@dataclass(frozen=True)
class Shape:
    """Tensors of one shape and one distinct input: (n_rows, n_columns), how many are in a model,
    and how many of its Hessians.
    """

    name: str
    n_rows: int
    n_columns: int
    n_tensors: int
    n_inputs: int


MODELS = {
    "llama-8b": (
        K_LEVELS,
        (
            Shape("attn_q, attn_output", 4096, 4096, 64, 64),
            Shape("attn_k, attn_v", 1024, 4096, 64, 0),
            Shape("ffn_gate, ffn_up", 14336, 4096, 64, 32),
            Shape("ffn_down", 4096, 14336, 32, 32),
        ),
    ),
    "smollm2": (
        ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
        (
            Shape("attn_q, attn_output", 576, 576, 60, 60),
            Shape("attn_k, attn_v", 192, 576, 60, 0),
            Shape("ffn_gate, ffn_up", 1536, 576, 60, 30),
            Shape("ffn_down", 576, 1536, 30, 30),
        ),
    ),
}


class Bench:
    """A device, its clock and what was measured."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.numbers: dict[str, float] = {}

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], n: int = 3) -> float:
        """The median of n calls after one that warms up."""
        work()
        taken = []
        for _ in range(n):
            self.synchronize()
            start = time.perf_counter()
            work()
            self.synchronize()
            taken.append(time.perf_counter() - start)
        return sorted(taken)[n // 2]

    def note(self, name: str, value: float, unit: str) -> None:
        self.numbers[f"{name} [{unit}]"] = value
        print(f"{name:58} {value:12.4g} {unit}", flush=True)

    def weight(self, n_rows: int, n_columns: int) -> torch.Tensor:
        """Random and a little heavy-tailed, like trained weights: float32, on the CPU."""
        generator = torch.Generator().manual_seed(n_rows + n_columns)
        w = torch.randn(n_rows, n_columns, generator=generator)
        return w * (1 + w.square() / 8) * 0.02

    def hessian(self, n: int) -> torch.Tensor:
        """Of correlated inputs whose columns differ in size, float32, on the device."""
        generator = torch.Generator(self.device).manual_seed(n)
        options = {"generator": generator, "device": self.device}
        x = torch.randn(2 * n, n // 4, **options) @ torch.randn(n // 4, n, **options)
        x = x / (n // 4) ** 0.5 + 0.5 * torch.randn(2 * n, n, **options)
        x *= torch.logspace(-0.7, 0.7, n, device=self.device)
        return (x.T @ x) / len(x)


def rounded(w: torch.Tensor, h: torch.Tensor, qtype: QuantType) -> torch.Tensor:
    """ggml's rows with diag(H) as importances, on the device of `h`."""
    importance = h.diagonal().cpu().numpy().copy()
    return torch.from_numpy(native.quantize(w.numpy(), qtype, importance)).to(h.device)


def check(bench: Bench) -> None:
    """The device's kernels against the torch walks on the same device, all grids: rows that differ
    and by how much their error does.
    """
    n, n_rows = 1024, 256
    h, w = bench.hessian(n), bench.weight(n_rows, n)
    factor, original = solver.factorize(h, DAMPING), w.to(bench.device)
    print(f"rows of {n_rows} that differ between kernel and torch (gptq, descent), error ratios:")
    for qtype, form in FORMATS.items():
        packed = rounded(w, h, qtype)
        rows = [solver.Rows(original, form.grid(packed))]
        (fast,), (slow,) = (
            solver.gptq(rows, factor),
            solver.gptq(rows, factor, solver.walk_columns),
        )
        both = [form.with_codes(packed, codes) for codes in (fast, slow)]
        moved = [
            descent.descend(form, both[1], original, h, 1, step)
            for step in (None, descent.step_block)
        ]
        differ = [int((a != b).any(1).sum()) for a, b in (both, moved)]
        ratios = []
        for a, b in (both, moved):
            errors = [float(descent.row_errors(form, p, original, h).sum()) for p in (a, b)]
            ratios.append(errors[0] / errors[1])
        print(f"  {qtype!s:8} {differ} {ratios[0]:.6f} {ratios[1]:.6f}", flush=True)
        assert max(abs(r - 1) for r in ratios) < 5e-3, f"{qtype}: the kernel is wrong"


def grids(bench: Bench) -> None:
    """The GPU's search for scales against ggml's: rows that differ, the errors' ratio."""
    from quantkit.ggml import grids_cuda

    w, h = bench.weight(1024, 4096), bench.hessian(4096)
    w[::2] = w[::2].bfloat16().float()
    shares, original = h.diagonal().contiguous(), w.to(bench.device)
    print("rows of 1024 that differ between ggml's grid and the GPU's, error ratio:")
    for qtype in FORMATS:
        both = grids_cuda.quantize(original, qtype, shares), rounded(w, h, qtype)
        off = [((FORMATS[qtype].values(p) - original).square() @ shares).sum() for p in both]
        print(f"  {qtype!s:8} {int((both[0] != both[1]).any(1).sum())} {off[0] / off[1]:.7f}")


def products(bench: Bench) -> None:
    """Rates of float32 products, and how far they are from float64."""
    n = 8192 if bench.device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=bench.device) for _ in range(2))
    exact = a[:64].double() @ b.double()
    for name, multiply in (("plain float32", torch.matmul), ("as used here", product)):
        taken = bench.seconds(lambda f=multiply: f(a, b))
        off = float((multiply(a[:64], b) - exact).norm() / exact.norm())
        bench.note(f"product {n}^3, {name} (off by {off:.1e})", 2 * n**3 / taken / 1e12, "TFLOP/s")


def plain_loop(rows: solver.Rows, factor: solver.Factor) -> None:
    """GPTQ as it is usually written in torch: one level, rows as rows, blocks of 128 columns."""
    grid, upper = rows.grid, factor.upper
    w = rows.weight[:, factor.order].clone()
    n = w.shape[1]
    scale, minimum = (
        x.repeat_interleave(grid.group, 1)[:, factor.order] for x in (grid.scale, grid.minimum)
    )
    for start in range(0, n, 128):
        end = min(start + 128, n)
        block, errors = w[:, start:end], torch.empty_like(w[:, start:end])
        for i in range(end - start):
            s, m = scale[:, start + i], minimum[:, start + i]
            level = ((block[:, i] - m) / torch.where(s == 0, 1.0, s)).round()
            level = level.clamp(grid.low, grid.high)
            errors[:, i] = (block[:, i] - (level * s + m)) / upper[start + i, start + i]
            block[:, i:] -= errors[:, i, None] * upper[start + i, start + i : end][None]
        w[:, end:] -= errors @ upper[start:end, end:]


_GRID_ROWS = 1024  # of a tensor; the other rows are copies, the time of ggml's grids is scaled


def solve_shape(bench: Bench, shape: Shape, types: list[QuantType]) -> dict[str, float]:
    """Seconds that each part takes for one tensor (`factorize`: for one input)."""
    n_rows, n = shape.n_rows, shape.n_columns
    print(f"\n{shape.name}: {n_rows} x {n}, {len(types)} levels")
    some = min(n_rows, _GRID_ROWS)
    w, h = bench.weight(some, n), bench.hessian(n)
    spent: dict[str, float] = {}
    packed = {}
    for q in types:
        start = time.perf_counter()
        packed[q] = rounded(w, h, q).repeat(n_rows // some, 1)
        taken = (time.perf_counter() - start) * n_rows / some
        bench.note(f"  ggml's grid {q}, weights", n_rows * n / taken, "1/s")
        spent["ggml's grids on the CPU"] = spent.get("ggml's grids on the CPU", 0.0) + taken
    w = w.repeat(n_rows // some, 1)
    original = w.to(bench.device)

    spent["factorize"] = bench.seconds(lambda: solver.factorize(h, DAMPING))
    factor = solver.factorize(h, DAMPING)
    inputs = select.Inputs(h.diagonal().cpu().numpy().copy(), h, h, factor)
    rows = [solver.Rows(original, FORMATS[q].grid(packed[q])) for q in types]
    spent["gptq"] = bench.seconds(lambda: solver.gptq(rows, factor))
    bench.note("  gptq, level rows", n_rows * len(types) / spent["gptq"], "rows/s")

    spent["descent"] = 0.0
    for q, codes in zip(types, solver.gptq(rows, factor), strict=True):
        form, rest = FORMATS[q], (original, inputs.damped)
        begun = form.with_codes(packed[q], codes)
        taken = bench.seconds(lambda f=form, b=begun, r=rest: descent.descend(f, b, *r), 1)
        bench.note(f"  descent {q}", n_rows * descent.N_SWEEPS / taken, "row sweeps/s")
        spent["descent"] += taken
    spent["errors"] = bench.seconds(
        lambda: [descent.row_errors(FORMATS[q], packed[q], original, h) for q in types]
    )

    if bench.device == "cuda":
        from quantkit.ggml import grids_cuda

        shares = h.diagonal().contiguous()
        spent["grids on the GPU"] = bench.seconds(
            lambda: [grids_cuda.quantize(original, q, shares) for q in types]
        )
        spent["rounded on the GPU"] = bench.seconds(
            lambda: [grids_cuda.quantize(original, q, None) for q in types]
        )
    spent["solve_tensor, everything"] = bench.seconds(
        lambda: select.solve_tensor(w.bfloat16(), types, ("gptq", "imatrix"), inputs, None), 1
    )
    for part, taken in spent.items():
        bench.note(f"  {part}", taken, "s")
    return spent


def solve(bench: Bench, shapes: tuple[Shape, ...], levels: tuple[str, ...]) -> None:
    """Every part of the quantize stage, extrapolated to the whole model."""
    total: dict[str, float] = {}
    for shape in shapes:
        for part, taken in solve_shape(bench, shape, [QuantType(name) for name in levels]).items():
            times = shape.n_inputs if part == "factorize" else shape.n_tensors
            total[part] = total.get(part, 0.0) + taken * times
    print(f"\nwhole model, {', '.join(levels)}")
    for part, taken in total.items():
        bench.note(part, taken, "s")
    gptq = total["factorize"] + total["gptq"]
    bench.note("GPTQ solve: factorize + gptq", gptq, "s")
    bench.note("GPTQ solve with descent", gptq + total["descent"], "s")
    stage = total["factorize"] + total["solve_tensor, everything"]
    bench.note("quantize stage without reading and writing files", stage, "s")


def loops(bench: Bench, shape: Shape, level: str) -> None:
    """One level of one tensor by a plain loop, by our sweep with the torch walk, by the kernel."""
    w, h = bench.weight(shape.n_rows, shape.n_columns), bench.hessian(shape.n_columns)
    form, factor = FORMATS[QuantType(level)], solver.factorize(h, DAMPING)
    flat = torch.from_numpy(native.quantize(w.numpy(), form.qtype))
    rows = [solver.Rows(w.to(bench.device), form.grid(flat.to(bench.device)))]
    plain = bench.seconds(lambda: plain_loop(rows[0], factor), 1)
    walk = bench.seconds(lambda: solver.gptq(rows, factor, solver.walk_columns), 1)
    print(f"\none level, {level}, {shape.n_rows} x {shape.n_columns}")
    bench.note("plain torch loop", plain, "s")
    bench.note("our sweep with the torch walk", walk, "s")
    bench.note("our sweep with the kernel", bench.seconds(lambda: solver.gptq(rows, factor)), "s")


def hessians(bench: Bench, shapes: tuple[Shape, ...]) -> None:
    """Accumulation alone, from activations in the dtype that blocks run in."""
    n_tokens = 16384 if bench.device == "cuda" else 2048
    dtype = torch.bfloat16 if bench.device == "cuda" else torch.float32
    per_token = 0.0
    print()
    for n in sorted({s.n_columns for s in shapes}):
        x = torch.randn(n_tokens, n, device=bench.device).to(dtype)
        total = torch.zeros(n, n, device=bench.device)
        taken = bench.seconds(lambda x=x, total=total: add_outer(total, x))
        total.zero_()
        add_outer(total, x)
        exact = x.double()[:, :64].T @ x.double()
        off = float((symmetrize(total)[:64] - exact).norm() / exact.norm())
        bench.note(f"Hessian of {n} columns (off by {off:.1e})", n_tokens / taken, "tokens/s")
        per_token += taken / n_tokens * sum(s.n_inputs for s in shapes if s.n_columns == n)
    bench.note("all Hessians of the model", 1 / per_token, "tokens/s")


def calibration(bench: Bench) -> None:
    """Forward of Llama-3.1-8B's blocks, plain and with Hessians collected."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=1024,
        max_position_embeddings=4096,
    )
    with torch.device(bench.device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    n_tokens = 16384
    ids = torch.randint(0, 1024, (n_tokens // 2048, 2048), device=bench.device)
    layers = model.model.layers
    linears = {n: m for n, m in layers.named_modules() if isinstance(m, torch.nn.Linear)}
    collector = HessianCollector(linears)

    @torch.no_grad()
    def plain() -> None:
        model.model(ids, use_cache=False)

    @torch.no_grad()
    def watched() -> None:
        with collector.watching():
            model.model(ids, use_cache=False)

    print()
    rates = [n_tokens / bench.seconds(work) / 16 for work in (plain, watched)]  # of 32 layers
    bench.note("forward of 32 blocks", rates[0], "tokens/s")
    bench.note("forward with Hessians", rates[1], "tokens/s")
    bench.note("share of the plain forward", rates[1] / rates[0], "")


def decoding(bench: Bench, levels: tuple[str, ...]) -> None:
    """Packed rows to float32 on the device, and by ggml on the CPU."""
    n_rows, n = (14336, 4096) if bench.device == "cuda" else (1536, 576)
    w = bench.weight(64, n)
    print()
    for name in (*levels, "Q4_0", "IQ4_XS") if n % 256 == 0 else levels:
        form = FORMATS[QuantType(name)]
        packed = torch.from_numpy(native.quantize(w.numpy(), form.qtype, np.ones(n, np.float32)))
        packed = packed.repeat(n_rows // 64, 1)
        moved = packed.to(bench.device)
        taken = bench.seconds(lambda f=form, p=moved: f.values(p))
        bench.note(f"decode {name} on the device", n_rows * n * 4 / taken / 1e9, "GB/s of float32")
        taken = bench.seconds(lambda f=form, p=packed: native.dequantize(p.numpy(), f.qtype), 1)
        bench.note(f"decode {name} by ggml", n_rows * n * 4 / taken / 1e9, "GB/s of float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--model", default="llama-8b", choices=sorted(MODELS))
    parser.add_argument("--levels", help="types, separated by commas")
    parser.add_argument("--out", type=Path, help="where the numbers go as JSON")
    arguments = parser.parse_args()
    levels, shapes = MODELS[arguments.model]
    if arguments.levels:
        levels = tuple(arguments.levels.split(","))
    bench = Bench(arguments.device)
    name = torch.cuda.get_device_name() if bench.device == "cuda" else platform.processor()
    print(f"{name}, {os.cpu_count()} CPU cores, torch {torch.__version__}")
    parts: list[Callable[[], None]] = [
        lambda: check(bench),
        lambda: products(bench),
        lambda: hessians(bench, shapes),
        lambda: decoding(bench, levels),
        lambda: loops(bench, shapes[0], levels[-1]),
        lambda: solve(bench, shapes, levels),
    ]
    if bench.device == "cuda":
        parts[1:1] = [lambda: grids(bench), lambda: calibration(bench)]
    for part in parts:
        part()
        if arguments.out:
            arguments.out.write_text(json.dumps(bench.numbers, indent=1) + "\n")
    if bench.device == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
