"""The report's plots on the page: the same pictures as in the report and on the model card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantkit import report as reports
from quantkit.launch import KlPoint
from quantkit.report import plots, svg
from quantkit.report.picture import Picture
from quantkit.report.schema import TracePoint

kl_text = reports.number


def kl_with_error(value: float, stderr: float) -> str:
    """Both with the digits that count of the value."""
    return reports.with_error(reports.Mean(value, stderr))


def _shown(picture: Picture | None) -> str:
    return "" if picture is None else svg.inline(picture)


def kl_curve(points: Sequence[KlPoint]) -> str:
    """The best KL known so far over the tokens spent, with its standard error as a band."""
    trace = [TracePoint(p.generation, p.tokens, p.kl, p.stderr) for p in points]
    return _shown(plots.convergence(trace))


def frontier(report: dict[str, Any]) -> str:
    """KL over size: our file against the others. Lower and further left is better."""
    return _shown(plots.frontier(reports.read(report)))
