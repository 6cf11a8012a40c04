"""What people have: devices by name, and how much of their memory a model can use.

A graphics card loses about 1 GiB to its driver and a screen. macOS lets a model have two thirds of
the memory, three quarters from 64 GB on. A PC or a phone needs the rest for itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A kind of device; `free` is a size that `parse_bytes` reads."""

    title: str
    free: str


DEVICES = {
    "gpu-6gb": Device("6 GB card (RTX 2060, 3050)", "5GiB"),
    "gpu-8gb": Device("8 GB card (RTX 3070, 4060)", "7GiB"),
    "gpu-12gb": Device("12 GB card (RTX 3060, 4070)", "11GiB"),
    "gpu-16gb": Device("16 GB card (RTX 4080, 5070 Ti)", "15GiB"),
    "gpu-24gb": Device("24 GB card (RTX 3090, 4090)", "23GiB"),
    "gpu-32gb": Device("32 GB card (RTX 5090)", "31GiB"),
    "gpu-80gb": Device("80 GB card (A100, H100)", "79GiB"),
    "mac-8gb": Device("Mac 8 GB", "5.3GiB"),
    "mac-16gb": Device("Mac 16 GB", "10.6GiB"),
    "mac-24gb": Device("Mac 24 GB", "16GiB"),
    "mac-32gb": Device("Mac 32 GB", "21.3GiB"),
    "mac-64gb": Device("Mac 64 GB", "48GiB"),
    "mac-128gb": Device("Mac 128 GB", "96GiB"),
    "pc-16gb": Device("PC 16 GB, no card", "11GiB"),
    "pc-32gb": Device("PC 32 GB, no card", "26GiB"),
    "phone-8gb": Device("Phone 8 GB", "4GiB"),
}


def named(text: str) -> str | None:
    """Return the one of `DEVICES` that people call so, as in RTX 3060, 12GB VRAM or Mac 16 GB; None
    for what names none or several, and for a size alone.
    """
    name = text.strip().lower()
    if name in DEVICES:
        return name
    said = _words(re.sub(r"vram|gpu", "card", name)) - {"nvidia", "geforce"}
    if all(word == "gb" or word.isdecimal() for word in said):
        return None
    found = [key for key, device in DEVICES.items() if said <= _words(device.title.lower())]
    return found[0] if len(found) == 1 else None


def _words(text: str) -> set[str]:
    """Letters and numbers, each by itself; 5070 Ti is one."""
    said = text.removesuffix(", no card")
    return {re.sub(r"\s", "", word) for word in re.findall(r"\d+\s?ti\b|[a-z]+|\d+", said)}
