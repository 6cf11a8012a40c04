"""The plots of a run's page: the report's, from what is known while the run is at work."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from quantkit.evidence.report import plots
from quantkit.evidence.report.render import Spec
from quantkit.evidence.report.schema import Report, TracePoint
from quantkit.server.runs.progress import KlPoint

PLOTS = ("frontier", "domains", "convergence", "tensor-map", "bits-by-kind")


_IN_THE_PAGE = {"width": "container", "background": None}


def of_report(report: Report) -> dict[str, str]:
    """Return the JSON of a finished run's plots by name."""
    return {
        name: _as_wide_as_the_page(plot)
        for name, plot in plots.draw_all(report, together=True).items()
    }


def kl_curve(points: Sequence[KlPoint]) -> str:
    """Return the plot of the best KL known so far over the tokens spent; empty for too few."""
    trace = [TracePoint(p.generation, p.tokens, p.kl, p.stderr) for p in points]
    return _as_wide_as_the_page(plots.convergence({"": trace}))


def tensor_map(types: Mapping[str, str]) -> str:
    """Return the plot of the type of every tensor; empty where there is none."""
    return _as_wide_as_the_page(plots.tensor_map({"": types}))


def _as_wide_as_the_page(plot: Spec | None) -> str:
    return "" if plot is None else json.dumps({**plot, **_IN_THE_PAGE})
