"""Show a finished run: its main figures and the whole report as HTML, and its plots."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from quantkit.errors import QuantkitError
from quantkit.evidence import report as reports
from quantkit.evidence import run_with
from quantkit.evidence.report import text
from quantkit.evidence.report.schema import Output, Report
from quantkit.server.runs.view import RunView
from quantkit.server.web.charts import PLOTS, kl_curve, of_report, tensor_map
from quantkit.server.web.view import file_url, macro, notice
from quantkit.sizes import size

T = TypeVar("T")
Paths = Mapping[str, Path]
_made_of = macro("result")

logger = logging.getLogger(__name__)

_UNREADABLE = "The report of this run cannot be read.", "Download report.json and look into it."
_REPO = re.compile(r"https?://[^/]+/([\w.-]+/[\w.-]+)/?", re.ASCII)
_LABEL = re.compile(r"\w+", re.ASCII)
_MOST_MADE = 32
_made: dict[tuple[int, str], tuple[Any, Any]] = {}  # by identity and use: read, and made of it


def results(run: RunView, root: str = "", paths: Paths | None = None) -> str:
    """Return every file as HTML: what it is worth, its main figures, how to get and to run it;
    empty before the run is validated. `root` is the address of its files, if that is not the
    page's own; `paths` are where they lie, for who sits at this machine.
    """
    report = _read(run)
    try:
        if report is None:
            return ""
        files = [_result(run, report, row, root, paths or {}) for row in report.outputs]
        return "".join(files)
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
            return f'<div class="qk-report">{_folded(reports.sections(found))}</div>'
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


def _folded(html: str) -> str:
    """The same with every section behind its title. What a stranger named is escaped in it, so
    these tags are the template's.
    """
    html = html.replace('<section class="qk-section"><h3>', '<details class="qk-fold"><summary>')
    return html.replace("</h3>", "</summary>").replace("</section>", "</details>")


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


def _result(run: RunView, report: Report, row: Output, root: str, paths: Paths) -> str:
    tiles = [
        (size(row.n_bytes), f"{row.bpw:.2f} bits per weight"),
        (text.number(row.kl.value), "mean KL divergence"),
        (text.percent(row.top1), "same most likely token"),
    ]
    best = text.best_of_at_most(report.about(row))
    if best is not None and best.kl.value and row.kl.is_known:
        ratio = row.kl.value / best.kl.value
        tiles.insert(1, (f"{ratio:.2f}×", f"the KL of {best.title}"))
    names = run_with.names(row)
    here = [file for file in run.files if file.is_here and file.name in names]
    here = here if len(here) == len(names) else []  # of half a file nothing is of use
    commands, note = _commands(run, report, row, bool(here), paths)
    verdict = text.verdict(report.about(row))
    downloads = [
        (
            f"Download part {i}" if len(here) > 1 else "Download",
            _address(run, file.name, root),
            file,
        )
        for i, file in enumerate(here, 1)
    ]
    n = len(report.outputs)
    n_here = sum(f.is_here for f in run.files)
    of_all = row is report.first and n_here > 1 and not root  # a shared page has no archive
    archive = (f"archive/{quote(run.id)}", n_here) if of_all else None
    return _made_of(row.name, n, verdict, tiles, downloads, archive, commands, note)


def _commands(
    run: RunView, report: Report, row: Output, is_here: bool, paths: Paths
) -> tuple[dict[str, str], str]:
    """How to run a file, from where it can be had, and what that takes besides; nothing where it
    cannot.
    """
    repo = _REPO.fullmatch(run.published_url or "")
    if repo is not None and _LABEL.fullmatch(row.label or ""):
        note = run_with.PRIVATE if run.repo_is_private else ""
        return run_with.published(row, report.outputs, repo[1]), note
    if not is_here and not run.published_url:
        return {}, ""
    return run_with.local(row, paths.get(run_with.names(row)[0])), ""


def _address(run: RunView, name: str, root: str) -> str:
    return f"{root}{quote(name)}" if root else file_url(run, name)
