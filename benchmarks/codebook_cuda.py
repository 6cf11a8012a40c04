"""Codebook types on an NVIDIA GPU: kernels against torch, seconds at an 8B block's shapes.

    python benchmarks/codebook_cuda.py --quick          # what matters most, some 90 s
    python benchmarks/codebook_cuda.py                  # everything
    python benchmarks/codebook_cuda.py --parts time,profile,registers --types IQ2_S

Random weights and correlated inputs: codes are looked for as long as in a real tensor. Kernels are
compiled into a folder of their own, so that `compile` says what a first run takes. A part that
fails prints why, and the next goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
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
PARTS = ("compile", "check", "levels", "profile", "time", "registers")
QUICK = PARTS[:4]
REGISTERS = (64, 80, 96, 128, 168, 255)
N_SWEEPS = 4
METHODS = ("gptq", "imatrix")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", default=",".join(map(str, CODEBOOKS)))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    given = parser.parse_args()
    types = [QuantType(name) for name in given.types.split(",")]
    wanted = QUICK if given.quick else given.parts.split(",")
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    parts: dict[str, Callable[[list[QuantType]], None]] = {
        "compile": compile_all,
        "check": check,
        "levels": levels,
        "profile": profile,
        "time": times,
        "registers": try_registers,
    }
    with tempfile.TemporaryDirectory() as folder:
        if "compile" in wanted:
            os.environ["TRITON_CACHE_DIR"] = folder
        for name in PARTS:
            if name in wanted:
                begun = time.perf_counter()
                print(f"== {name}", flush=True)
                attempt(partial(parts[name], types))
                print(f"   {name} took {time.perf_counter() - begun:.1f} s", flush=True)


def attempt(part: Callable[[], None]) -> None:
    try:
        part()
    except Exception:
        traceback.print_exc(file=sys.stdout)
    sys.stdout.flush()


def compile_all(types: list[QuantType]) -> None:
    """Every kernel, in threads, as a first run does; and what is compiled nevertheless later."""
    import triton

    from quantkit.gptq import codebook_compile_cuda as compiler

    torch.zeros(1, device="cuda")
    compiled = []

    def note(*, src, times, cache_hit, **_) -> None:  # type: ignore[no-untyped-def]
        if not cache_hit:
            compiled.append(f"{src.fn.__name__.lstrip('_')} {times.total / 1e6:.1f}")

    triton.knobs.compilation.listener = note
    for label, own in (("the first alone", types[:1]), ("all others", types)):
        begun = time.perf_counter()
        compiler.compile_kernels(frozenset(own), torch.device("cuda"))
        taken = time.perf_counter() - begun
        print(f"{label}: {taken:.1f} s for {len(compiled)} ({', '.join(compiled)})", flush=True)
        compiled.clear()
    begun = time.perf_counter()
    for qtype in types:
        solve_small(CODEBOOKS[qtype])
    taken = time.perf_counter() - begun
    print(f"a small tensor in each: {taken:.1f} s, compiled once more: {compiled}", flush=True)
    triton.knobs.compilation.listener = None


@contextmanager
def registers(n: int) -> Iterator[None]:
    from quantkit.gptq import kernels_codebook_step_cuda as step
    from quantkit.gptq import kernels_codebook_walk_cuda as walk

    before = step.REGISTERS, walk.REGISTERS
    step.REGISTERS = walk.REGISTERS = n
    yield
    step.REGISTERS, walk.REGISTERS = before


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


def profile(_: list[QuantType]) -> None:
    """Where the GPU is busy while a tensor is solved at the four low levels."""
    known = inputs_of(hessian(4096))
    w = weight(*TENSORS["gate"], "cpu")
    low = [QuantType(name) for name in LOW_LEVELS]
    activities = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    begun = time.perf_counter()
    solve_tensor(w, low, METHODS, known, None, N_SWEEPS)
    torch.cuda.synchronize()
    print(f"gate, four levels: {time.perf_counter() - begun:.3f} s")
    with torch.profiler.profile(activities=activities) as found:
        solve_tensor(w, low, METHODS, known, None, N_SWEEPS)
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda e: -e.device_time_total)
    print(f"the GPU's busy time {sum(e.device_time_total for e in events) / 1e6:.3f} s")
    for event in events[:16]:
        print(f"  {event.device_time_total / 1e6:.3f} s in {event.count}: {event.key[:90]}")


def try_registers(_: list[QuantType]) -> None:
    """Registers of a lane, for large and small tensors: fewer let more rows run at once."""
    known = inputs_of(hessian(4096))
    for name in ("IQ2_XXS", "IQ2_S", "IQ3_XXS"):
        for n_rows in (14336, 4096, 1024):
            attempt(partial(try_registers_on, CODEBOOKS[QuantType(name)], n_rows, known))


def try_registers_on(book: Codebook, n_rows: int, known: Inputs) -> None:
    shares = known.damped.diagonal().contiguous()
    w = weight(n_rows, 4096)
    start = codebooks.rounded(book, w, shares)
    small, rows = start[:8].contiguous(), w[:8].contiguous()
    for n in REGISTERS:
        with registers(n):
            codebooks.feedback(book, small, rows, [known.by_units])  # compiled first
            codebooks.descend(book, small, rows, known.damped, 1)
            laps = Laps()
            codebooks.fit_scales(book, start, w, shares)
            laps.lap("fit")
            fed = codebooks.feedback(book, start, w, [known.by_units])
            laps.lap("feedback")
            codebooks.descend(book, fed, w, known.damped, 1)
            laps.lap("sweep")
        print(f"{book.qtype} {n_rows} rows, {n} registers: {laps}", flush=True)


if __name__ == "__main__":
    main()
