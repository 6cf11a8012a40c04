"""The report: what was measured, as a document that people and programs read.

    schema    report.json as dataclasses, versioned            docs/report.md
    text      numbers and sentences, wins and losses alike
    tables    the tables as headers and cells
    markdown, html        the whole report, for a terminal and for a browser
    plots     the five plots as Vega-Lite specifications; render makes SVG and PNG of them
    write     all of it into a folder

Written once, used by the command line, the web page and the model card.
"""

from __future__ import annotations

from evaluators.figures import Mean
from quantkit.evidence.report.html import html, sections
from quantkit.evidence.report.markdown import bullets, markdown, plain_table, set_table
from quantkit.evidence.report.schema import SCHEMA, Report, Row, read
from quantkit.evidence.report.text import losses, number, verdict, verdicts, with_error
from quantkit.evidence.report.write import write_report

__all__ = [
    "SCHEMA",
    "Mean",
    "Report",
    "Row",
    "bullets",
    "html",
    "losses",
    "markdown",
    "number",
    "plain_table",
    "read",
    "sections",
    "set_table",
    "verdict",
    "verdicts",
    "with_error",
    "write_report",
]
