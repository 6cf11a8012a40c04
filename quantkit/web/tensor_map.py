"""The found allocation as a grid: one row per kind of tensor, one column per block."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.qtypes import QuantType

_BLOCK = re.compile(r"blk\.(\d+)\.(.+?)(?:\.weight)?")
_MAX_CELLS = 8000


def tensor_map(allocation: dict[str, Any]) -> str:
    """HTML of the grid with a legend; empty when the allocation holds nothing of that form."""
    types: dict[str, str] = {}
    for name, value in allocation.items():
        if isinstance(value, dict) and isinstance(value.get("qtype"), str):
            types[str(name)] = value["qtype"]
    if not types or len(types) > _MAX_CELLS:
        return ""
    scale = _colours(set(types.values()))
    kinds: dict[str, dict[int, str]] = {}
    single: dict[str, str] = {}
    for name, qtype in types.items():
        match = _BLOCK.fullmatch(name)
        if match:
            kinds.setdefault(match[2], {})[int(match[1])] = name
        else:
            single[name] = qtype
    n_blocks = 1 + max((block for row in kinds.values() for block in row), default=-1)
    parts = ['<div class="qk-map-scroll" tabindex="0"><table class="qk-map">']
    for kind, blocks in kinds.items():
        cells = [_cell(blocks.get(i), types, scale) for i in range(n_blocks)]
        parts.append(f'<tr><th scope="row">{escape(kind)}</th>{"".join(cells)}</tr>')
    for name in single:
        label = name.removesuffix(".weight")
        parts.append(f'<tr><th scope="row">{escape(label)}</th>{_cell(name, types, scale)}</tr>')
    parts.append("</table></div>")
    legend = "".join(
        f'<li><i style="background:{colour}"></i>{escape(qtype)}</li>'
        for qtype, colour in scale.items()
    )
    return f'{"".join(parts)}<ul class="qk-legend">{legend}</ul>'


def _cell(name: str | None, types: dict[str, str], scale: dict[str, str]) -> str:
    if name is None:
        return "<td></td>"
    qtype = types[name]
    return f'<td style="background:{scale[qtype]}" title="{escape(name)}: {escape(qtype)}"></td>'


def _colours(types: set[str]) -> dict[str, str]:
    """One colour a type, light for few bits to dark for many."""

    def bits(name: str) -> float:
        try:
            return QuantType(name).bpw
        except QuantkitError:
            return 99.0

    ordered = sorted(types, key=lambda name: (bits(name), name))
    last = max(1, len(ordered) - 1)
    return {
        name: f"hsl({200 + 60 * i / last:.0f} {45 + 15 * i / last:.0f}% {78 - 40 * i / last:.0f}%)"
        for i, name in enumerate(ordered)
    }
