"""Numbers and sentences of a report, the same in Markdown, HTML, card and app."""

from __future__ import annotations

import math
import re

from evaluators.figures import ItemOverlap, Mean, PairedTest
from quantkit.evidence.report.schema import GIVEN, OURS, STOCK, Report, Row
from quantkit.ggml.types import READERS
from quantkit.sizes import size
from quantkit.tensors import CarriedOver

CAPTIONS = {
    "frontier": "Quality and size. Lower is closer to the original, further left is smaller;"
    " whiskers are 95 % intervals.",
    "domains": "KL by kind of text.",
    "tensor-map": "The type of every tensor: rows are kinds of tensors, columns are blocks; warm"
    " colors have few bits, cool ones many.",
    "bits-by-kind": "Bits per weight of every kind of tensor.",
    "convergence": "The search: its best KL over the tokens that it evaluated.",
}


_UNKNOWN = "not measured"


def number(value: float | None) -> str:
    """Return a KL divergence with three significant digits."""
    if value is None or math.isnan(value):
        return _UNKNOWN
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, min(7, decimals))}f}"


def with_error(mean: Mean) -> str:
    """Return `0.0123 ± 0.0004`, both with the significant digits of the value."""
    text = number(mean.value)
    if not mean.is_known:
        return text
    return f"{text} ± {mean.stderr:.{len(text.partition('.')[2])}f}"


def without_folders(said: str) -> str:
    """Return a sentence with names of files only: a report is published, folders are not."""
    return re.sub(r"(?<![\w:/.])~?(?:/[^/\s]+)+/(?=[^/\s])", "", said)


def percent(share: float) -> str:
    return _UNKNOWN if math.isnan(share) else f"{100 * share:.1f} %"


def chance(p_value: float) -> str:
    """Return `p = 0.03`, `p < 0.001`."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


def tested(versus: PairedTest | None) -> str:
    """Return a paired test against an output as a cell: which is closer to the base, and how
    surely.
    """
    if versus is None:
        return "-"
    if not versus.significant:
        return f"no difference ({chance(versus.p_value)})"
    word = "worse" if versus.difference > 0 else "BETTER"
    return f"{word} ({chance(versus.p_value)})"


def best_of_at_most(report: Report, kind: str = STOCK) -> Row | None:
    """Return the file of a kind, llama.cpp's own by default, of at most the first output's size
    that is closest to the base.
    """
    size = report.first.n_bytes
    rows = [r for r in report.baselines if r.kind == kind and r.n_bytes <= size and r.kl.is_known]
    return min(rows, key=lambda row: row.kl.value, default=None)


def unspent(report: Report) -> list[str]:
    """Return a sentence for every output that could not spend its budget."""
    searches = [output.search for output in report.outputs]
    return [found.unspent.sentence() for found in searches if found and found.unspent]


def verdicts(report: Report) -> list[str]:
    """Return the verdict on every output; with several each begins with the file's name."""
    if len(report.outputs) == 1:
        return [verdict(report)]
    return [f"{o.name} ({size(o.n_bytes)}): {verdict(report.about(o))}" for o in report.outputs]


def verdict(report: Report) -> str:
    """Return one or two sentences that compare the first file with the best stock file of its size
    or smaller, or with the compared files, and one where its budget cannot be spent. Losses are
    stated as plainly as wins.
    """
    return " ".join([_verdict(report), *unspent(report.about(report.first))])


def _verdict(report: Report) -> str:
    if report.kind == "compare":
        return _compare_verdict(report)
    ours, best = report.first, best_of_at_most(report)
    if not ours.kl.is_known:
        return "The KL divergence of this file could not be measured."
    said = [_against(report, best)] if best else []
    named = best_of_at_most(report, GIVEN)
    said += [_against_named(report, named)] if named else []
    return " ".join(said) or "No llama.cpp file of this size or smaller was measured."


def _against(report: Report, best: Row) -> str:
    """How the first file compares with the best stock file of its size or smaller."""
    ours = report.first
    text = (
        f"The mean KL divergence is {number(ours.kl.value)}, {_compared(ours.kl, best.kl)} that of"
        f" the best llama.cpp file of this size or smaller ({best.short}, {number(best.kl.value)}"
        f"{_surely(report.tests(best).kl)})."
    )
    if ours.weight_kl and best.weight_kl and best.weight_kl.value:
        text += f" Its weight KL is {_compared(ours.weight_kl, best.weight_kl)} that file's."
    return text + _rather(report, best)


def _against_named(report: Report, best: Row) -> str:
    """How it compares with the best of the files that the user named, of its size or smaller."""
    ours = report.first
    return (
        f"It is {_compared(ours.kl, best.kl)} that of {best.title} ({number(best.kl.value)}"
        f"{_surely(report.tests(best).kl)}), the best file of others that was compared and is no"
        f" larger.{_rather(report, best)}"
    )


def _rather(report: Report, best: Row) -> str:
    """Plain advice where another file is no larger and closer to the original, by more than
    chance.
    """
    test = report.tests(best).kl
    loses = best.kl.value < report.first.kl.value and (test is None or test.significant)
    return f" Use {best.title} rather than this file." if loses else ""


def _compared(ours: Mean, best: Mean) -> str:
    """How far ours is below or above the best: `44 % below`, `12 % ABOVE`."""
    more = 100 * (ours.value / best.value - 1) if best.value else math.inf
    return f"{abs(more):.0f} % {'ABOVE' if more > 0 else 'below'}"


def _surely(versus: PairedTest | None) -> str:
    if versus is None:
        return ""
    shown = "significant" if versus.significant else "NOT significant"
    return f"; {shown}, {chance(versus.p_value)} over {versus.n_windows} windows"


def _compare_verdict(report: Report) -> str:
    best = min(report.rows, key=lambda row: row.kl.value)
    text = f"{best.title} is closest to the base: mean KL divergence {number(best.kl.value)}."
    first = report.first
    unclear = [
        row.title
        for row in report.baselines
        if (test := report.tests(row).kl) is not None and not test.significant
    ]
    if unclear:
        text += f" No difference from {first.title} is shown for {', '.join(unclear)}."
    return text


def losses(report: Report) -> list[str]:
    """Return where an output loses: files of at most its size that are closer to the base, and
    domains in which one is. Empty when there is nothing.
    """
    if len(report.outputs) > 1:
        found = [(o, losses(report.about(o))) for o in report.outputs]
        return [f"{output.name}: {line}" for output, lines in found for line in lines]
    ours = report.first
    if ours.kind != OURS:
        return []
    lines = []
    for row in report.baselines:
        if row.n_bytes > ours.n_bytes or not ours.kl.is_known:
            continue
        if row.kl.value < ours.kl.value:
            lines.append(
                f"{row.title} ({size(row.n_bytes)}) is no larger and is closer to the base:"
                f" {number(row.kl.value)} against {number(ours.kl.value)}"
                f"{_surely(report.tests(row).kl).replace(';', ',', 1)}."
            )
            continue
        worse = [
            f"{name} ({number(row.domains[name].kl.value)} against {number(own.kl.value)})"
            for name, own in ours.domains.items()
            if name in row.domains and row.domains[name].kl.value < own.kl.value
        ]
        if worse:
            lines.append(f"{row.title} is closer to the base on {', '.join(worse)}.")
    failed = [check for check in ours.integrity or () if check.passed is False]
    lines += [f"FAILED: {check.name}: {check.about}." for check in failed]
    return lines


def losing(report: Report) -> str:
    """Return the heading over `losses`."""
    return "Where these files lose" if len(report.outputs) > 1 else "Where this file loses"


def task_lines(report: Report) -> list[str]:
    """Return the zero-shot results, a sentence for each file that has some; or why there are
    none.
    """
    lines = []
    for row in report.rows:
        for name, task in (row.tasks or {}).items():
            text = (
                f"{row.title}, {name} ({task.acc.n} items):"
                f" {100 * task.acc.value:.1f} ± {100 * task.acc.stderr:.1f} %"
            )
            if task.of_base:
                text += f", full precision {100 * task.of_base.value:.1f} %"
            if flips := (task.flips or {}).get("acc"):
                text += f"; {flips.n} answers differ from full precision's"
            text += _overlapping(task.overlap)
            lines.append(f"{text}.")
    if not lines and (reason := (report.first.zero_shot or {}).get("reason")):
        lines.append(f"Zero-shot tests were not run: {reason.rstrip('.')}.")
    return lines


def _overlapping(found: ItemOverlap | None) -> str:
    """Whether a task's items stand in the calibration text, as a clause after others."""
    if found is None:
        return ""
    said = f"{found.n_seen} items OVERLAP with" if found.n_seen else "no item overlaps with"
    short = f" ({found.n_short} are too short to be judged)" if found.n_short else ""
    return f"; {said} the calibration text{short}"


def refused(report: Report) -> list[str]:
    """Sizes that were asked for and got no file of their own, and why."""
    return [f"{budget.target}: {budget.refusal}" for budget in report.refused or ()]


def not_measured(report: Report) -> list[str]:
    """Return what could not be measured, and why."""
    return [f"{missing.name}: {missing.reason}" for missing in report.not_measured or ()]


def check_lines(report: Report) -> list[tuple[str, str, str]]:
    """Return the integrity checks: name, `passed` / `FAILED` / `not run`, what was found."""
    words = {True: "passed", False: "FAILED", None: "not run"}
    return [
        (
            check.name if len(report.outputs) == 1 else f"{output.name}: {check.name}",
            words[check.passed],
            check.about,
        )
        for output in report.outputs
        for check in output.integrity or ()
    ]


def fallback_groups(report: Report) -> list[tuple[str, str, int, str]]:
    """Group fallbacks: what was asked, what was used, for how many tensors, and why."""
    groups: dict[tuple[str, str, str], int] = {}
    for f in report.fallbacks or ():
        key = (f.asked, f.used, f.reason)
        groups[key] = groups.get(key, 0) + 1
    return [(asked, used, n, reason) for (asked, used, reason), n in groups.items()]


def carried(report: Report) -> list[str]:
    """Return what an output has of a quantized source's own integers, by type: how many weights
    are equal to the source's, and how far the others are off.
    """
    known = {(row.tensor, row.qtype): row for row in report.carried or ()}
    lines = []
    for output in report.outputs:
        used: dict[tuple[str, bool], list[CarriedOver]] = {}
        for name, tensor in (output.tensors or {}).items():
            row = known.get((name, tensor.qtype))
            if row is not None and tensor.method == row.method:
                used.setdefault((row.qtype, row.is_exact), []).append(row)
        for (qtype, is_exact), rows in sorted(used.items()):
            n_weights, n_equal = sum(r.n_weights for r in rows), sum(r.n_equal for r in rows)
            said = f"{output.name}: {len(rows)} tensors of the source are carried over"
            equal = f"{n_equal:,} of {n_weights:,} weights are equal to the bit"
            off = math.sqrt(max(row.relative for row in rows))
            exactly = f"exactly as {qtype}: {equal}" if is_exact else f"as {qtype}: {equal}"
            lines.append(f"{said} {exactly}" + (f", at most {off:.0e} off." if off else "."))
    return lines


def runtimes(report: Report) -> list[str]:
    """Return what must be said of runtimes, a sentence for each file that not all can read."""
    lines = []
    for output in report.outputs:
        types = {tensor.qtype for tensor in (output.tensors or {}).values()}
        lines += [
            f"{output.name} has tensors in {qtype}: it needs {readers}; older builds refuse it."
            for qtype, readers in READERS.items()
            if qtype.name in types
        ]
    return lines


def protocol_line(report: Report) -> str:
    """Return how it was measured, on what text and on what device."""
    text = f"Protocol: {report.protocol}. Text: {', '.join(report.texts)}"
    if report.kind == "run":
        text += f", not seen by any earlier stage{_seen_before(report)}"
    if report.n_windows:
        text += f"; {report.n_windows} windows"
    if report.weight_windows and report.weight_windows != report.n_windows:
        text += f", {report.weight_windows} of them for the weight KL"
    return f"{text}.{_device(report)}"


def _seen_before(report: Report) -> str:
    """How much of each text the calibration text has, too, as a clause in brackets."""
    if not report.overlap:
        return ""
    said = (f"{name} {_small(found.share)}" for name, found in report.overlap.items())
    return f" (runs of 13 words that the calibration text has, too: {', '.join(said)})"


def _small(share: float) -> str:
    return "none" if not share else f"{100 * share:.2g} %"


def _device(report: Report) -> str:
    """What the figures were measured on, and how far that is from the CPU, as further sentences."""
    if report.device is None:  # a report of before it was said
        return ""
    text = f" Device: {report.device}"
    if report.device_reason:
        text += f", because {report.device_reason.rstrip('.')}"
    known = {"full precision": report.base.device_kl}
    known |= {row.title: row.device_kl for row in report.rows}
    said = [f"{number(kl.mean)} ({name})" for name, kl in known.items() if kl]
    if said:
        text += f". Mean KL between the CPU and this device, of the same file: {', '.join(said)}"
    return f"{text}."
