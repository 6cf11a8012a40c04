"""A report as HTML: its sections, which the web page shows too, and the file that holds them alone.

Tables and plots are inside; nothing is loaded from anywhere.
"""

from __future__ import annotations

import re
from html import escape

from quantkit.evidence.report import plots, svg, tables, text
from quantkit.evidence.report.picture import THEMES, Picture
from quantkit.evidence.report.schema import Report
from quantkit.evidence.report.tables import Table

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
h3 { font-size: 1.12rem; margin: 34px 0 8px; }
.qk-verdict { font-size: 1.06rem; }
.qk-help, figcaption { color: var(--qk-soft); font-size: 0.9rem; }
.qk-losses li, .failed { color: var(--qk-bad); }
figure { margin: 18px 0; background: var(--qk-card); border: 1px solid var(--qk-line);
  border-radius: 10px; padding: 12px; }
figure svg { display: block; width: 100%; height: auto; margin: 0 auto; font-family: inherit; }
.qk-scroll { overflow-x: auto; background: var(--qk-card); border: 1px solid var(--qk-line);
  border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 0.86rem; }
th, td { padding: 7px 8px; text-align: right; white-space: nowrap; font-variant-numeric:
  tabular-nums; border-bottom: 1px solid var(--qk-line); }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--qk-soft); font-weight: 500; }
th:first-child { position: sticky; left: 0; background: var(--qk-card); text-align: left;
  font-weight: 500; white-space: normal; min-width: 9em;
  overflow-wrap: anywhere; }
.qk-texts td, .qk-texts th { text-align: left; white-space: normal; }
@media (max-width: 480px) { main { padding: 12px 10px 40px; } figure { padding: 6px; } }
tr.ours > * { color: var(--qk-accent); font-weight: 600; }
tr.base > * { color: var(--qk-soft); }
blockquote { margin: 8px 0; padding: 8px 14px; border-left: 3px solid var(--qk-line); }
"""


def html(report: Report) -> str:
    """The whole report as a page of its own."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.model)}</title><style>{_variables()}{_STYLE}</style></head>"
        f"<body><main><h1>{escape(report.model)}</h1>{sections(report)}</main></body></html>\n"
    )


def sections(report: Report) -> str:
    """All that the report says, for any page that has rules for these classes."""
    pictures = plots.draw_all(report)
    lost = text.losses(report)
    parts = [
        *(f'<p class="qk-verdict">{escape(said)}</p>' for said in text.verdicts(report)),
        _figure("frontier", pictures),
        _table(tables.comparison(report), "qk-comparison"),
        f'<p class="qk-help">{escape(text.protocol_line(report))}</p>',
    ]
    if lost:
        parts.append(_titled(text.losing(report), _list(lost, "qk-losses")))
    if report.refused:
        parts.append(_titled("Sizes that cannot be made", _list(list(report.refused))))
    if report.not_measured:
        lines = [f"{name}: {reason}" for name, reason in report.not_measured]
        parts.append(_titled("Not measured", _list(lines)))
    by_domain = _figure("domains", pictures) + _table(tables.domains(report))
    languages = tables.languages(report)
    if languages is not None:
        by_domain += _table(languages)
    parts.append(_titled("By domain", by_domain))
    tails = tables.tails(report)
    if tails is not None:
        parts.append(_titled("By token", _table(tails)))
    long = tables.long_contexts(report)
    if long is not None:
        parts.append(_titled("In long contexts", _table(long)))
    tasks = text.task_lines(report)
    if tasks:
        parts.append(_titled("Tasks", _list(tasks)))
    speeds = tables.speeds(report)
    if speeds is not None:
        parts.append(_titled("Speed and memory", _table(speeds)))
    for output, names in plots.names_by_output(report):
        of_one = "" if len(report.outputs) == 1 else f" of {output.name}"
        chosen = "".join(_figure(names[kind], pictures) for kind in ("tensor-map", "bits-by-kind"))
        if chosen:
            parts.append(_titled(f"Types{of_one}", chosen))
        if names["convergence"] in pictures:
            parts.append(_titled(f"Search{of_one}", _figure(names["convergence"], pictures)))
    for title, made in (
        ("Integrity", tables.checks(report)),
        ("Fallbacks", tables.fallbacks(report)),
    ):
        if made is not None:
            parts.append(_titled(title, _table(made, "qk-texts")))
    turn = report.first.generation
    if turn.get("text"):
        asked = f'<p class="qk-help">{escape(turn.get("prompt", ""))}</p>'
        said = f"<blockquote>{escape(turn['text'])}</blockquote>"
        parts.append(_titled("A chat turn", asked + said))
    if report.calibration_note:
        parts.append(f'<p class="qk-help">Calibration: {escape(report.calibration_note)}.</p>')
    if report.versions:
        versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
        parts.append(f'<p class="qk-help">{escape(versions)}</p>')
    return "".join(parts)


def figure(picture: Picture, caption: str = "") -> str:
    """A plot on a card of its own."""
    said = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="qk-figure">{svg.inline(picture)}{said}</figure>'


def _titled(title: str, content: str) -> str:
    return f'<section class="qk-section"><h3>{escape(title)}</h3>{content}</section>'


def _variables() -> str:
    def block(theme: str, bad: str) -> str:
        names = "".join(f"--qk-{role}:{colour};" for role, colour in THEMES[theme].items())
        return f":root{{{names}--qk-bad:{bad};color-scheme:{theme}}}"

    dark = block("dark", "#fca5a5")
    return f"{block('light', '#b91c1c')}@media(prefers-color-scheme:dark){{{dark}}}"


def _figure(name: str, pictures: dict[str, Picture]) -> str:
    kind = re.sub(r"-\d+$", "", name)
    return figure(pictures[name], CAPTIONS[kind]) if name in pictures else ""


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
        f'<div class="qk-scroll" tabindex="0"><table class="qk-table {kind}"><thead><tr>{head}</tr>'
        f"</thead><tbody>{''.join(body)}</tbody></table></div>"
    )
