"""What this machine computes on."""

from __future__ import annotations

import platform
from pathlib import Path


def device_kind(device: str) -> str:
    """Return the maker's name of the GPU, or of the processor for "cpu"."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return next(named, platform.machine())
    except OSError:
        return platform.machine()
