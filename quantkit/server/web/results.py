"""Show a finished run: its main figures and the whole report as HTML, and its plots."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from quantkit.errors import QuantkitError
from quantkit.evidence import report as reports
from quantkit.evidence.report import text
from quantkit.evidence.report.schema import Output, Report
from quantkit.server.runs.view import RunView
from quantkit.server.web.charts import PLOTS, kl_curve, of_report, tensor_map
from quantkit.server.web.view import macro, notice
from quantkit.sizes import size

T = TypeVar("T")
_made_of = macro("tiles")

logger = logging.getLogger(__name__)

_UNREADABLE = "The report of this run cannot be read.", "Download report.json and look into it."
_MOST_MADE = 32
_made: dict[tuple[int, str], tuple[Any, Any]] = {}  # by identity and use: read, and made of it


def results(run: RunView) -> str:
    """Return the main figures of every file as HTML; empty before the run is validated."""
    report = _read(run)
    try:
        return "" if report is None else "".join(_tiles(report, row) for row in report.outputs)
    except (ArithmeticError, ValueError, TypeError, LookupError, AttributeError) as error:
        logger.warning("a report has no figures to show: %s", type(error).__name__)
        return ""


def report(run: RunView) -> str:
    """Return the whole report, as in report.html; empty before the run is validated."""

    def make() -> str:
        found = _read(run)
        if found is None:
            return notice(*_UNREADABLE)
        try:
            return f'<div class="qk-report">{reports.sections(found)}</div>'
        except (ArithmeticError, ValueError, TypeError, LookupError, AttributeError) as error:
            # Numbers that no measurement gives: a report from elsewhere.
            logger.warning("a report cannot be drawn: %s", type(error).__name__)
            return notice(*_UNREADABLE)

    return _once(run.report, "report", make) if run.report else ""


def plots(run: RunView) -> dict[str, str]:
    """Return the JSON of every plot by name, empty for one that does not exist: the report's plots
    or, before there is a report, the search's curve and its best mix so far.
    """
    found: dict[str, str] = {}
    best, report = run.allocation, _read(run)
    if report is not None:
        found = _once(run.report, "plots", lambda: of_report(report))
    elif not run.report:
        found["convergence"] = kl_curve(run.curve)
        if best:
            found["tensor-map"] = _once(best, "map", lambda: tensor_map(best))
    return {name: found.get(name, "") for name in PLOTS}


def _once(value: Any, use: str, make: Callable[[], T]) -> T:
    """What is made of something that the launcher has read. Every poll asks for it, and what was
    read is one object for as long as the file is the same.
    """
    key = id(value), use
    kept = _made.get(key)
    if kept is None or kept[0] is not value:
        while len(_made) >= _MOST_MADE:
            _made.pop(next(iter(_made)), None)
        kept = _made[key] = (value, make())
    made: T = kept[1]
    return made


def _read(run: RunView) -> Report | None:
    return _once(run.report, "rows", lambda: _parsed(run.report))


def _parsed(report: dict[str, Any] | None) -> Report | None:
    try:
        return reports.read(report) if report else None
    except QuantkitError:
        return None


def _tiles(report: Report, row: Output) -> str:
    tiles = [
        (size(row.n_bytes), f"{row.bpw:.2f} bits per weight"),
        (text.number(row.kl.value), "mean KL divergence"),
        (text.percent(row.top1), "same most likely token"),
    ]
    best = text.best_of_at_most(report.about(row))
    if best is not None and best.kl.value and row.kl.is_known:
        ratio = row.kl.value / best.kl.value
        tiles.insert(1, (f"{ratio:.2f}×", f"the KL of {best.title}"))
    return _made_of(row.name, tiles)
