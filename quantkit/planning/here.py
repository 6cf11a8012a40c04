"""How fast this machine is, over those that `planning.time` knows."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import cache
from math import log2

from quantkit.planning.time import CPU_MULTIPLY_ADDS, cpu_speed, gpu_speed

_SHAPE = 512, 1024, 2048  # tokens, columns and rows: a window through a layer of a small model
_TRIES = 5
_STEPS = 4  # of speeds between one and its double: two plans in a row agree


@dataclass(frozen=True)
class Here:
    """What a run is planned for, in words, and its speed over what the times are of."""

    name: str
    speed: float


@cache
def here(device: str) -> Here:
    """Return the cores or the GPUs of this machine; one H200 where it has none of the GPUs that a
    plan asks for. Cores are timed, which takes some hundredths of a second.
    """
    if device == "cpu":
        n_cores = os.cpu_count() or 1
        timed = 2 ** (round(_STEPS * log2(multiply_adds() / CPU_MULTIPLY_ADDS)) / _STEPS)
        # Products alone may be faster; not all work is products.
        return Here(f"{n_cores} core{'s' * (n_cores != 1)}", min(timed, cpu_speed(n_cores)))
    import torch

    n_gpus = torch.cuda.device_count()
    if not n_gpus:
        return Here("one H200, which this machine lacks", gpu_speed("H200"))
    name = torch.cuda.get_device_name()
    return Here(f"{n_gpus} x {name}", gpu_speed(name, n_gpus))


def multiply_adds() -> float:
    """Return the multiply-adds a second of a layer's product on all cores, in the type that models
    are run in here: the best of a few tries, by processor time, so that other work counts little.
    """
    import torch

    from quantkit.model.blockwise import compute_dtype

    tokens, columns, rows = _SHAPE
    dtype = compute_dtype("cpu")
    x, weight = torch.ones(tokens, columns, dtype=dtype), torch.ones(rows, columns, dtype=dtype)
    best = float("inf")
    for _ in range(1 + _TRIES):  # the first starts the threads
        began = time.process_time()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.process_time() - began)
    return tokens * columns * rows * torch.get_num_threads() / best
