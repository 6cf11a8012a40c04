"""How long codebook types take on a CPU: tensors of SmolLM2's `ffn_down`, by gptq and imatrix.

    python benchmarks/codebook_speed.py [--types IQ3_XXS,IQ2_S] [--tensors 30] [--sweeps 4]

Random weights and correlated inputs of the true shapes: codes are looked for as long as in a real
tensor. Two tensors are solved at a time, as quantize does. Prints seconds of the whole, by the
clock and of processors, and by part for one tensor alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from quantkit.ggml import native
from quantkit.ggml.codebooks import CODEBOOKS
from quantkit.ggml.types import QuantType
from quantkit.gptq import codebooks
from quantkit.gptq.inputs import make_inputs
from quantkit.gptq.select import Inputs, solve_tensor

N_ROWS, N_COLUMNS = 576, 1536


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", default="IQ3_XXS,IQ2_S")
    parser.add_argument("--tensors", type=int, default=30)
    parser.add_argument("--sweeps", type=int, default=4)
    given = parser.parse_args()
    types = [QuantType(name) for name in given.types.split(",")]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N_ROWS, N_COLUMNS, generator=generator)
    mix = torch.randn(N_COLUMNS, N_COLUMNS, generator=generator) / N_COLUMNS**0.5
    x = torch.randn(4 * N_COLUMNS, N_COLUMNS, generator=generator) @ (mix + torch.eye(N_COLUMNS))
    hessian = x.T @ x / len(x)
    by_part(weight, inputs_of(hessian), types, given.sweeps)

    def solve(_: int) -> None:
        inputs = inputs_of(hessian)  # a tensor has its own Hessian to factorize
        solve_tensor(weight, types, ("gptq", "imatrix"), inputs, None, given.sweeps)

    begun, busy = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(solve, range(given.tensors)))
    taken, busy = time.perf_counter() - begun, time.process_time() - busy
    names = " and ".join(map(str, types))
    print(f"{given.tensors} tensors of {N_ROWS} x {N_COLUMNS} in {names}: {taken:.1f} s")
    print(f"{busy:.1f} s of processors, so {busy / 2:.1f} s on two that do nothing else")


def inputs_of(hessian: torch.Tensor) -> Inputs:
    return make_inputs(hessian, hessian, ("gptq", "imatrix"), "cpu")


def by_part(weight: torch.Tensor, inputs: Inputs, types: list[QuantType], n_sweeps: int) -> None:
    """Seconds of each part; the first rows compile the kernels."""
    for qtype in types:
        book, importance = CODEBOOKS[qtype], inputs.importance
        solve_tensor(weight[:8], [qtype], ("gptq", "imatrix"), inputs, None, 1)
        times = [time.perf_counter()]

        def lap(times: list[float] = times) -> None:
            times.append(time.perf_counter())

        packed = torch.from_numpy(native.quantize(weight.numpy(), qtype, importance))
        lap()
        packed = codebooks.fit_scales(book, packed, weight, torch.from_numpy(importance))
        lap()
        packed = codebooks.feedback(book, packed, weight, [inputs.by_units])
        lap()
        codebooks.descend(book, packed, weight, inputs.damped, n_sweeps)
        lap()
        parts = zip(("ggml", "scales", "feedback", "descent"), np.diff(times), strict=True)
        print(qtype, ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts))


if __name__ == "__main__":
    main()
