"""A report as one HTML file: tables and plots inside, nothing loaded from anywhere."""

from __future__ import annotations

import re
from html import escape

from quantkit.report import plots, svg, tables, text
from quantkit.report.picture import THEMES
from quantkit.report.schema import Report
from quantkit.report.tables import Table

CAPTIONS = {
    "frontier": "What each byte buys. Lower is closer to the original, further left is smaller;"
    " whiskers are 95 % intervals.",
    "domains": "The same by kind of text.",
    "tensor-map": "The type of every tensor: one row a kind, one column a block, warm for few bits"
    " and cool for many.",
    "bits-by-kind": "Bits per weight of every kind of tensor.",
    "convergence": "The search: its best estimate after so many evaluated tokens.",
}

_STYLE = """
body { margin: 0; background: var(--qk-wash); color: var(--qk-ink); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 20px 16px 60px; }
h1 { font-size: 1.5rem; margin: 8px 0; overflow-wrap: anywhere; }
h2 { font-size: 1.12rem; margin: 34px 0 8px; }
.verdict { font-size: 1.06rem; }
.soft, figcaption { color: var(--qk-soft); font-size: 0.9rem; }
.losses li, .failed { color: var(--qk-bad); }
figure { margin: 18px 0; background: var(--qk-card); border: 1px solid var(--qk-line);
  border-radius: 10px; padding: 12px; }
figure svg { display: block; width: 100%; height: auto; margin: 0 auto; font-family: inherit; }
.scroll { overflow-x: auto; background: var(--qk-card); border: 1px solid var(--qk-line);
  border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 0.86rem; }
th, td { padding: 7px 8px; text-align: right; white-space: nowrap; font-variant-numeric:
  tabular-nums; border-bottom: 1px solid var(--qk-line); }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--qk-soft); font-weight: 500; }
th:first-child { position: sticky; left: 0; background: var(--qk-card); text-align: left;
  font-weight: 500; white-space: normal; min-width: 9em;
  overflow-wrap: anywhere; }
.texts td, .texts th { text-align: left; white-space: normal; }
@media (max-width: 480px) { main { padding: 12px 10px 40px; } figure { padding: 6px; } }
tr.ours > * { color: var(--qk-accent); font-weight: 600; }
tr.base > * { color: var(--qk-soft); }
blockquote { margin: 8px 0; padding: 8px 14px; border-left: 3px solid var(--qk-line); }
"""


def html(report: Report) -> str:
    """The whole report as a page of its own."""
    pictures = plots.draw_all(report)
    lost = text.losses(report)
    parts = [
        f"<h1>{escape(report.model)}</h1>",
        *(f'<p class="verdict">{escape(said)}</p>' for said in text.verdicts(report)),
        _figure("frontier", pictures),
        _table(tables.comparison(report)),
        f'<p class="soft">{escape(text.protocol_line(report))}</p>',
    ]
    if lost:
        parts.append(f"<h2>{text.losing(report)}</h2>{_list(lost, 'losses')}")
    if report.refused:
        parts.append(f"<h2>Sizes that cannot be made</h2>{_list(list(report.refused))}")
    if report.not_measured:
        lines = [f"{name}: {reason}" for name, reason in report.not_measured]
        parts.append(f"<h2>Not measured</h2>{_list(lines)}")
    parts += ["<h2>By domain</h2>", _figure("domains", pictures), _table(tables.domains(report))]
    tails = tables.tails(report)
    if tails is not None:
        parts.append(f"<h2>By token</h2>{_table(tails)}")
    tasks = text.task_lines(report)
    if tasks:
        parts.append(f"<h2>Tasks</h2>{_list(tasks)}")
    speeds = tables.speeds(report)
    if speeds is not None:
        parts.append(f"<h2>Speed and memory</h2>{_table(speeds)}")
    for output, names in plots.names_by_output(report):
        of_one = "" if len(report.outputs) == 1 else f" of {escape(output.name)}"
        chosen = "".join(_figure(names[kind], pictures) for kind in ("tensor-map", "bits-by-kind"))
        if chosen:
            parts.append(f"<h2>Types{of_one}</h2>{chosen}")
        if names["convergence"] in pictures:
            parts.append(f"<h2>Search{of_one}</h2>{_figure(names['convergence'], pictures)}")
    for title, made in (
        ("Integrity", tables.checks(report)),
        ("Fallbacks", tables.fallbacks(report)),
    ):
        if made is not None:
            parts.append(f"<h2>{title}</h2>{_table(made, 'texts')}")
    turn = report.first.generation
    if turn.get("text"):
        parts.append(
            f'<h2>A chat turn</h2><p class="soft">{escape(turn.get("prompt", ""))}</p>'
            f"<blockquote>{escape(turn['text'])}</blockquote>"
        )
    if report.calibration_note:
        parts.append(f'<p class="soft">Calibration: {escape(report.calibration_note)}.</p>')
    if report.versions:
        versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
        parts.append(f'<p class="soft">{escape(versions)}</p>')
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.model)}</title><style>{_variables()}{_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _variables() -> str:
    def block(theme: str, bad: str) -> str:
        names = "".join(f"--qk-{role}:{colour};" for role, colour in THEMES[theme].items())
        return f":root{{{names}--qk-bad:{bad};color-scheme:{theme}}}"

    dark = block("dark", "#fca5a5")
    return f"{block('light', '#b91c1c')}@media(prefers-color-scheme:dark){{{dark}}}"


def _figure(name: str, pictures: dict[str, plots.Picture]) -> str:
    if name not in pictures:
        return ""
    kind = re.sub(r"-\d+$", "", name)
    caption = f"<figcaption>{escape(CAPTIONS[kind])}</figcaption>"
    return f"<figure>{svg.inline(pictures[name])}{caption}</figure>"


def _list(lines: list[str], kind: str = "") -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="{kind}">{items}</ul>'


def _table(made: Table, kind: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in made.headers)
    body = []
    for line in made.lines:
        first, *rest = line.cells
        cells = "".join(
            f'<td class="failed">{escape(c)}</td>' if c == "FAILED" else f"<td>{escape(c)}</td>"
            for c in rest
        )
        body.append(f'<tr class="{line.kind}"><th scope="row">{escape(first)}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
