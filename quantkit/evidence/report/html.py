"""A report as HTML: its sections, which the web page shows too, and the file that holds them alone
with its plots. Nothing is loaded from anywhere, and whatever a stranger named is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.evidence.report import beside, tables, text
from quantkit.evidence.report.render import THEMES
from quantkit.evidence.report.schema import Report

if TYPE_CHECKING:
    from jinja2 import Environment


def html(report: Report, figures: Mapping[str, str] | None = None) -> str:
    """Return the whole report as a page of its own. `figures` are its plots by name, as SVG."""
    return _rendered("page.html.jinja", report, figures or {})


def sections(report: Report) -> str:
    """Return all that the report says but its plots, for a page that shows those by itself."""
    return _rendered("report.html.jinja", report, {})


def _rendered(template: str, report: Report, figures: Mapping[str, str]) -> str:
    made = _templates().get_template(template)
    return made.render(
        report=report, figures=figures, text=text, tables=tables, beside=beside, themes=THEMES
    )


@cache
def _templates() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
