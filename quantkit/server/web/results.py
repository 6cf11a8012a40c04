"""What a finished run is worth, as HTML: the figures that count, then the whole report."""

from __future__ import annotations

import logging
from collections.abc import Callable
from html import escape
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.evidence import report as reports
from quantkit.evidence.report import text
from quantkit.evidence.report.schema import Report, Row
from quantkit.server.runs import JobView
from quantkit.server.web.charts import tensor_map
from quantkit.server.web.view import file_size

logger = logging.getLogger(__name__)

_UNREADABLE = (
    '<div class="qk-notice error" role="alert"><strong>The report of this run cannot be read.'
    "</strong> <span>Download report.json and look into it.</span></div>"
)
_MOST_MADE = 32
_made: dict[int, tuple[dict[str, Any], str]] = {}  # by identity: what was read, and its HTML


def results(job: JobView) -> str:
    """The figures that count, for every file; empty before the run is validated."""
    report = _read(job)
    try:
        return "" if report is None else "".join(_tiles(report, row) for row in report.outputs)
    except (ArithmeticError, ValueError, TypeError, LookupError, AttributeError) as error:
        logger.warning("a report has no figures to show: %s", type(error).__name__)
        return ""


def report(job: JobView) -> str:
    """The whole report, as in report.html; empty before the run is validated."""

    def make() -> str:
        found = _read(job)
        if found is None:
            return _UNREADABLE
        try:
            return f'<div class="qk-report">{reports.sections(found)}</div>'
        except (ArithmeticError, ValueError, TypeError, LookupError, AttributeError) as error:
            # Numbers that no measurement gives: a report from elsewhere.
            logger.warning("a report cannot be drawn: %s", type(error).__name__)
            return _UNREADABLE

    return _once(job.report, make) if job.report else ""


def _once(value: dict[str, Any], make: Callable[[], str]) -> str:
    """What is made of something that the launcher has read. Every poll asks for it, and what was
    read is one object for as long as the file is the same.
    """
    kept = _made.get(id(value))
    if kept is None or kept[0] is not value:
        while len(_made) >= _MOST_MADE:
            _made.pop(next(iter(_made)), None)
        kept = _made[id(value)] = (value, make())
    return kept[1]


def _read(job: JobView) -> Report | None:
    try:
        return reports.read(job.report) if job.report else None
    except QuantkitError:
        return None


def live_map(job: JobView) -> str:
    """The best mix that the search knows so far, while it is at work."""
    best = job.allocation
    grid = _once(best, lambda: tensor_map(best)) if best and not job.report else ""
    if not grid:
        return ""
    return (
        '<section class="qk-section"><h3>The best mix so far</h3><p class="qk-help">The type of'
        f" every tensor; one column a block.</p>{grid}</section>"
    )


def _tiles(report: Report, row: Row) -> str:
    tiles = [
        (file_size(row.n_bytes), f"{row.bpw:.2f} bits per weight"),
        (text.number(row.kl.value), "mean KL divergence"),
        (text.percent(row.top1), "same most likely token"),
    ]
    best = text.best_of_at_most(report.about(row))
    if best is not None and best.kl.value and row.kl.is_known:
        ratio = row.kl.value / best.kl.value
        tiles.insert(1, (f"{ratio:.2f}×", f"the KL of {best.label}"))
    items = "".join(f"<li><b>{escape(a)}</b><span>{escape(b)}</span></li>" for a, b in tiles)
    return f'<ul class="qk-tiles" aria-label="{escape(row.name)}">{items}</ul>'
