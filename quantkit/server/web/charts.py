"""What is drawn while a run is at work: the same pictures as in the report, from what is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantkit.evidence import report as reports
from quantkit.evidence.report import plots
from quantkit.evidence.report.schema import TracePoint
from quantkit.server.runs import KlPoint


def kl_with_error(value: float, stderr: float) -> str:
    """Both with the digits that count of the value."""
    return reports.with_error(reports.Mean(value, stderr))


def kl_curve(points: Sequence[KlPoint]) -> str:
    """The best KL known so far over the tokens spent, with its standard error as a band."""
    trace = [TracePoint(p.generation, p.tokens, p.kl, p.stderr) for p in points]
    picture = plots.convergence(trace)
    return "" if picture is None else reports.figure(picture)


def tensor_map(allocation: dict[str, Any]) -> str:
    """The type of every tensor as a grid; empty for an allocation that holds nothing of that
    form.
    """
    types = {
        str(name): value["qtype"]
        for name, value in allocation.items()
        if isinstance(value, dict) and isinstance(value.get("qtype"), str)
    }
    picture = plots.tensor_map(types)
    return "" if picture is None else reports.figure(picture)
