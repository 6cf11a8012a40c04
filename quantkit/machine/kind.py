"""What this machine computes on."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Mapping
from importlib import metadata
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


def has_gpu() -> bool:
    """Return whether this machine has an NVIDIA GPU."""
    return shutil.which("nvidia-smi") is not None


def uses_gpu(environment: Mapping[str, str]) -> bool:
    """Return whether runs here can use a GPU: PyTorch may be built for processors alone, and
    ZeroGPU lends one for a minute or so.
    """
    built_for_cpu = metadata.version("torch").endswith("+cpu")
    return has_gpu() and not built_for_cpu and not environment.get("SPACES_ZERO_GPU")


def memory_here(environment: Mapping[str, str]) -> int:
    """Return the bytes of memory: what a Space says it has, else what the system says; 0 when
    unknown.
    """
    said = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(Gi|G|Mi)?B?", environment.get("MEMORY", ""))
    if said:
        unit = {"Gi": 2**30, "G": 10**9, "Mi": 2**20, None: 1}[said[2]]
        return int(float(said[1]) * unit)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0
