"""The report's tables as headers and cells, to be set in Markdown or HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evaluators.figures import Mean, Perplexity, SpeedResult
from quantkit.config.calibration import language_of
from quantkit.config.devices import DEVICES
from quantkit.config.languages import LANGUAGES
from quantkit.evidence.report import text
from quantkit.evidence.report.schema import GIVEN, OURS, STOCK, Output, Report, Row, Tests
from quantkit.sizes import parse_bytes, size


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


def comparison(
    report: Report, name: Callable[[Row], str] = lambda row: row.title, wide: bool = False
) -> Table:
    """Return the table of every measured file and the base, by size. Columns that no file has are
    left out.

    `name` gives a file's first cell; `wide` adds accuracy of tasks and tokens per second.
    """
    base = report.base
    columns = [
        _Column("size", lambda row: size(row.n_bytes), size(base.n_bytes)),
        _Column(
            "bits per weight",
            lambda row: f"{row.bpw:.2f}",
            f"{8 * base.n_bytes / base.n_parameters:.2f}",
        ),
        _Column("mean KL", lambda row: text.with_error(row.kl), "0"),
    ]
    if any(row.weight_kl for row in report.rows):
        columns.append(_Column("weight KL", _weight_kl, "0"))
    columns.append(_Column("same top-1", lambda row: text.percent(row.top1), "100 %"))
    columns.append(
        _Column("perplexity", lambda row: _perplexity(row.perplexity), _perplexity(base.perplexity))
    )
    if wide and any(row.tasks for row in report.rows):
        columns.append(_Column("tasks", _tasks, _base_tasks(report)))
    if wide and any(row.speed for row in report.rows):
        columns.append(_Column("tokens/s", lambda row: _rate(row.speed), _rate(base.speed)))
    if any(report.tests(row).kl for row in report.rows):
        columns.append(
            _Column(_against(report), lambda row: text.tested(report.tests(row).kl), "-")
        )
    lines = [
        (row.n_bytes, Line(row.kind, (name(row), *(column.cell(row) for column in columns))))
        for row in report.rows
    ]
    whole = Line("base", ("full precision", *(column.base for column in columns)))
    lines.append((base.n_bytes, whole))
    ordered = sorted(lines, key=lambda item: item[0])
    headers = ("file", *(column.header for column in columns))
    return Table(headers, tuple(line for _, line in ordered))


@dataclass(frozen=True)
class _Column:
    """A header, what a file's cell says, and what the base's does."""

    header: str
    cell: Callable[[Row], str]
    base: str


def _perplexity(found: Perplexity) -> str:
    return text.number(found.value) if math.isnan(found.value) else f"{found.value:.3f}"


def _weight_kl(row: Row) -> str:
    return text.with_error(row.weight_kl) if row.weight_kl else "-"


def _tasks(row: Row) -> str:
    tasks = (row.tasks or {}).items()
    return ", ".join(f"{name} {text.percent(task.acc.value)}" for name, task in tasks) or "-"


def _base_tasks(report: Report) -> str:
    """The base's accuracy, which stands beside that of every file."""
    tasks = next((row.tasks for row in report.rows if row.tasks), {})
    said = [f"{n} {text.percent(t.of_base.value)}" for n, t in tasks.items() if t.of_base]
    return ", ".join(said) or "-"


def _rate(speed: SpeedResult | None) -> str:
    return f"{speed.generation.tokens_per_second:,.0f}" if speed else "-"


def choice(report: Report, name: Callable[[Row], str] = lambda row: row.title) -> Table:
    """Return our files by the memory that they need, and the base."""
    rows = [row for row in report.by_size if row.kind == OURS]
    base = report.base
    found = [
        (row.kind, row.speed, (name(row), size(row.n_bytes), text.with_error(row.kl)))
        for row in rows
    ]
    found.append(("base", base.speed, ("full precision (not included)", size(base.n_bytes), "0")))
    lines = [Line(kind, (_memory(speed), _fits(speed), *cells)) for kind, speed, cells in found]
    headers = ("free memory", "runs on", "file", "size", "mean KL")
    return Table(headers, tuple(lines))


def _fits(speed: SpeedResult | None) -> str:
    """The smallest device of each kind whose free memory holds a file."""
    if speed is None:
        return "-"
    found: dict[str, str] = {}
    for name, device in DEVICES.items():
        if speed.peak_rss_bytes <= parse_bytes(device.free):
            found.setdefault(name.partition("-")[0], _plain(device.title))
    return ", ".join(found.values()) or "none of those listed by `--fits`"


def _plain(title: str) -> str:
    return title.partition(" (")[0].partition(",")[0]


_NEAR = 0.05  # of our size


def of_one_size(report: Report) -> list[Table]:
    """Return for each output the files of others of about its size, if the user named any: those
    within 5 % of it, and of the named ones at least the nearest.
    """
    named = [row for row in report.baselines if row.kind == GIVEN]
    if report.kind != "run" or not named:
        return []
    return [_of_one_size(report, output, named) for output in report.outputs]


def _of_one_size(report: Report, output: Output, named: Sequence[Row]) -> Table:
    def off(row: Row) -> float:
        return row.n_bytes / output.n_bytes - 1

    near = [r for r in report.baselines if r.kind in (STOCK, GIVEN) and abs(off(r)) <= _NEAR]
    nearest = min(named, key=lambda row: abs(off(row)))
    rows = near if nearest in near else [*near, nearest]
    lines = [
        Line(
            row.kind,
            (
                row.title,
                size(row.n_bytes),
                f"{100 * off(row):+.1f} %",
                text.with_error(row.kl),
                f"{row.kl.value / output.kl.value:.2f} times" if output.kl.value else "-",
                text.tested((row.versus or {}).get(output.name, Tests()).kl),
            ),
        )
        for row in sorted(rows, key=lambda row: row.n_bytes)
    ]
    own = (output.title, size(output.n_bytes), "-", text.with_error(output.kl), "1", "-")
    headers = ("of about this size", "size", "larger by", "mean KL", "of ours", "against ours")
    return Table(headers, (Line(OURS, own), *lines))


def _memory(speed: SpeedResult | None) -> str:
    return size(speed.peak_rss_bytes) if speed else "not measured"


def _against(report: Report) -> str:
    """What the tests are against, as a header."""
    if report.kind == "compare":
        return "against the first"
    return "against ours" + " of nearest size" * (len(report.outputs) > 1)


def domains(report: Report) -> Table:
    """Return the mean KL of every file by domain of text; languages have a table of their own."""
    of_all = list(report.first.domains)
    names = [name for name in of_all if language_of(name) is None] or of_all
    lines = [
        Line(
            row.kind,
            (
                row.title,
                *(text.number(row.domains[n].kl.value) if n in row.domains else "-" for n in names),
            ),
        )
        for row in report.by_size
    ]
    return Table(("mean KL on", *names), tuple(lines))


def languages(report: Report) -> Table | None:
    """Return the mean KL by language, of the outputs and of the llama.cpp file that the first is
    compared with.

    Before it stands how well the base knows the language: its bits for sentences that take one bit
    in English.
    """
    found = {name: code for name in report.first.domains if (code := language_of(name))}
    if not found:
        return None
    known = (report.calibration and report.calibration.languages) or {}
    best = text.best_of_at_most(report)
    rows = [*report.outputs, *([best] if best else [])]
    lines = tuple(
        Line(
            "",
            (
                LANGUAGES[code].name,
                f"{known[code]:.2f}" if code in known else "-",
                *(_kl_of(row.domains[name].kl if name in row.domains else None) for row in rows),
            ),
        )
        for name, code in found.items()
    )
    headers = ("mean KL in", "base's bits, English 1", *(row.title for row in rows))
    return Table(headers, lines)


def tails(report: Report) -> Table | None:
    """Return how the KL is spread over tokens, and the ratio of perplexities."""
    lines = tuple(
        Line(
            row.kind,
            (
                row.title,
                text.number(row.kl.median),
                text.number(row.kl.p99),
                text.number(row.kl.p999),
                text.number(row.kl.max),
                f"{row.ln_ppl_ratio.value:+.4f} ± {row.ln_ppl_ratio.stderr:.4f}",
            ),
        )
        for row in report.by_size
        if row.kl.is_known and row.ln_ppl_ratio.is_known
    )
    headers = ("KL of tokens", "median", "99 %", "99.9 %", "largest", "ln perplexity ratio")
    return Table(headers, lines) if lines else None


def long_contexts(report: Report) -> Table | None:
    """Return the mean KL in long contexts of the files that have it."""
    lengths = sorted({n for row in report.rows for n in row.long or {}}, key=int)
    lines = tuple(
        Line(row.kind, (row.title, *(_kl_of((row.long or {}).get(n)) for n in lengths)))
        for row in report.by_size
        if row.long
    )
    headers = ("mean KL in a context of", *(f"{int(n):,} tokens" for n in lengths))
    return Table(headers, lines) if lines else None


def _kl_of(mean: Mean | None) -> str:
    return text.with_error(mean) if mean else "-"


def speeds(report: Report) -> Table | None:
    """Return the tokens per second, load time and memory of the files that have them."""
    found: list[tuple[str, str, SpeedResult]] = [
        (row.kind, row.title, row.speed) for row in report.by_size if row.speed
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
                f"{speed.prompt.tokens_per_second:,.0f}",
                f"{speed.generation.tokens_per_second:,.1f}",
                f"{speed.load_seconds:.2f} s",
                size(speed.peak_rss_bytes),
            ),
        )
        for kind, name, speed in found
    ]
    headers = ("file", "prompt tokens/s", "generated tokens/s", "load")
    return Table((*headers, f"memory at {found[0][2].n_ctx:,} tokens"), tuple(lines))


def checks(report: Report) -> Table | None:
    """Return the table of the integrity checks, None without any."""
    found = text.check_lines(report)
    if not found:
        return None
    return Table(("check", "result", "what was looked at"), tuple(Line("", line) for line in found))


def fallbacks(report: Report) -> Table | None:
    """Return what was asked, what was used, why, and for how many tensors."""
    groups = text.fallback_groups(report)
    if not groups:
        return None
    lines = tuple(Line("", (asked, used, str(n), why)) for asked, used, n, why in groups)
    return Table(("asked", "used", "tensors", "reason"), lines)
