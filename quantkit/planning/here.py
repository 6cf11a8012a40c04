"""How fast this machine is, over those that `planning.time` knows."""

from __future__ import annotations

import os
from dataclasses import dataclass

from quantkit.planning.time import cpu_speed, gpu_speed


@dataclass(frozen=True)
class Here:
    """What a run is planned for, in words, and its speed over what the times are of."""

    name: str
    speed: float


def here(device: str) -> Here:
    """Return the cores or the GPUs of this machine; one H200 where it has none of the GPUs that a
    plan asks for.
    """
    if device == "cpu":
        n_cores = os.cpu_count() or 1
        return Here(f"{n_cores} core{'s' * (n_cores != 1)}", cpu_speed(n_cores))
    import torch

    n_gpus = torch.cuda.device_count()
    if not n_gpus:
        return Here("one H200, which this machine lacks", gpu_speed("H200"))
    name = torch.cuda.get_device_name()
    return Here(f"{n_gpus} x {name}", gpu_speed(name, n_gpus))
