"""Hold the figures of receipt, report and card against each other: no file is opened for it.

The receipt has the mean of every window, so that the report's means follow from it; the card's
tables and sentences follow from the report. Whoever changes one of them has to change all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from evaluators import stats
from quantkit.errors import QuantkitError
from quantkit.evidence import card, report
from quantkit.evidence.receipt.limits import beyond
from quantkit.evidence.receipt.make import LONG
from quantkit.evidence.receipt.schema import OF_FILE, OF_WEIGHTS, FileSum, Receipt, Windows
from quantkit.evidence.report import Report, Row
from quantkit.hub.card_data import read_card
from quantkit.sandbox import untrusted
from quantkit.verifying import figures_in_use
from quantkit.verifying.findings import Finding
from quantkit.verifying.places import CARD, REPORT, Place

_ROUNDING = 1e-5  # relative: the receipt has eight digits, and intervals are differences
_MOST_CARD = 4_000_000
_OF_REPORT, _OF_CARD = f"figures of {REPORT}", f"figures of {CARD}"
_LINK = re.compile(r"https://huggingface\.co/([\w.-]+(?:/[\w.-]+)?)/resolve/main/", re.ASCII)


def check_figures(receipt: Receipt, receipt_sha256: str, place: Place) -> list[Finding]:
    """Return a finding on the receipt's own limits, on the report and on the card."""
    wide = beyond(receipt.tolerance)
    about = f"it allows more for {', '.join(wide)} than this version does" if wide else ""
    found = [Finding("limits of the receipt", not wide, about)]
    try:
        measured = report.read(untrusted.read_json(place.path(REPORT), 64_000_000, 250_000))
    except (OSError, untrusted.Damaged) as error:
        return [*found, Finding(_OF_REPORT, None, f"it cannot be read ({_reason(error)})")]
    except QuantkitError as error:
        return [*found, Finding(_OF_REPORT, None, error.message.rstrip("."))]
    wrong = list(_wrong_figures(receipt, measured))
    about = f"{wrong[0]} ({len(wrong)} such)" if wrong else "its figures follow from the receipt"
    found.append(Finding(_OF_REPORT, not wrong, about))
    found += figures_in_use.check_answers(receipt, measured)
    return [*found, _card(measured, receipt_sha256, place)]


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


# ---- the report


def _wrong_figures(receipt: Receipt, measured: Report) -> Iterator[str]:
    """What in the report does not follow from the receipt, as clauses."""
    if (measured.model, measured.revision) != (receipt.model, receipt.revision):
        yield "the model is another"
    if (measured.base.sha256, measured.base.n_bytes) != (receipt.base.sha256, receipt.base.n_bytes):
        yield "the full-precision file is another"
    known = {t.name: t.sha256 for t in receipt.texts if t.joins is None}
    if measured.texts != known:
        yield "the texts are others"
    for output in measured.outputs:
        there = receipt.joined.get(output.name) or receipt.files.get(output.name)
        if there is None or (there.n_bytes, there.sha256) != (output.n_bytes, output.sha256):
            yield f"{output.name} is another file"
        for part in output.parts or ():
            if receipt.files.get(part.name) != FileSum(part.n_bytes, part.sha256):
                yield f"{part.name} is another file"
        if {part.name for part in output.parts or ()} != _parts(receipt, output.name):
            yield f"{output.name} has other parts"
    if not figures_in_use.are_same(receipt, measured):
        yield "the conversations are others"
    for figure, claimed, follows in figures_in_use.floor(receipt, measured):
        if not _same(claimed, follows):
            yield f"{figure} is {claimed} in the report and {follows} in the receipt"
    for row in measured.rows:
        both = _pairs(receipt, measured, row), figures_in_use.pairs(receipt, row)
        for figure, claimed, follows in chain(*both):
            if not _same(claimed, follows):
                yield f"{figure} of {row.name} is {claimed} in the report and {follows} by windows"


def _parts(receipt: Receipt, name: str) -> set[str]:
    whole = receipt.joined.get(name)
    return set(whole.parts) if whole else set()


def _same(a: float | None, b: float | None) -> bool:
    if a is None or b is None or math.isnan(a) or math.isnan(b):
        return (a is None or math.isnan(a)) and (b is None or math.isnan(b))
    return math.isclose(a, b, rel_tol=_ROUNDING, abs_tol=1e-9)


def _pairs(
    receipt: Receipt, measured: Report, row: Row
) -> Iterator[tuple[str, float | None, float | None]]:
    """A row's figures, each with what the receipt's windows and answers come to."""
    of_file = _windows(receipt, row, OF_FILE, long=False)
    yield "the KL", row.kl.mean, _mean(of_file, "kl")
    for name, end, follows in zip(
        ("lower", "upper"), row.kl.ci95 or (None, None), _interval(of_file), strict=True
    ):
        yield f"the {name} end of the KL's interval", end, follows
    yield "the share of equal tokens", row.top1, _mean(of_file, "top1")
    yield "the perplexity", row.perplexity.value, _exp(_mean(of_file, "nll"))
    base = measured.base.perplexity.value
    if of_file:
        yield "the base's perplexity", base, _exp(_mean(of_file, "base_nll"))
    if {w.text for w in of_file} != set(row.domains):
        yield "the number of texts", len(row.domains), len(of_file)
    for windows in of_file:
        figures = row.domains.get(windows.text)
        if figures is not None:
            yield f"the KL on {windows.text}", figures.kl.mean, _mean([windows], "kl")
            yield f"equal tokens on {windows.text}", figures.top1, _mean([windows], "top1")
    of_weights = _windows(receipt, row, OF_WEIGHTS, long=False)
    claimed = row.weight_kl.mean if row.weight_kl else None
    yield "the weight KL", claimed, _mean(of_weights, "kl")
    for n_ctx, long in (row.long or {}).items():
        found = [w for w in _windows(receipt, row, OF_FILE, long=True) if str(w.n_ctx) == n_ctx]
        yield f"the KL in a context of {n_ctx}", long.mean, _mean(found, "kl")
    answers = {a.task: a for a in receipt.answers if (a.file, a.kind) == (row.name, row.kind)}
    if answers.keys() != (row.tasks or {}).keys():
        yield "the number of tasks", len(row.tasks or {}), len(answers)
    for name, task in (row.tasks or {}).items():
        if name in answers:
            picked = answers[name]
            n_flips = sum(a != b for a, b in zip(picked.picks, picked.base_picks, strict=True))
            yield f"the number of items of {name}", task.n_items, len(picked.picks)
            if task.flips and "acc" in task.flips:
                yield f"other answers in {name}", task.flips["acc"].n, n_flips


def _windows(receipt: Receipt, row: Row, measure: str, long: bool) -> list[Windows]:
    wanted = row.name, row.kind, measure
    return [
        w
        for w in receipt.windows
        if (w.file, w.kind, w.measure) == wanted and (w.text == LONG) == long
    ]


def _columns(found: Sequence[Windows], column: str) -> list[np.ndarray]:
    return [np.array(getattr(w.means, column))[:, None] for w in found]


def _mean(found: Sequence[Windows], column: str) -> float | None:
    """The mean of all tokens: windows of one receipt score equally many."""
    return float(np.concatenate(_columns(found, column)).mean()) if found else None


def _interval(found: Sequence[Windows]) -> tuple[float | None, float | None]:
    if not found:
        return None, None
    interval = stats.windowed_interval(_columns(found, "kl"))
    return interval.low, interval.high


def _exp(mean: float | None) -> float | None:
    return None if mean is None else math.exp(min(mean, 700.0))


# ---- the card


def _card(measured: Report, receipt_sha256: str, place: Place) -> Finding:
    """Whether the card has the report's figures, and names the receipt."""
    try:
        data = untrusted.read_bytes(place.path(CARD), _MOST_CARD)
        text = data.decode("utf-8").replace("\r\n", "\n")
        settings = read_card(data)
    except (OSError, UnicodeDecodeError, untrusted.Damaged) as error:
        return Finding(_OF_CARD, None, f"it cannot be read ({_reason(error)})")
    except QuantkitError as error:
        return Finding(_OF_CARD, None, error.message.rstrip("."))
    link = _LINK.search(text)
    parts = card.evidence(measured, link[1] if link else None)
    lost = [part for part in parts if part not in text]
    if lost:
        return Finding(_OF_CARD, False, f"the report has other words: {_cut(lost[0])}")
    if receipt_sha256 not in text:
        return Finding(_OF_CARD, False, "it names another receipt")
    wanted = sorted(
        (r.dataset_name, r.metric_type, float(r.metric_value)) for r in card.results(measured)
    )
    if _results(settings) != wanted:
        return Finding(_OF_CARD, False, "the results in its YAML are not the report's")
    if link and place.repo and link[1] not in (place.repo, place.repo.rpartition("/")[2]):
        return Finding(_OF_CARD, False, f"its links lead to {link[1]}")
    return Finding(_OF_CARD, True, "its figures are the report's, and it names this receipt")


def _cut(part: str) -> str:
    line = " ".join(part.split())
    return line if len(line) <= 200 else f"{line[:200]}..."


def _results(settings: untrusted.Settings) -> list[tuple[str, str, float]]:
    """The results of a card's model-index, in order; empty for what is of another shape."""
    index: Any = settings.get("model-index")
    try:
        found = [
            (str(result["dataset"]["name"]), str(metric["type"]), float(metric["value"]))
            for entry in index
            for result in entry["results"]
            for metric in result["metrics"]
        ]
    except (TypeError, KeyError, ValueError, AttributeError):
        return []
    return sorted(found)
