"""Show a plan as HTML: what the model is, its sizes, where it can run, what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from quantkit.config.budgets import Budget
from quantkit.planning.coverage import in_words
from quantkit.planning.nouns import Estimates, Plan
from quantkit.server.executors.protocol import Offer
from quantkit.server.previews.first_look import FirstLook
from quantkit.server.web.view import duration, notice
from quantkit.sizes import size

_SHOWN_MIXES = ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
_SHOWN_OFFERS = 4


def looked_at(first: FirstLook) -> str:
    """Return the first facts as HTML, while the planner still works out the rest."""
    facts = [
        ("Model", f"{first.architecture}, {parameters(first.n_parameters)} parameters"),
        ("License", _license(first.license, first.gated)),
    ]
    if first.n_download_bytes:
        facts.append(("Source files", size(first.n_download_bytes)))
    return _card(facts, '<p class="qk-help qk-busy">Working out exact sizes and cost …</p>')


def parameters(n: int) -> str:
    """Return a number of parameters as people say it: 135M, 1.54B."""
    if n < 1e6:
        return f"{n:,}"
    return f"{n / 1e6:,.0f}M" if n < 1e9 else f"{n / 1e9:,.3g}B"


def preview(
    plan: Plan,
    *,
    context: int | None = None,
    here: str = "",
    why_not: str = "",
    offers: Sequence[Offer] = (),
    chosen: Offer | None = None,
) -> str:
    """Return the planner's answer as HTML.

    `context`: tokens that a fit was asked for; `here`: what this machine is called; `why_not`: why
    the run cannot be done on it; `offers`: of machines elsewhere.
    """
    try:
        return _preview(plan, context, here, why_not, offers, chosen)
    except (ArithmeticError, ValueError):  # of numbers that no model has
        return notice("The preview cannot be shown.", "The run itself is not affected.", "info")


def _preview(
    plan: Plan,
    context: int | None,
    here: str,
    why_not: str,
    offers: Sequence[Offer],
    chosen: Offer | None,
) -> str:
    model, sizes, needs = plan.model, plan.sizes, plan.estimates
    facts = [
        ("Model", f"{model.architecture}, {parameters(model.n_parameters)} parameters"),
        ("License", _license(model.license, model.gated)),
        ("File", _budget(sizes.budgets, model.n_parameters)),
    ]
    if context is not None:
        facts.append(
            (
                "Context",
                f"{context:,} tokens take {size(plan.context.n_bytes(context))} in addition",
            )
        )
    facts.append(("Size range", f"{size(sizes.smallest_bytes)} to {size(sizes.largest_bytes)}"))
    facts.append(("Covered by GPTQ", in_words(plan.coverage)))
    facts.append(("Disk, memory", _both(needs)))
    n_fallbacks = len({f.tensor for f in plan.fallbacks})
    if n_fallbacks:
        facts.append(
            (
                "Fallbacks",
                f"{n_fallbacks} tensors fall back to a compatible type; the report lists them",
            )
        )
    warnings = [f"{budget.target}: {budget.refusal}" for budget in sizes.refused]
    warnings += plan.warnings[:10]
    notes = "".join(f'<p class="qk-help">{escape(text)}</p>' for text in warnings)
    where = _where(needs, here, why_not, offers, chosen)
    return _card(facts, f"{where}{_stock(plan, context)}{notes}")


def _card(facts: Sequence[tuple[str, str]], rest: str) -> str:
    items = "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in facts)
    return f'<div class="qk-preview" role="status"><dl>{items}</dl>{rest}</div>'


def _license(name: str | None, gated: bool) -> str:
    return (name or "not stated") + (", gated: needs a sign-in that may read it" * gated)


def _budget(budgets: Sequence[Budget], n_parameters: int) -> str:
    limits = [budget.limit_bytes for budget in budgets]
    if not limits:
        return "given by the types"
    if len(limits) > 1:
        return f"{len(limits)} files: " + ", ".join(size(n) for n in limits)
    (limit,) = limits
    return f"at most {size(limit)} ({8 * limit / n_parameters:.2f} bits per weight)"


def _both(needs: Estimates) -> str:
    return f"about {size(needs.disk_bytes)}, {size(needs.memory_bytes)}"


def _where(
    needs: Estimates,
    here: str,
    why_not: str,
    offers: Sequence[Offer],
    chosen: Offer | None,
) -> str:
    """A row for this machine and for every offer worth a look, with time and cost."""
    rows = []
    if here:
        time, cost = ("—", "too large") if why_not else (_about(needs.seconds), "free")
        rows.append(_place(here, "", time, cost, chosen is None))
    shown = list(offers[:_SHOWN_OFFERS])
    if chosen is not None and chosen not in shown:
        shown.append(chosen)
    for offer in shown:
        limit = f"${offer.most_usd:.2f} at most (stops after {offer.hours} h)"
        cost = "under $0.01" if offer.usd < 0.01 else f"${offer.usd:.2f}"
        rows.append(_place(offer.title, limit, _about(offer.seconds), cost, offer == chosen))
    if not rows:
        return ""
    head = "<tr><th>where</th><th>time, about</th><th>cost, about</th></tr>"
    said = f'<p class="qk-help">{escape(why_not)}</p>' if why_not else ""
    return _table(head, "".join(rows)) + said


def _place(name: str, limit: str, time: str, cost: str, is_chosen: bool) -> str:
    small = f"<small>{escape(limit)}</small>" if limit else ""
    return (
        f'<tr class="{"ours" if is_chosen else ""}"><th scope="row">{escape(name)}{small}</th>'
        f"<td>{escape(time)}</td><td>{escape(cost)}</td></tr>"
    )


def _about(seconds: float) -> str:
    return duration(max(60.0, seconds))


def _stock(plan: Plan, context: int | None) -> str:
    """How large llama.cpp's own mixes of this model are, and what each takes in memory."""
    tokens = context or plan.context.usual_tokens
    beside = plan.context.n_bytes(tokens)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{size(n)}</td>'
        f"<td>{8 * n / plan.model.n_parameters:.2f}</td><td>{size(n + beside)}</td></tr>"
        for name in _SHOWN_MIXES
        if (n := plan.stock.get(name)) is not None
    )
    if not rows:
        return ""
    head = (
        "<tr><th>size of</th><th>file</th><th>bits / weight</th>"
        f"<th>in memory with {tokens:,} tokens</th></tr>"
    )
    return (
        f'<details class="qk-sizes"><summary>Sizes of this model</summary>{_table(head, rows)}'
        "</details>"
    )


def _table(head: str, rows: str) -> str:
    return (
        f'<div class="qk-scroll" tabindex="0"><table class="qk-table"><thead>{head}</thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
