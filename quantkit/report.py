"""`report.json` as Markdown: the one table that says what was made and what it is worth."""

from __future__ import annotations

from typing import Any


def size(n_bytes: int) -> str:
    """Bytes for people: decimal MB or GB."""
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"


def table(headers: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column left, the rest right."""
    rule = ["---", *["---:"] * (len(headers) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [headers, rule, *rows])


def number(value: float) -> str:
    """A KL divergence with three digits that mean something."""
    return f"{value:.4f}" if value >= 0.01 else f"{value:.2e}" if value < 1e-4 else f"{value:.5f}"


def _kl(row: dict[str, Any]) -> str:
    return f"{number(row['kl']['mean'])} ± {number(row['kl']['stderr'])}"


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['n_bytes']:,}",
        f"{row['bpw']:.2f}",
        _kl(row),
        f"{100 * row['top1']:.1f} %",
        f"{row['perplexity']['value']:.3f}",
    ]


def comparison(report: dict[str, Any]) -> str:
    """Ours, llama.cpp's own files around its size, and the base, by size."""
    rows = [
        (row["n_bytes"], [f"**{row['path'].rsplit('/', 1)[-1]}**", *_cells(row)])
        for row in report["outputs"]
    ]
    rows += [
        (row["n_bytes"], [f"llama.cpp {row['name']}, same imatrix", *_cells(row)])
        for row in report["baselines"]
    ]
    base = report["base"]
    n_bytes = base["n_bytes"]
    bpw = 8 * n_bytes / base["n_parameters"]
    cells = [f"{n_bytes:,}", f"{bpw:.2f}", "0", "100 %", f"{base['perplexity']['value']:.3f}"]
    rows.append((n_bytes, ["full precision", *cells]))
    headers = ["file", "bytes", "bits per weight", "mean KL", "same top-1", "perplexity"]
    return table(headers, [cells for _, cells in sorted(rows, key=lambda r: r[0])])


def verdict(report: dict[str, Any]) -> str:
    """One sentence: our KL against the best stock file of at most our size. Losses are said as
    plainly as wins.
    """
    ours = report["outputs"][0]
    smaller = [row for row in report["baselines"] if row["n_bytes"] <= ours["n_bytes"]]
    if not smaller:
        return "No llama.cpp file is as small as this one."
    best = min(smaller, key=lambda row: row["kl"]["mean"])
    ratio = ours["kl"]["mean"] / best["kl"]["mean"]
    word = "less" if ratio < 1 else "MORE"
    return (
        f"The best llama.cpp file of at most this size, {best['name']}, has a mean KL divergence of"
        f" {number(best['kl']['mean'])}: this file's is {ratio:.2f} times that ({word})."
    )


def domains(report: dict[str, Any]) -> str:
    """Mean KL by domain of text."""
    names = list(report["outputs"][0]["domains"])
    rows = []
    for label, row in [(r["path"].rsplit("/", 1)[-1], r) for r in report["outputs"]] + [
        (f"llama.cpp {r['name']}", r) for r in report["baselines"]
    ]:
        rows.append([label, *[number(row["domains"][name]["kl"]["mean"]) for name in names]])
    return table(["mean KL on", *names], rows)


def zero_shot(report: dict[str, Any]) -> str:
    """The zero-shot lines of all outputs."""
    lines = []
    for row in report["outputs"]:
        zero = row["zero_shot"]
        if zero["status"] != "done":
            lines.append(f"Zero-shot: not run ({zero['reason']}).")
            continue
        acc, base, flips = zero["acc"], zero["base"]["acc"], zero["flips"]["acc"]
        lines.append(
            f"Zero-shot, {zero['task']} ({acc['n']} items):"
            f" {100 * acc['value']:.1f} ± {100 * acc['stderr']:.1f} %,"
            f" full precision {100 * base['value']:.1f} %; {flips['n']} answers differ."
        )
    return "\n".join(lines)


def markdown(report: dict[str, Any]) -> str:
    """The whole report."""
    parts = [
        f"# {report['model']}",
        verdict(report),
        comparison(report),
        f"Protocol: {report['protocol']}. Text: {', '.join(report['texts'])},"
        " not seen by any earlier stage.",
        "## By domain",
        domains(report),
        "## Tasks",
        zero_shot(report),
        "## How it was made",
        f"Calibration: {report['calibration']['note']}.",
    ]
    if report["fallbacks"]:
        parts += ["## Fallbacks", fallbacks(report)]
    if report["unmapped"]:
        parts.append(
            "Quantized without GPTQ, not found in the model: " + ", ".join(report["unmapped"]) + "."
        )
    return "\n\n".join(parts) + "\n"


def fallbacks(report: dict[str, Any]) -> str:
    """Fallbacks grouped: what was asked, what was used, why, and for how many tensors."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for f in report["fallbacks"]:
        groups.setdefault((f["asked"], f["used"], f["reason"]), []).append(f["tensor"])
    rows = [
        [asked, used, str(len(tensors)), reason]
        for (asked, used, reason), tensors in groups.items()
    ]
    return table(["asked", "used", "tensors", "reason"], rows)
