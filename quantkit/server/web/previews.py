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

# Which of llama.cpp's mixes the table of sizes has, and what they are like.
_SHOWN_MIXES = {
    "Q2_K": "clearly worse: when nothing else fits",
    "Q3_K_M": "a little worse",
    "IQ4_XS": "good; slower on a CPU",
    "Q4_K_M": "good: the usual choice",
    "Q5_K_M": "very close to the original",
    "Q6_K": "hard to tell from the original",
    "Q8_0": "like the original",
}
_SHOWN_OFFERS = 4
_looking, _looked_at, _preview, _changes = (
    macro("looking"),
    macro("looked_at"),
    macro("preview"),
    macro("changes"),
)
_of_many = macro("of_many")


def looking(model: str) -> str:
    """Return as HTML that nothing is known yet."""
    return _looking(model)


def looked_at(first: FirstLook) -> str:
    """Return the first facts as HTML, while the planner still works out the rest."""
    return _looked_at(
        _model(first.n_parameters, first.license, first.gated, first.n_download_bytes)
    )


def _model(n: int, license: str | None, gated: bool, n_bytes: int) -> list[tuple[str, str]]:
    facts = [("Model", f"{parameters(n)} parameters"), ("License", _license(license, gated))]
    return [*facts, ("Download", size(n_bytes))] if n_bytes else facts


@dataclass(frozen=True)
class Planned:
    """One of several models: its plan, or what is against it."""

    model: str
    plan: Plan | None
    why_not: str = ""
    offer: Offer | None = None  # of the machine elsewhere that it is done on

    @property
    def sizes(self) -> str:
        """Return the sizes of its files."""
        if self.plan is None:
            return ""
        return ", ".join(size(budget.limit_bytes) for budget in self.plan.sizes.budgets)

    @property
    def time(self) -> str:
        """Return what it takes."""
        if self.offer is not None:
            return about(self.offer.seconds)
        return about(self.plan.estimates.seconds) if self.plan is not None else ""

    @property
    def cost(self) -> str:
        """Return what it costs."""
        return usd(self.offer.usd) if self.offer is not None else ""

    @property
    def limit(self) -> str:
        """Return where it is done, and what it costs at most."""
        return f"{self.offer.title}: {limit(self.offer)}" if self.offer is not None else ""


def of_many(rows: Sequence[Planned], n_left: int) -> str:
    """Return the plans of several models as HTML; `n_left` of them are still looked at."""
    offers = [row.offer for row in rows if row.offer is not None]
    here = sum(row.plan.estimates.seconds for row in rows if row.plan and not row.why_not)
    together = ""
    if offers:
        most = sum(offer.most_usd for offer in offers)
        cost = usd(sum(offer.usd for offer in offers))
        together = f"One run each, all at once: together {cost}, ${most:.2f} at most."
    elif here:
        together = f"One run each, one after the other: about {about(here)} on this machine."
    return _of_many(rows, n_left, together, bool(offers))


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
    published: tuple[str, str] | None = None,
) -> str:
    """Return the planner's answer as HTML.

    `context`: tokens that a fit was asked for; `here`: what this machine is called; `why_not`: why
    the run cannot be done on it; `offers`: of machines elsewhere; `published`: the repository that
    it will be uploaded to, and who can see that, as the form has it.
    """
    refused = [f"{budget.target}: {budget.refusal}" for budget in plan.sizes.refused]
    unspent = [found.sentence(is_expected=True) for found in plan.unspent]
    tokens = context or plan.context.usual_tokens
    try:
        return _preview(
            [*_facts(plan, context), *_published(plan, published)],
            _details(plan),
            _places(plan.estimates, here, why_not, offers, chosen),
            why_not,
            tokens,
            _stock(plan, plan.context.n_bytes(tokens)),
            [*unspent, *refused, *plan.warnings[:10]],
        )
    except (ArithmeticError, ValueError):  # of numbers that no model has
        return notice("The preview cannot be shown.", "The run itself is not affected.", "info")


def _facts(plan: Plan, context: int | None) -> list[tuple[str, str]]:
    model, sizes = plan.model, plan.sizes
    facts = _model(model.n_parameters, model.license, model.gated, plan.footprint.downloaded)
    facts.append(("File", _budget(sizes.budgets, model.n_parameters)))
    if context is not None:
        beside = size(plan.context.n_bytes(context))
        facts.append(("Context", f"{context:,} tokens take {beside} beside it"))
    return facts


def _published(plan: Plan, published: tuple[str, str] | None) -> list[tuple[str, str]]:
    if published is None:
        return []
    repo, seen_by = published
    if seen_by == "model" and plan.model.gated:
        seen_by = "private: the model is gated"
    elif seen_by == "model":
        seen_by = "public unless the model is private"
    return [("Will be published to", f"{repo} ({seen_by})")]


def _details(plan: Plan) -> list[tuple[str, str]]:
    """What developers ask for."""
    sizes, needs = plan.sizes, plan.estimates
    facts = [
        ("Architecture", plan.model.architecture),
        ("Size range", f"{size(sizes.smallest_bytes)} to {size(sizes.largest_bytes)}"),
        ("Covered by GPTQ", in_words(plan.coverage)),
        ("Disk needed", f"about {size(needs.disk_bytes)}"),
        ("Memory needed", f"at least {size(needs.memory_bytes)}"),
        ("Types to choose from", ", ".join(plan.levels)),
    ]
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
        time, cost = ("—", "too large") if why_not else (about(needs.seconds), "free")
        places.append(_Place(here, "", time, cost, chosen is None))
    shown = list(offers[:_SHOWN_OFFERS])
    if chosen is not None and chosen not in shown:
        shown.append(chosen)
    for offer in shown:
        time, cost = about(offer.seconds), usd(offer.usd)
        places.append(_Place(offer.title, limit(offer), time, cost, offer == chosen))
    return places


def limit(offer: Offer) -> str:
    """Return what a run costs there at most."""
    return f"${offer.most_usd:.2f} at most (stops after {offer.hours} h)"


def machine_choices(offers: Sequence[Offer]) -> list[tuple[str, str]]:
    """Return the machines of offers as choices: what each is called, takes and costs."""
    return [
        (f"{o.title.removeprefix('Job: ')}: {takes(o.seconds, o.usd)}", o.machine) for o in offers
    ]


def takes(seconds: float, price: float | None = None) -> str:
    """Return what a run takes, and what it costs where it does."""
    return about(seconds) + (f", {usd(price)}" if price is not None else "")


def usd(price: float) -> str:
    """Return a price, for people."""
    return "under $0.01" if price < 0.01 else f"${price:.2f}"


def about(seconds: float) -> str:
    """Return what a run takes, for people."""
    return duration(max(60.0, seconds))


def _stock(plan: Plan, beside: int) -> list[tuple[str, ...]]:
    """How large llama.cpp's own mixes of this model are, what they are like, how fast they answer
    (what has fewer bytes is read sooner), and what each takes in memory.
    """
    whole = 2 * plan.model.n_parameters  # bytes of 16 bits a weight
    return [
        (name, size(n), about, f"{whole / n:.1f}×", size(n + beside))
        for name, about in _SHOWN_MIXES.items()
        if (n := plan.stock.get(name)) is not None
    ]


def changes(found: RepoChanges, closed: str = "", collection: str | None = None) -> str:
    """Return the files of a repository, each with what publishing does to it. `closed`: what the
    model is, "private" or "gated", where this is why the repository is private; `collection`: what
    the repository is put into.
    """
    n_sent = sum(x.kind in ("new", "changed") for x in found.changes)
    return _changes(found, closed, n_sent, collection)
