"""As HTML: what a run would take (the model, its sizes, where it can run, what it costs), and
what publishing would change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.config.budgets import Budget
from quantkit.config.levels import LEFT_OUT
from quantkit.hub import RepoChanges
from quantkit.planning.coverage import in_words
from quantkit.planning.nouns import Estimates, Plan
from quantkit.server.executors.protocol import Offer
from quantkit.server.previews.first_look import FirstLook
from quantkit.server.web.view import duration, macro, notice
from quantkit.sizes import size

_SHOWN_MIXES = ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
_SHOWN_OFFERS = 4
_looked_at, _preview, _changes = macro("looked_at"), macro("preview"), macro("changes")


def looked_at(first: FirstLook) -> str:
    """Return the first facts as HTML, while the planner still works out the rest."""
    facts = [
        ("Model", f"{first.architecture}, {parameters(first.n_parameters)} parameters"),
        ("License", _license(first.license, first.gated)),
    ]
    if first.n_download_bytes:
        facts.append(("To read", size(first.n_download_bytes)))
    return _looked_at(facts)


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
    refused = [f"{budget.target}: {budget.refusal}" for budget in plan.sizes.refused]
    tokens = context or plan.context.usual_tokens
    try:
        return _preview(
            _facts(plan, context),
            _places(plan.estimates, here, why_not, offers, chosen),
            why_not,
            tokens,
            _stock(plan, plan.context.n_bytes(tokens)),
            [*refused, *plan.warnings[:10]],
        )
    except (ArithmeticError, ValueError):  # of numbers that no model has
        return notice("The preview cannot be shown.", "The run itself is not affected.", "info")


def _facts(plan: Plan, context: int | None) -> list[tuple[str, str]]:
    model, sizes, needs = plan.model, plan.sizes, plan.estimates
    facts = [
        ("Model", f"{model.architecture}, {parameters(model.n_parameters)} parameters"),
        ("License", _license(model.license, model.gated)),
        ("File", _budget(sizes.budgets, model.n_parameters)),
    ]
    if context is not None:
        beside = size(plan.context.n_bytes(context))
        facts.append(("Context", f"{context:,} tokens take {beside} beside it"))
    facts.append(("Possible", f"{size(sizes.smallest_bytes)} to {size(sizes.largest_bytes)}"))
    facts.append(("Under GPTQ", in_words(plan.coverage)))
    disk, memory = size(needs.disk_bytes), size(needs.memory_bytes)
    facts.append(("Disk, memory", f"about {disk}, {memory}"))
    if plan.left_out:
        facts.append(("Not made", f"{', '.join(plan.left_out)}: {LEFT_OUT}"))
    n_fallbacks = len({f.tensor for f in plan.fallbacks})
    if n_fallbacks:
        said = f"{n_fallbacks} tensors fall back to a compatible type; the report lists them"
        facts.append(("Fallbacks", said))
    return facts


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


@dataclass(frozen=True)
class _Place:
    """A row: where the run can be done."""

    name: str
    limit: str
    time: str
    cost: str
    is_chosen: bool


def _places(
    needs: Estimates, here: str, why_not: str, offers: Sequence[Offer], chosen: Offer | None
) -> list[_Place]:
    """This machine, and every offer worth a look, with time and cost."""
    places = []
    if here:
        time, cost = ("—", "too large") if why_not else (_about(needs.seconds), "free")
        places.append(_Place(here, "", time, cost, chosen is None))
    shown = list(offers[:_SHOWN_OFFERS])
    if chosen is not None and chosen not in shown:
        shown.append(chosen)
    for offer in shown:
        limit = f"${offer.most_usd:.2f} at most (stops after {offer.hours} h)"
        cost = "under $0.01" if offer.usd < 0.01 else f"${offer.usd:.2f}"
        places.append(_Place(offer.title, limit, _about(offer.seconds), cost, offer == chosen))
    return places


def _about(seconds: float) -> str:
    return duration(max(60.0, seconds))


def _stock(plan: Plan, beside: int) -> list[tuple[str, ...]]:
    """How large llama.cpp's own mixes of this model are, and what each takes in memory."""
    return [
        (name, size(n), f"{8 * n / plan.model.n_parameters:.2f}", size(n + beside))
        for name in _SHOWN_MIXES
        if (n := plan.stock.get(name)) is not None
    ]


def changes(found: RepoChanges, closed: str = "") -> str:
    """Return the files of a repository, each with what publishing does to it. `closed`: what the
    model is, "private" or "gated", where this is why the repository is private.
    """
    return _changes(found, closed, sum(x.kind in ("new", "changed") for x in found.changes))
