"""Parse and format sizes in bytes."""

from __future__ import annotations

import re
from fractions import Fraction

from quantkit.errors import UsageError

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}{b}": 1000**i for i, prefix in enumerate("kmgt", 1) for b in ("", "b")},
    **{f"{prefix}i{b}": 1024**i for i, prefix in enumerate("kmgt", 1) for b in ("", "b")},
}
_FEWEST_BYTES = 1000  # no model is smaller: a bare number below is of gigabytes


def parse_bytes(text: str) -> int:
    """Parse '90MB' as 90,000,000; M, MB, G and GB are decimal, MiB and GiB binary. A bare number is
    bytes, below 1,000 gigabytes. A comma is a point, unless three digits follow it.
    """
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text).replace(",", ".")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", plain)
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(
            f"{text!r} is not a size.", "Write 90MB, 5.5GB, 5GiB or a number of bytes."
        )
    number, unit = Fraction(match[1]), match[2].lower()
    if not unit and number < _FEWEST_BYTES:
        unit = "gb"
    n_bytes = int(number * _UNITS[unit])  # exact: 1.001MB is 1,001,000
    if n_bytes <= 0:
        raise UsageError(f"{text!r} is not a size.", "It must be above zero.")
    return n_bytes


def size(n_bytes: float) -> str:
    """Return bytes for people: decimal kB, from a million of them MB, from a billion GB."""
    if n_bytes >= 1e9:
        return f"{n_bytes / 1e9:,.2f} GB"
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e6 else f"{max(1, round(n_bytes / 1e3))} kB"


def size_for(n_bytes: int) -> str:
    """Return the least size, as `size` writes sizes, that has room for so many bytes."""
    step = next((s for least, s in ((10**9, 10**7), (10**6, 10**5)) if n_bytes >= least), 1000)
    return size(-(-n_bytes // step) * step)
