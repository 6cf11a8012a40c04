"""Markdown tables: terminals show them as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, the first column aligned left and the rest right. Names can hold any
    character.
    """
    rule = ["---", *["---:"] * (len(headers) - 1)]
    lines = [[_cell(cell) for cell in row] for row in [headers, *rows]]
    lines.insert(1, rule)
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def _cell(value: str) -> str:
    return value.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
