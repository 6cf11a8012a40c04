"""What a finished run is worth, as HTML: figures, the comparison table, pictures."""

from __future__ import annotations

from html import escape
from typing import Any

from quantkit import report as reports
from quantkit.errors import QuantkitError
from quantkit.launch import JobView
from quantkit.web.charts import frontier, kl_text, kl_with_error
from quantkit.web.tensor_map import tensor_map
from quantkit.web.view import file_size


def results(job: JobView) -> str:
    """The results of a validated run; empty before that."""
    if not job.report:
        return ""
    try:
        return _results(job.report, job)
    except (QuantkitError, KeyError, TypeError, ValueError, IndexError, ZeroDivisionError):
        return (
            '<div class="qk-notice error" role="alert"><strong>The report of this run cannot be'
            " read.</strong> <span>Download report.json and look into it.</span></div>"
        )


def live_map(job: JobView) -> str:
    """The best mix that the search knows so far, while it is at work."""
    if job.report or not job.allocation:
        return ""
    grid = tensor_map(job.allocation)
    if not grid:
        return ""
    return (
        '<section class="qk-section"><h3>The best mix so far</h3><p class="qk-help">One column'
        f" a block.</p>{grid}</section>"
    )


def _results(report: dict[str, Any], job: JobView) -> str:
    parts = [
        f'<section class="qk-section"><h3>Result</h3><p class="qk-verdict">'
        f"{'<br>'.join(map(escape, reports.verdicts(reports.read(report))))}</p>"
        f"{_tiles(report)}{_comparison(report)}",
    ]
    picture = frontier(report)
    if picture:
        parts.append(
            '<p class="qk-help">KL divergence over size. Further down is closer to the original,'
            f" further left is smaller.</p>{picture}"
        )
    parts.append(
        f'<p class="qk-help">{escape(str(report["protocol"]))}. Text not seen before:'
        f" {escape(', '.join(report['texts']))}.</p></section>"
    )
    parts.append(_domains(report))
    several = len(report["outputs"]) > 1
    for output in report["outputs"]:
        grid = tensor_map(output.get("tensors", {}))
        if grid:
            of_one = f" of {escape(output['name'])}" if several else ""
            parts.append(
                f'<section class="qk-section"><h3>Type of every tensor{of_one}</h3>'
                f'<p class="qk-help">One column a block.</p>{grid}</section>'
            )
    return "".join(parts)


def _tiles(report: dict[str, Any]) -> str:
    ours = report["outputs"][0]
    tiles = [
        (file_size(ours["n_bytes"]), f"{ours['bpw']:.2f} bits per weight"),
        (kl_text(ours["kl"]["mean"]), "mean KL divergence"),
        (f"{100 * ours['top1']:.1f} %", "same most likely token"),
    ]
    stock = [row for row in report["baselines"] if row["kind"] == "stock"]
    smaller = [row for row in stock if row["n_bytes"] <= ours["n_bytes"]]
    if smaller:
        best = min(smaller, key=lambda row: row["kl"]["mean"])
        ratio = ours["kl"]["mean"] / best["kl"]["mean"]
        tiles.insert(1, (f"{ratio:.2f}×", f"the KL of llama.cpp's {best['name']}"))
    items = "".join(f"<li><b>{escape(a)}</b><span>{escape(b)}</span></li>" for a, b in tiles)
    return f'<ul class="qk-tiles">{items}</ul>'


def _comparison(report: dict[str, Any]) -> str:
    rows = [
        (row["n_bytes"], row["path"].rsplit("/", 1)[-1], row, True) for row in report["outputs"]
    ]
    rows += [(row["n_bytes"], _label(row), row, False) for row in report["baselines"]]
    rows.sort(key=lambda row: row[0])
    lines = []
    for n_bytes, name, row, is_ours in rows:
        kl = row["kl"]
        cells = [
            file_size(n_bytes),
            f"{row['bpw']:.2f}",
            kl_with_error(kl["mean"], kl["stderr"]),
            f"{100 * row['top1']:.1f} %",
            f"{row['perplexity']['value']:.3f}",
        ]
        lines.append(_row(name, cells, "ours" if is_ours else ""))
    base = report["base"]
    cells = [
        file_size(base["n_bytes"]),
        f"{8 * base['n_bytes'] / base['n_parameters']:.2f}",
        "0",
        "100 %",
        f"{base['perplexity']['value']:.3f}",
    ]
    lines.append(_row("full precision", cells, "base"))
    return _table(["file", "size", "bits / weight", "mean KL", "same top-1", "perplexity"], lines)


def _domains(report: dict[str, Any]) -> str:
    names = list(report["outputs"][0]["domains"])
    rows = [(row["path"].rsplit("/", 1)[-1], row, "ours") for row in report["outputs"]]
    rows += [(_label(row), row, "") for row in report["baselines"]]
    lines = [
        _row(name, [kl_text(row["domains"][domain]["kl"]["mean"]) for domain in names], kind)
        for name, row, kind in rows
    ]
    table = _table(["mean KL on", *names], lines)
    return f'<section class="qk-section"><h3>By kind of text</h3>{table}</section>'


def _label(row: dict[str, Any]) -> str:
    return f"llama.cpp {row['name']}" if row["kind"] == "stock" else str(row["name"])


def _row(name: str, cells: list[str], kind: str) -> str:
    tds = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr class="{kind}"><th scope="row">{escape(name)}</th>{tds}</tr>'


def _table(headers: list[str], lines: list[str]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in headers)
    return (
        f'<div class="qk-scroll" tabindex="0"><table class="qk-table"><thead><tr>{head}</tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
