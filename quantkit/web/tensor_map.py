"""The found allocation as a grid: one row per kind of tensor, one column per block."""

from __future__ import annotations

from typing import Any

from quantkit.report import plots, svg


def tensor_map(allocation: dict[str, Any]) -> str:
    """The grid with its legend as SVG; empty when the allocation holds nothing of that form."""
    types = {
        str(name): value["qtype"]
        for name, value in allocation.items()
        if isinstance(value, dict) and isinstance(value.get("qtype"), str)
    }
    picture = plots.tensor_map(types)
    return "" if picture is None else svg.inline(picture)
