"""The report's tables as headers and cells, to be set in Markdown or HTML."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.report import text
from quantkit.report.schema import Report, Speed


@dataclass(frozen=True)
class Line:
    """One line of a table. `kind` is the row's, or base."""

    kind: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Headers and lines; the first column is a name, the others are figures."""

    headers: tuple[str, ...]
    lines: tuple[Line, ...]


def comparison(report: Report) -> Table:
    """Every measured file and the base, by size. Columns that no file has are left out."""
    has_weights = any(row.weight_kl for row in report.rows)
    has_test = any(report.tests(row).kl for row in report.rows)
    headers = ["file", "size", "bits per weight", "mean KL"]
    headers += [*(["weight KL"] if has_weights else []), "same top-1", "perplexity"]
    headers += [_against(report)] * has_test
    lines = []
    for row in report.by_size:
        cells = [row.label, text.size(row.n_bytes), f"{row.bpw:.2f}", text.with_error(row.kl)]
        cells += [text.with_error(row.weight_kl) if row.weight_kl else "-"] * has_weights
        cells += [text.percent(row.top1), f"{row.perplexity.value:.3f}"]
        cells += [text.tested(report.tests(row).kl)] * has_test
        lines.append((row.n_bytes, Line(row.kind, tuple(cells))))
    base = report.base
    cells = [
        "full precision",
        text.size(base.n_bytes),
        f"{8 * base.n_bytes / base.n_parameters:.2f}",
    ]
    cells += ["0", *["0"] * has_weights, "100 %", f"{base.perplexity.value:.3f}"]
    cells += ["-"] * has_test
    lines.append((base.n_bytes, Line("base", tuple(cells))))
    ordered = sorted(lines, key=lambda item: item[0])
    return Table(tuple(headers), tuple(line for _, line in ordered))


def _against(report: Report) -> str:
    """What the tests are against, as a header."""
    if report.kind == "compare":
        return "against the first"
    return "against ours" + " of nearest size" * (len(report.outputs) > 1)


def domains(report: Report) -> Table:
    """Mean KL of every file by domain of text."""
    names = list(report.first.domains)
    lines = [
        Line(
            row.kind,
            (
                row.label,
                *(text.number(row.domains[n].value) if n in row.domains else "-" for n in names),
            ),
        )
        for row in report.by_size
    ]
    return Table(("mean KL on", *names), tuple(lines))


def tails(report: Report) -> Table | None:
    """How the KL is spread over tokens, and the ratio of perplexities."""
    lines = tuple(
        Line(
            row.kind,
            (
                row.label,
                text.number(row.tail.median),
                text.number(row.tail.p99),
                text.number(row.tail.p999),
                text.number(row.tail.largest),
                f"{row.tail.ln_ppl_ratio.value:+.4f} ± {row.tail.ln_ppl_ratio.stderr:.4f}",
            ),
        )
        for row in report.by_size
        if row.tail
    )
    headers = ("KL of tokens", "median", "99 %", "99.9 %", "largest", "ln perplexity ratio")
    return Table(headers, lines) if lines else None


def speeds(report: Report) -> Table | None:
    """Tokens per second, load time and memory of the files that have them."""
    found: list[tuple[str, str, Speed]] = [
        (row.kind, row.label, row.speed) for row in report.by_size if row.speed
    ]
    if report.base.speed:
        found.append(("base", "full precision", report.base.speed))
    if not found:
        return None
    lines = [
        Line(
            kind,
            (
                name,
                f"{speed.prompt:,.0f}",
                f"{speed.generation:,.1f}",
                f"{speed.load_seconds:.2f} s",
                text.size(speed.peak_bytes),
            ),
        )
        for kind, name, speed in found
    ]
    headers = ("file", "prompt tokens/s", "generated tokens/s", "load")
    return Table((*headers, f"memory at {found[0][2].n_ctx:,} tokens"), tuple(lines))


def checks(report: Report) -> Table | None:
    """The integrity checks."""
    found = text.check_lines(report)
    if not found:
        return None
    return Table(("check", "result", ""), tuple(Line("", line) for line in found))


def fallbacks(report: Report) -> Table | None:
    """What was asked, what was used, why, and for how many tensors."""
    groups = text.fallback_groups(report)
    if not groups:
        return None
    lines = tuple(Line("", (asked, used, str(n), why)) for asked, used, n, why in groups)
    return Table(("asked", "used", "tensors", "reason"), lines)
