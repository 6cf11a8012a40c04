"""A report into a folder: report.json, report.md, report.html, and plots/ as SVG and PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit.report import plots, svg
from quantkit.report.html import html
from quantkit.report.markdown import markdown
from quantkit.report.schema import read
from quantkit.rundir import replacing, write_json


def write_report(folder: Path, value: dict[str, Any]) -> list[Path]:
    """Write the JSON of a report and all that is made of it. Returns the files, report.json first.

    Raises QuantkitError when `value` is not a report.
    """
    from quantkit.report.png import png

    report = read(value)
    written = [
        write_json(folder / "report.json", value),
        _write(folder / "report.md", markdown(report).encode()),
        _write(folder / "report.html", html(report).encode()),
    ]
    (folder / "plots").mkdir(exist_ok=True)
    for name, picture in plots.draw_all(report).items():
        path = folder / "plots" / name
        written += [
            _write(path.with_suffix(".svg"), svg.standalone(picture).encode()),
            _write(path.with_suffix(".png"), png(picture)),
        ]
    return written


def _write(path: Path, data: bytes) -> Path:
    with replacing(path) as partial:
        partial.write_bytes(data)
    return path
