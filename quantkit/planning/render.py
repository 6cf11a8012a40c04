"""Say what a plan holds: what matters in some ten lines, or everything."""

from __future__ import annotations

from collections import Counter

from quantkit.config.budgets import Budget
from quantkit.config.levels import LEFT_OUT
from quantkit.errors import printable
from quantkit.markdown import table
from quantkit.planning.coverage import in_words
from quantkit.planning.nouns import Plan
from quantkit.sizes import size


def render(plan: Plan, everything: bool = False) -> str:
    """Return the plan in words; with `everything` also the bytes of every level and mix, the
    memory of every stage, and what was replaced by what.
    """
    model, sizes = plan.model, plan.sizes
    lines = [
        f"{printable(model.id, '')} at {model.sha[:12]}: {model.architecture},"
        f" {model.n_parameters / 1e6:,.0f}M parameters, {size(model.download_bytes)},"
        f" license {printable(model.license or 'not stated', '')}",
        *(f"file      {_budget(plan, budget)}" for budget in sizes.budgets),
    ]
    if not sizes.budgets:
        lines.append("file      every type is given")
    lines += [f"unspent   {printable(u.sentence(is_expected=True), '')}" for u in plan.unspent]
    lines += [f"refused   {budget.target}: {budget.refusal}" for budget in sizes.refused]
    lines += [
        f"possible  {size(sizes.smallest_bytes)} to {size(sizes.largest_bytes)}",
        f"types     {', '.join(plan.levels)}",
        f"GPTQ      {in_words(plan.coverage)}",
        f"time      {_time(plan)}",
        f"disk      {_disk(plan)}",
        f"memory    {_memory(plan, everything)}",
        f"context   {_context(plan)}",
    ]
    if everything:
        lines += _tables(plan)
    elif plan.fallbacks:
        tensors = {f.tensor for f in plan.fallbacks}
        lines.append(
            f"fallback  {len(tensors)} tensors cannot have every type: nothing to do (see --all)"
        )
    lines += [f"note      {printable(warning, '')}" for warning in plan.warnings]
    if everything:
        lines.append(f"sandbox   {plan.sandbox}")
    return "\n".join(lines)


def _budget(plan: Plan, budget: Budget) -> str:
    """A size, and llama.cpp's largest file of at most as much."""
    bpw = 8 * budget.limit_bytes / plan.model.n_parameters
    said = f"{budget.target}: {budget.limit_bytes:,} bytes ({bpw:.2f} bpw)"
    below = {label: n for label, n in plan.stock.items() if n <= budget.limit_bytes}
    if not below:
        return f"{said}; no mix of llama.cpp is as small"
    label = max(below, key=lambda x: below[x])
    return f"{said}; llama.cpp's largest within it is {label}"


def _time(plan: Plan) -> str:
    """All of it, and the stages that take longest, of one file."""
    stages = sorted(plan.estimates.stage_seconds.items(), key=lambda item: -item[1])[:4]
    longest = ", ".join(f"{name} {max(1, round(seconds / 60))}" for name, seconds in stages)
    minutes = max(1, round(plan.estimates.seconds / 60))
    return f"about {minutes} minutes on {plan.estimates.machine}: {longest}"


def _disk(plan: Plan) -> str:
    """The largest peak and where it is, and what comes from the Hub beside it. Where there is room,
    more is kept.
    """
    by_stage, downloaded = plan.estimates.disk, plan.footprint.downloaded
    stage = max(by_stage, key=lambda name: by_stage[name])
    beside = f" and {size(downloaded)} in the Hub's cache" if downloaded else ""
    return f"{size(by_stage[stage])} in the run's folder, in {stage}{beside}"


def _memory(plan: Plan, everything: bool) -> str:
    """The largest peak first."""
    peaks = sorted(plan.estimates.memory.items(), key=lambda item: -item[1])
    shown = peaks if everything else peaks[:1]
    return "about " + ", ".join(f"{size(n)} in {stage}" for stage, n in shown)


def _context(plan: Plan) -> str:
    n_tokens = plan.context.usual_tokens
    return f"{n_tokens:,} tokens take {size(plan.context.n_bytes(n_tokens))} beside the file"


def _tables(plan: Plan) -> list[str]:
    sizes = plan.sizes
    lines = [
        "",
        table(["level, uniform", "bytes"], [[name, f"{n:,}"] for name, n in sizes.levels.items()]),
        "",
        table(["llama.cpp mix", "bytes"], [[name, f"{n:,}"] for name, n in plan.stock.items()]),
    ]
    if plan.left_out:
        lines += ["", f"left out: {', '.join(plan.left_out)}: {LEFT_OUT}"]
    groups = Counter((f.asked, f.used, f.reason) for f in plan.fallbacks)
    if groups:
        rows = [[asked, used, str(n), reason] for (asked, used, reason), n in groups.items()]
        lines += ["", table(["asked", "used", "tensors", "reason"], rows)]
    return [*lines, ""]
