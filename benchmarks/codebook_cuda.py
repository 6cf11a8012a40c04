"""Codebook types on an NVIDIA GPU: kernels against torch, seconds at an 8B block's shapes.

    python benchmarks/codebook_cuda.py                  # everything
    python benchmarks/codebook_cuda.py --parts check,time,tiles,levels --types IQ2_S

Random weights and correlated inputs: codes are looked for as long as in a real tensor. Kernels are
compiled first, in a process for each type, all at once. A part that fails prints why, and the next
goes on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from quantkit.ggml import codebook_scales
from quantkit.ggml.codebooks import CODEBOOKS, Codebook
from quantkit.ggml.types import QuantType
from quantkit.gptq import codebooks
from quantkit.gptq.codebook_steps import step_block, walk_units
from quantkit.gptq.inputs import make_inputs
from quantkit.gptq.select import Inputs, solve_tensor
from quantkit.gptq.solver import Factor

TENSORS = {
    "q": (4096, 4096),
    "k": (1024, 4096),
    "v": (1024, 4096),
    "o": (4096, 4096),
    "gate": (14336, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}
LEVELS = ("Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K")
LOW_LEVELS = ("IQ2_XXS", "IQ2_S", "IQ3_XXS", "IQ3_S")
TILES = ((4, 1), (8, 1), (16, 1), (8, 2), (16, 2), (16, 4))
TILE_TYPES = ("IQ2_XXS", "IQ2_S", "IQ3_XXS")
N_SWEEPS = 4
METHODS = ("gptq", "imatrix")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", default=",".join(map(str, CODEBOOKS)))
    parser.add_argument("--parts", default="check,time,tiles,levels")
    parser.add_argument("--compile", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.compile:
        name, rows, warps = given.compile
        with tiles(int(rows), int(warps)):
            solve_small(CODEBOOKS[QuantType(name)])
        return
    types = [QuantType(name) for name in given.types.split(",")]
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    parts: dict[str, Callable[[list[QuantType]], None]] = {
        "check": check,
        "time": times,
        "levels": levels,
        "tiles": try_tiles,
    }
    attempt(partial(compile_all, types, "tiles" in given.parts))
    for name, part in parts.items():
        if name in given.parts.split(","):
            print(f"== {name}", flush=True)
            attempt(partial(part, types))


def attempt(part: Callable[[], None]) -> None:
    try:
        part()
    except Exception:
        traceback.print_exc(file=sys.stdout)
    sys.stdout.flush()


def compile_all(types: list[QuantType], with_tiles: bool) -> None:
    """Every kernel in a process of its own: they end up in Triton's cache."""
    begun = time.perf_counter()
    default = default_tiles()
    jobs = [(str(q), *default) for q in types]
    if with_tiles:
        jobs += [(n, *t) for n in TILE_TYPES for t in TILES if t != default]
    own = [sys.executable, __file__, "--compile"]
    running = [
        (job, subprocess.Popen([*own, *map(str, job)], stderr=subprocess.PIPE)) for job in jobs
    ]
    for job, process in running:
        _, wrong = process.communicate()
        taken = time.perf_counter() - begun
        print(f"compiled {job}: {taken:.0f} s", "" if not process.returncode else wrong[-800:])


def default_tiles() -> tuple[int, int]:
    from quantkit.gptq import kernels_codebook_step_cuda as step

    return step.ROWS, step.WARPS


@contextmanager
def tiles(rows: int, warps: int) -> Iterator[None]:
    from quantkit.gptq import kernels_codebook_step_cuda as step
    from quantkit.gptq import kernels_codebook_walk_cuda as walk

    before = [(module, module.ROWS, module.WARPS) for module in (step, walk)]
    for module, _, _ in before:
        module.ROWS, module.WARPS = rows, warps
    yield
    for module, *old in before:
        module.ROWS, module.WARPS = old


def hessian(n: int, seed: int = 0) -> torch.Tensor:
    """Mean x xᵀ of correlated inputs whose columns differ in size."""
    generator = torch.Generator("cuda").manual_seed(seed)
    mix = torch.randn(n, n, generator=generator, device="cuda") / n**0.5
    sizes = torch.logspace(-0.5, 0.5, n, device="cuda")
    sizes = sizes[torch.randperm(n, generator=generator, device="cuda")]
    x = torch.randn(2 * n, n, generator=generator, device="cuda")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    x = (x @ mix + x) * sizes
    found = x.T @ x / len(x)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    return found


def weight(n_rows: int, n: int, device: str = "cuda") -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(n_rows, n, generator=generator, device=device)


def inputs_of(square: torch.Tensor) -> Inputs:
    return make_inputs(square, square, METHODS, "cuda")


def solve_small(book: Codebook) -> None:
    w, known = weight(96, 512), inputs_of(hessian(512))
    shares = known.damped.diagonal().contiguous()
    packed = codebooks.rounded(book, w, shares)
    packed = codebooks.feedback(book, packed, w, [known.by_units])
    codebooks.descend(book, packed, w, known.damped, 1)
    torch.cuda.synchronize()


def check(types: list[QuantType]) -> None:
    """Kernels and torch from the same start: rows that are equal, and the errors' ratio."""
    w, known = weight(96, 512), inputs_of(hessian(512))
    w[0] = 0
    w[1, :256] = 0
    damped = known.damped
    for qtype in types:
        attempt(partial(check_type, CODEBOOKS[qtype], w, damped, [known.by_units]))


def check_type(
    book: Codebook, w: torch.Tensor, damped: torch.Tensor, factors: list[Factor]
) -> None:
    shares = damped.diagonal().contiguous()
    scale = codebook_scales.group_scales(book, w, shares[None])
    plain_scale = codebook_scales.in_torch(book, w, shares[None])
    same = torch.isclose(scale, plain_scale, rtol=1e-4).float().mean()
    start = codebook_scales.start(book, w, shares)
    step, walk = codebooks._step_block_cuda, codebooks._walk_units_cuda
    fitted = [codebooks.fit_scales(book, start, w, shares, s) for s in (step, step_block)]
    fed = [codebooks.feedback(book, fitted[1], w, factors, s) for s in (walk, walk_units)]
    done = [codebooks.descend(book, fed[1], w, damped, 2, s) for s in (step, step_block)]
    again = [codebooks.descend(book, fed[1], w, damped, 2, step) for _ in range(4)]
    steady = all(torch.equal(other, done[0]) for other in again)
    print(f"{book.qtype}: scales {float(same):.3f};", end="")
    for name, (ours, plain) in (("fit", fitted), ("feedback", fed), ("descent", done)):
        rows = (ours == plain).all(1).float().mean()
        off = [(book.values(found) - w).double() for found in (ours, plain)]
        one, other = (float(((e @ damped.double()) * e).sum()) for e in off)
        print(f" {name} {float(rows):.3f} of rows, error {one / other:.5f};", end="")
    finite = bool(torch.isfinite(book.values(done[0])).all())
    print(f" finite {finite}, steady {steady}", flush=True)


class Laps:
    """Seconds of parts, the GPU waited for."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        torch.cuda.synchronize()
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        torch.cuda.synchronize()
        now = time.perf_counter()
        self.spent[name] = self.spent.get(name, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {taken:.3f}" for name, taken in self.spent.items())
        return f"{sum(self.spent.values()):.3f} s ({parts})"


def solve(book: Codebook, w: torch.Tensor, known: Inputs, n_sweeps: int, laps: Laps) -> None:
    shares = known.damped.diagonal().contiguous()
    laps.lap("other")
    packed = codebook_scales.start(book, w, shares)
    laps.lap("scales")
    packed = codebooks.fit_scales(book, packed, w, shares)
    laps.lap("fit")
    packed = codebooks.feedback(book, packed, w, [known.by_units])
    laps.lap("feedback")
    codebooks.descend(book, packed, w, known.damped, n_sweeps)
    laps.lap("descent")


def times(types: list[QuantType]) -> None:
    """All tensors of an 8B block, and one small tensor by torch."""
    known = {n: inputs_of(hessian(n)) for n in (4096, 14336)}
    for own in known.values():
        assert own.by_units
    for qtype in types:
        book, total = CODEBOOKS[qtype], {}
        solve(book, weight(1024, 4096), known[4096], 1, Laps())
        for name in ("gate", "down", "o", "k"):
            n_rows, n = TENSORS[name]
            w, laps = weight(n_rows, n), Laps()
            solve(book, w, known[n], N_SWEEPS, laps)
            total[name] = laps
            print(f"{qtype} {name}: {laps}", flush=True)
        counts = {"gate": 2, "down": 1, "o": 2, "k": 2}
        whole = sum(counts[n] * sum(laps.spent.values()) for n, laps in total.items())
        print(f"{qtype}: a block {whole:.2f} s; {whole / 218e6 * 1e9:.2f} ns a weight", flush=True)
    w, own = weight(256, 1024), inputs_of(hessian(1024))
    for name in ("IQ2_XXS", "IQ3_S"):
        book = CODEBOOKS[QuantType(name)]
        shares = own.damped.diagonal().contiguous()
        packed = codebook_scales.start(book, w, shares)
        for kind, walk, step in (("torch", walk_units, step_block), ("kernels", None, None)):
            laps = Laps()
            codebooks.fit_scales(book, packed, w, shares, step)
            laps.lap("fit")
            fed = codebooks.feedback(book, packed, w, [own.by_units], walk)
            laps.lap("feedback")
            codebooks.descend(book, fed, w, own.damped, 1, step)
            laps.lap("a sweep")
            print(f"{name} 256 x 1024 by {kind}: {laps}", flush=True)


def levels(_: list[QuantType]) -> None:
    """The solving of a block at five levels, and at four more of codebooks."""
    known = {n: inputs_of(hessian(n)) for n in (4096, 14336)}
    five = [QuantType(name) for name in LEVELS]
    low = [QuantType(name) for name in LOW_LEVELS]
    for name in ("q", "k"):
        n_rows, n = TENSORS[name]
        solve_tensor(weight(n_rows, n, "cpu"), [*five, *low], METHODS, known[n], None, N_SWEEPS)
    taken = {}
    for label, types in (("five", five), ("four", low), ("nine", [*five, *low])):
        torch.cuda.synchronize()
        taken[label] = 0.0
        for name, (n_rows, n) in TENSORS.items():
            w = weight(n_rows, n, "cpu")
            begun = time.perf_counter()
            found = solve_tensor(w, types, METHODS, known[n], None, N_SWEEPS)
            torch.cuda.synchronize()
            taken[label] += time.perf_counter() - begun
            if name in ("k", "down"):
                for qtype, own in found.items():
                    errors = {m: f"{e.relative:.5f}" for m, e in own.errors.items()}
                    print(f"  {label} {name} {qtype} {own.method} {errors}")
        print(f"{label}: {taken[label]:.2f} s", flush=True)
    print(f"nine over five: {taken['nine'] / taken['five']:.2f}")
    print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def try_tiles(_: list[QuantType]) -> None:
    """Rows and warps of a program, for large and small tensors."""
    known = inputs_of(hessian(4096))
    for name in TILE_TYPES:
        for n_rows in (14336, 4096, 1024):
            attempt(partial(try_tiles_on, CODEBOOKS[QuantType(name)], n_rows, known))


def try_tiles_on(book: Codebook, n_rows: int, known: Inputs) -> None:
    shares = known.damped.diagonal().contiguous()
    w = weight(n_rows, 4096)
    start = codebooks.rounded(book, w, shares)
    for rows, warps in TILES:
        with tiles(rows, warps):
            laps = Laps()
            codebooks.fit_scales(book, start, w, shares)
            laps.lap("fit")
            fed = codebooks.feedback(book, start, w, [known.by_units])
            laps.lap("feedback")
            codebooks.descend(book, fed, w, known.damped, 1)
            laps.lap("sweep")
        print(f"{book.qtype} {n_rows} rows, tile {rows}, {warps} warps: {laps}", flush=True)


if __name__ == "__main__":
    main()
