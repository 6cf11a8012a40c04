"""What a report says of use: answers beside the original's, and KL in conversations."""

from __future__ import annotations

from evaluators.figures import AnswersBeside, Estimate, Share, SideBySide
from quantkit.evidence.report import text
from quantkit.evidence.report.schema import GIVEN, STOCK, Output, Report, Row
from quantkit.evidence.report.tables import Line, Table

HEADING = "How it answers, beside the original"
IN_CONVERSATIONS = "KL in conversations"


def answer_table(report: Report) -> Table | None:
    """Return the figures of every file whose answers were compared, a column each."""
    rows = [row for row in report.by_size if row.answers]
    if not rows:
        return None
    found = [row.answers for row in rows if row.answers]
    lines = [
        _line("same answer, word for word", [_share(a.identical) for a in found]),
        _line(
            "tokens before the first difference", [_range(a.before_difference, 1) for a in found]
        ),
        _line(
            "same next token, on the original's answers", [_percents(a.agreement) for a in found]
        ),
        _line("length, times the original's", [_range(a.length, 2) for a in found]),
        _line("unfinished (original)", [_both(a.unfinished) for a in found]),
        _line("going in circles (original)", [_both(a.loops) for a in found]),
    ]
    if any(a.tool_calls for a in found):
        lines.append(_line("usable tool calls (original)", [_both(a.tool_calls) for a in found]))
    if any(a.same_calls for a in found):
        lines.append(_line("same call as the original", [_share(a.same_calls) for a in found]))
    if any(a.json for a in found):
        lines.append(_line("valid JSON (original)", [_both(a.json) for a in found]))
    if any(a.thinking for a in found):
        cells = [_range(a.thinking.length, 2) if a.thinking else "-" for a in found]
        lines.append(_line("length of thinking, times the original's", cells))
    head = f"greedy answers to {found[0].n_prompts} prompts"
    return Table((head, *(row.title for row in rows)), tuple(lines))


def _line(name: str, cells: list[str]) -> Line:
    return Line("", (name, *cells))


def _share(share: Share | None) -> str:
    if share is None:
        return "-"
    low, high = share.ci95
    return f"{share.n_yes} of {share.n} ({100 * low:.0f} to {100 * high:.0f} %)"


def _both(both: SideBySide | None) -> str:
    if both is None:
        return "-"
    worse = f", {text.chance(both.p_value)}" if both.p_value < 0.05 else ""
    return f"{both.file.n_yes} of {both.file.n} ({both.base.n_yes}{worse})"


def _range(found: Estimate, digits: int) -> str:
    said = f"{found.value:.{digits}f}"
    if found.ci95 is None:
        return said
    low, high = found.ci95
    return f"{said} ({low:.{digits}f} to {high:.{digits}f})"


def _percents(found: Estimate) -> str:
    said = f"{100 * found.value:.1f} %"
    if found.ci95 is None:
        return said
    low, high = found.ci95
    return f"{said} ({100 * low:.1f} to {100 * high:.1f})"


def answer_lines(report: Report) -> list[str]:
    """Return what the answers of every output come to, in sentences."""
    lines = []
    for output in report.outputs:
        if output.answers:
            of_one = f"{output.name}: " if len(report.outputs) > 1 else ""
            lines.append(of_one + _said(output.answers))
    known = next((row.answers for row in report.rows if row.answers), None)
    if known:
        lines.append(_how(known))
    return lines


def _said(found: AnswersBeside) -> str:
    same = found.identical
    said = [
        f"{same.n_yes} of {same.n} greedy answers are the original's word for word; reading the"
        f" original's answers, it prefers the same next token {_percents(found.agreement)} of the"
        f" time. Its answers are {_range(found.length, 2)} times as long."
    ]
    said += _compared("do not end", found.unfinished, found.n_new)
    said += _compared("go in circles", found.loops, found.n_new)
    if found.tool_calls:
        calls = found.tool_calls
        line = (
            f"With tools, {calls.file.n_yes} of {calls.file.n} answers make calls that can be used"
            f" (original: {calls.base.n_yes})"
        )
        if found.same_calls:
            line += f", {found.same_calls.n_yes} of {found.same_calls.n} the very same ones"
        said.append(f"{line}.")
    if found.json:
        json = found.json
        said.append(
            f"Asked for JSON, {json.file.n_yes} of {json.file.n} answers are valid"
            f" (original: {json.base.n_yes})."
        )
    if found.thinking:
        said.append(f"It thinks {_range(found.thinking.length, 2)} times as long.")
    return " ".join(said)


def _compared(what: str, both: SideBySide, n_new: int) -> list[str]:
    if both.file.n_yes == both.base.n_yes == 0:
        return []
    limit = f" within {n_new} tokens" if what == "do not end" else ""
    line = f"{both.file.n_yes} {what}{limit} (original: {both.base.n_yes})"
    if both.p_value < 0.05 and both.file.n_yes > both.base.n_yes:
        line += f": MORE than by chance ({text.chance(both.p_value)})"
    return [f"{line}."]


def _how(found: AnswersBeside) -> str:
    said = f"Answers have at most {found.n_new} tokens, {_asked(found.asked)}"
    if found.reason and found.asked != "chat template":
        said += f", because {found.reason.rstrip('.')}"
    if found.n_left_out:
        said += f"; {found.n_left_out} prompts did not fit"
    return f"{said}. Ranges are 95 % intervals over prompts: few prompts, wide ranges."


def _asked(asked: str) -> str:
    return f"through the {asked}" if asked == "chat template" else f"as {asked}"


def conversation_tables(report: Report) -> list[Table]:
    """Return for each output its KL by domain of conversation, beside it the llama.cpp file that it
    is compared with.
    """
    return [_conversations(report, output) for output in report.outputs if output.conversations]


def _rivals(report: Report, output: Output) -> list[Row]:
    """The largest llama.cpp file of at most the output's size that was measured like it, and the
    files that the user named.
    """
    measured = [row for row in report.baselines if row.conversations]
    stock = [row for row in measured if row.kind == STOCK and row.n_bytes <= output.n_bytes]
    largest = max(stock, key=lambda row: row.n_bytes, default=None)
    return [*([largest] if largest else []), *(row for row in measured if row.kind == GIVEN)]


def _conversations(report: Report, output: Output) -> Table:
    weights, floor = output.weight_conversations or {}, report.base.floor or {}
    rivals = _rivals(report, output)
    name = f" of {output.name}" if len(report.outputs) > 1 or report.kind == "compare" else ""
    headers = [f"KL in conversations{name}", "documents", "tokens", "mean KL"]
    headers += ["weight KL"] if weights else []
    headers += ["floor"] if floor else []
    headers += ["median", "99 %", "99.9 %", "same top-1"]
    headers += [rival.title for rival in rivals]
    lines = []
    for domain, found in (output.conversations or {}).items():
        cells = [domain, str(found.kl.n), f"{found.n_tokens:,}", _kl(found.kl)]
        cells += [_mean(weights.get(domain))] if weights else []
        cells += [_mean(floor[domain].kl if domain in floor else None)] if floor else []
        cells += [text.number(q.value) for q in (found.median, found.p99, found.p999)]
        cells += [text.percent(found.top1.value)]
        for rival in rivals:
            theirs = (rival.conversations or {}).get(domain)
            cells.append(_kl(theirs.kl) if theirs else "-")
        lines.append(Line("", tuple(cells)))
    return Table(tuple(headers), tuple(lines))


def _mean(found: Estimate | None) -> str:
    return text.number(found.value) if found else "-"


def _kl(found: Estimate) -> str:
    said = text.number(found.value)
    if found.ci95 is None:
        return said
    low, high = (f"{value:.{len(said.partition('.')[2])}f}" for value in found.ci95)
    return f"{said} ({low} to {high})"


def conversation_lines(report: Report) -> list[str]:
    """Return what the KL in conversations is over, what the floor is, and what was left out."""
    known = report.documents
    if known is None:
        return []
    said = (
        f"{known.n} conversations {_asked(known.asked)}, {known.n_scored:,} scored tokens: only"
        " the assistant's last answer counts."
    )
    if known.reason and known.asked != "chat template":
        said += f" No template was used: {known.reason.rstrip('.')}."
    lines = [
        f"{said} Ranges are 95 % intervals over conversations; of fewer than 20 they are rough."
    ]
    everything = (report.base.floor or {}).get("all")
    if everything:
        lines.append(
            f"The floor, {text.number(everything.kl.value)} on all of them, is what lies between"
            " the original as llama.cpp runs it and its own weights in F16. It is the engine's: no"
            " file is to blame for that much. What a file's KL has beyond its weight KL is"
            " llama.cpp's rounding of activations to 8 bits."
        )
    if known.overlap and known.overlap.n_seen:
        lines.append(
            f"{known.overlap.n_seen:,} of {known.overlap.n:,} runs of 13 words in them also stand"
            " in the text that was calibrated on."
        )
    reasons: dict[str, list[str]] = {}
    for name, reason in (known.left_out or {}).items():
        reasons.setdefault(reason, []).append(name)
    lines += [f"Left out, {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return lines
