"""Write a report into a folder: report.json, report.md, report.html, and plots/ as SVG and PNG."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from quantkit.evidence.report import plots, render
from quantkit.evidence.report.html import html
from quantkit.evidence.report.markdown import markdown
from quantkit.evidence.report.measures import Measures
from quantkit.evidence.report.schema import Report, to_json
from quantkit.files import replacing, write_json


def write_report(folder: Path, report: Report, measures: Measures | None = None) -> list[Path]:
    """Write the JSON of a report and all that is made of it. Returns the files, report.json first.
    `measures` records a plot that cannot be drawn, which is left out.
    """
    taken = measures or Measures()
    before = len(taken.missing)
    drawn = {}
    for name, plot in plots.draw_all(report, taken).items():
        pictures = taken.take(f"the plot {name} as a picture", partial(render.pictures, plot))
        if pictures is not None:
            drawn[name] = pictures
    if taken.missing[before:]:
        known = report.not_measured or ()
        report = replace(report, not_measured=(*known, *taken.missing[before:]))
    written = [
        write_json(folder / "report.json", to_json(report)),
        _write(folder / "report.md", markdown(report).encode()),
        _write(
            folder / "report.html",
            html(report, {name: svg for name, (svg, _) in drawn.items()}).encode(),
        ),
    ]
    (folder / "plots").mkdir(exist_ok=True)
    for name, (svg, png) in drawn.items():
        path = folder / "plots" / name
        written += [
            _write(path.with_suffix(".svg"), svg.encode()),
            _write(path.with_suffix(".png"), png),
        ]
    return written


def _write(path: Path, data: bytes) -> Path:
    with replacing(path) as partial:
        partial.write_bytes(data)
    return path
