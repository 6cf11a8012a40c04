"""Parse and format sizes in bytes."""

from __future__ import annotations

import re
from fractions import Fraction

from quantkit.errors import UsageError

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_bytes(text: str) -> int:
    """Parse '90MB' as 90,000,000; MB and GB are decimal, MiB and GiB binary, a bare number is
    bytes.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(
            f"{text!r} is not a size.", "Write 90MB, 5.5GB, 5GiB or a number of bytes."
        )
    n_bytes = int(Fraction(match[1]) * _UNITS[match[2].lower()])  # exact: 1.001MB is 1,001,000
    if n_bytes <= 0:
        raise UsageError(f"{text!r} is not a size.", "It must be above zero.")
    return n_bytes


def size(n_bytes: float) -> str:
    """Return bytes for people: decimal kB, from a million of them MB, from a billion GB."""
    if n_bytes >= 1e9:
        return f"{n_bytes / 1e9:,.2f} GB"
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e6 else f"{max(1, round(n_bytes / 1e3))} kB"
