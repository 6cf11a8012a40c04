"""A report as Markdown: the tables and sentences that the card and the terminal show."""

from __future__ import annotations

from collections.abc import Iterable

from quantkit.evidence.report import beside, tables, text
from quantkit.evidence.report.schema import OURS, Report
from quantkit.evidence.report.tables import Table
from quantkit.markdown import table


def set_table(made: Table) -> str:
    """Set one of the report's tables, our own rows in bold."""
    rows = [
        [f"**{line.cells[0]}**", *line.cells[1:]] if line.kind == OURS else line.cells
        for line in made.lines
    ]
    return table(made.headers, rows)


def plain_table(made: Table) -> str:
    """Set one of the report's tables without emphasis."""
    return table(made.headers, (line.cells for line in made.lines))


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def markdown(report: Report) -> str:
    """Return the whole report."""
    parts = [
        f"# {report.model}",
        *(text.verdicts(report) if len(report.outputs) == 1 else [bullets(text.verdicts(report))]),
        set_table(tables.comparison(report)),
        text.protocol_line(report),
        *_sections(
            (text.losing(report), text.losses(report)),
            *(("", made) for made in tables.of_one_size(report)),
            ("Carried over", text.carried(report)),
            ("Runtimes", text.runtimes(report)),
            ("Sizes without a file of their own", text.refused(report)),
            ("Not measured", text.not_measured(report)),
            ("By domain", tables.domains(report)),
            ("In other languages", tables.languages(report)),
            ("By token", tables.tails(report)),
            ("In long contexts", tables.long_contexts(report)),
            (beside.HEADING, beside.answer_table(report)),
            ("", beside.answer_lines(report)),
            *((beside.IN_CONVERSATIONS, made) for made in beside.conversation_tables(report)),
            ("", beside.conversation_lines(report)),
            ("Tasks", text.task_lines(report)),
            ("Speed and memory", tables.speeds(report)),
            ("Integrity", tables.checks(report)),
            ("Fallbacks", tables.fallbacks(report)),
        ),
    ]
    turn = report.first.generation
    if turn and turn.get("text"):
        said = " ".join(turn["text"].split())
        parts += [
            "## A chat turn",
            f"Prompt, through the {turn.get('asked', 'model')}: *{turn.get('prompt', '')}*",
            f"> {said}",
        ]
    if report.calibration_note:
        parts += ["## How it was made", f"Calibration: {report.calibration_note}."]
    if report.unmapped:
        parts.append(
            "Quantized without GPTQ, because the model does not have them: "
            + ", ".join(report.unmapped)
            + "."
        )
    if report.versions:
        versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
        parts.append(f"Versions: {versions}.")
    return "\n\n".join(parts) + "\n"


def _sections(*found: tuple[str, Table | list[str] | None]) -> list[str]:
    """Headings, and what stands under them; those with nothing are left out."""
    return [
        part
        for title, made in found
        if made
        for part in (
            *([f"## {title}"] if title else []),
            set_table(made) if isinstance(made, Table) else bullets(made),
        )
    ]
