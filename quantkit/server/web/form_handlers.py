"""Handle the events of the form, between Gradio and the run store: what a run would take, and
starting it.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantkit import hub
from quantkit.config import DEMO_MODEL, RunConfig
from quantkit.errors import NeedsToken, QuantkitError, UsageError
from quantkit.planning.nouns import Plan
from quantkit.server.executors import registry
from quantkit.server.executors.protocol import Executor, Offer, Order, choose
from quantkit.server.executors.registry import LOCAL
from quantkit.server.previews.estimate import CutOff, Looked, estimate, known_plan, known_times
from quantkit.server.previews.first_look import DEMO, FirstLook
from quantkit.server.runs import compared, texts
from quantkit.server.runs.adopt import adopt
from quantkit.server.runs.request import RunForm, check_machine, models_of, to_config
from quantkit.server.runs.store import RunStore
from quantkit.server.web import previews, view, words
from quantkit.server.web.rate_limit import RateLimit
from quantkit.server.web.visitor import Visitors

logger = logging.getLogger(__name__)

_MAX_TOKEN = 500
_SEARCH_PAUSE = 60.0  # seconds without asking a Hub that did not answer
_WELCOME_SECONDS = 3600.0
_BUG = "Something went wrong."
_BUG_REMEDY = "Try again; if it keeps happening, report it with the server's log."


@dataclass(frozen=True)
class Client:
    """The client of a request, as the server verified it; never what a page claims."""

    owner: str | None = None  # a signed-in Hub user or the holder of a cookie; None: neither
    username: str | None = None
    address: str = ""  # of the network, to count by: cookies can be thrown away

    @property
    def counted_as(self) -> str:
        return f"hf:{self.username}" if self.username else self.address or str(self.owner)


@dataclass(frozen=True)
class Shown:
    """A preview as HTML, and whether it asks for a token."""

    html: str
    wants_token: bool = False
    machines: tuple[tuple[str, str], ...] = ()  # to choose from: what they are called, their names
    takes: Mapping[str, str] = field(default_factory=dict)  # what the run takes, by profile


class FormHandlers:
    """Handlers of the form, of the page and of the API."""

    def __init__(self, store: RunStore, visitors: Visitors, on_space: bool, sign_in: bool) -> None:
        self.store = store
        self.visitors = visitors
        self.on_space = on_space
        self.sign_in = sign_in  # whether a Hub user can sign in, and has to before a run
        self.page = words.of_page(sign_in, store.public)
        self.remote = registry.remote()  # places elsewhere that runs may be done at
        self.rate_limit = RateLimit()
        self._welcomed: dict[str, float] = {}
        self._no_search_until = 0.0

    def client(self, request: Any, user: Any) -> Client:
        """Return who sent a request of the page: the signed-in user, else the holder of its cookie.
        The gate has found out the address.
        """
        address = request.client.host if request.client else ""
        if user:
            return Client(f"hf:{user.username}", user.username, address)
        visitor = self.visitors.of_cookies(request.cookies)
        return Client(None if visitor is None else f"visitor:{visitor}", None, address)

    def allow(self, action: str, client: Client) -> None:
        """Raise QuantkitError when a stranger does this too often."""
        if self.store.public:
            self.rate_limit.take(action, client.counted_as)

    def welcome(self, client: Client, token: str | None) -> None:
        """Look, aside and once an hour, for runs of a signed-in user that are known elsewhere
        alone.
        """
        user = client.username
        if user is None or not token or not self.remote or client.owner is None:
            return
        if time.monotonic() < self._welcomed.get(user, -1e9) + _WELCOME_SECONDS:
            return
        self._welcomed[user] = time.monotonic()
        threading.Thread(target=self._adopt, args=(client.owner, token), daemon=True).start()

    def _adopt(self, owner: str, token: str) -> None:
        for executor in self.remote:
            try:
                adopt(self.store.root, owner, executor, executor.found(token))
            except QuantkitError as error:
                logger.info("%s was not asked for runs: %s", executor.name, error.message)

    # Errors.

    def notice(self, error: QuantkitError) -> str:
        """Return what went wrong as HTML, in words for a visitor of the page."""
        return view.notice(error.message, self.page.remedy(error))

    def told(self, action: Callable[[], str]) -> tuple[str, bool]:
        """Return the action's text and True, or what went wrong as a notice and False: a page never
        shows a traceback.
        """
        try:
            return action(), True
        except QuantkitError as error:
            return self.notice(error), False
        except Exception:
            logger.exception("a page event failed")
            return view.notice(_BUG, _BUG_REMEDY), False

    # Forms.

    def start(self, form: RunForm, token: str, client: Client) -> tuple[str, ...]:
        """Queue a run of every model that the form names. Returns their ids. Raises QuantkitError:
        nothing is queued then that the preview refuses, of any of them.
        """
        if self.sign_in and client.username is None:
            raise NeedsToken("You are not signed in.")
        owner, secret = known(client.owner), checked_token(token)
        forms = _one_each(form)
        others = compared.parse(form.compare)
        text = texts.kept(self.store.root, owner, form.own_text) if form.own_text else None
        configs = [to_config(one, self.store.public) for one in forms]  # what is wrong, at once
        runs = []
        for one, config in zip(forms, configs, strict=True):
            self.allow("start", client)
            order, device = self._order(one, config, secret, client)
            if text is not None and order.executor != LOCAL.name:
                raise UsageError("Your own text cannot be used there.", "Choose this machine.")
            files: tuple[str, ...] = ()
            if others:
                limits = self._plan(config, secret, client).sizes.limits
                files = compared.settle(others, limits, self._secret(secret))
            runs.append((dataclasses.replace(config, device=device, compare=files), order))
        place = self.visitors.place(client.counted_as)
        return self.store.submit_all(runs, owner, secret, place, text)

    def _secret(self, given: str | None) -> str | None:
        """The token that was given; on one's own machine, else what it is logged in with."""
        return given if given is not None or self.store.public else hub.resolve_token()

    def _order(
        self, form: RunForm, config: RunConfig, token: str | None, client: Client
    ) -> tuple[Order, str]:
        """Where the run is to be done, and on which device. Raises QuantkitError when it cannot be
        done there.
        """
        executor, machine = _place(form, config)
        if executor.is_remote:
            executor.check(token)
            plan = self._plan(config, token, client)
            offer = choose(executor.offers(plan, token), machine)
            return offer.order, offer.device
        try:
            found = self._plan(config, token, client)
        except CutOff:  # it says nothing against the run
            if self.store.public:
                raise
            return Order(executor.name), config.device
        why_not = self._why_not_here(found)
        if why_not:
            raise QuantkitError(
                f"The run is too large for this machine. {why_not}",
                "Choose " + "".join(f"a {e.noun}, or " for e in self.remote) + "a smaller model.",
            )
        needs = found.estimates
        return Order(
            executor.name, estimate_seconds=needs.seconds, stage_seconds=needs.by_stage
        ), config.device

    def estimate(
        self, form: RunForm, token: str | None, client: Client
    ) -> tuple[Plan, list[Offer], Offer | None]:
        """Return the planner's answer, the machines elsewhere that the run fits on, and the one of
        them that the form wants. Raises QuantkitError.
        """
        config = to_config(form, self.store.public)
        _place(form, config)  # what is refused, at once
        plan = self._plan(config, token, client)
        return plan, *self._offers(form, config, plan, token)

    def _offers(
        self, form: RunForm, config: RunConfig, plan: Plan, token: str | None
    ) -> tuple[list[Offer], Offer | None]:
        """The machines elsewhere that a run fits on, and the one that the form wants: None for
        this machine. Raises QuantkitError where there is no such one.
        """
        wanted, machine = _place(form, config)
        offered: list[Offer] = []
        chosen = None
        for executor in self.remote if config.model != DEMO_MODEL else ():
            try:
                found = executor.offers(plan, token)
                offered += found
                if executor is wanted:
                    chosen = choose(found, machine)
            except QuantkitError:
                if wanted.is_remote:
                    raise
        return offered, chosen

    def _plan(
        self, config: RunConfig, token: str | None, client: Client, looked: Looked | None = None
    ) -> Plan:
        return estimate(config, token, self.store.public, client.counted_as, looked)

    def _why_not_here(self, plan: Plan) -> str:
        return LOCAL.why_not(plan, self.store.root, self.store.limits.seconds)

    def preview(self, form: RunForm, token: str, client: Client) -> Iterator[Shown]:
        """Yield what the run would take, as HTML: that it is looked at, if the model is not known
        yet, first facts, and all of it when it is known.

        Empty when no model was named yet.
        """
        if not str(form.model or "").strip():
            yield Shown("")
            return
        try:
            secret = checked_token(token)
            forms = _one_each(form)
            if len(forms) > 1:
                yield from self._preview_of_many(forms, secret, client)
                return
            config = to_config(form, self.store.public)
            _place(form, config)  # what Start refuses
            if not known_times(RunConfig(config.model, config.revision), secret):
                yield Shown(previews.looking(config.model))
            for first in self._first_facts(config, secret, client):
                known = known_times(config, secret)
                takes = {name: previews.takes(times.seconds) for name, times in known.items()}
                yield Shown(previews.looked_at(first), takes=takes)
            yield self._preview(form, config, secret, client)
        except QuantkitError as error:
            yield Shown(self.notice(error), isinstance(error, NeedsToken))
        except Exception:
            logger.exception("a preview failed")
            yield Shown(view.notice(_BUG, _BUG_REMEDY))

    def _preview_of_many(
        self, forms: Sequence[RunForm], token: str | None, client: Client
    ) -> Iterator[Shown]:
        """A line for every model, as they become known."""
        rows: list[previews.Planned] = []
        wants_token = False
        yield Shown(previews.of_many(rows, len(forms)))
        for form in forms:
            try:
                config = to_config(form, self.store.public)
                _place(form, config)
                for _ in self._first_facts(config, token, client):
                    pass
                plan = self._plan(config, token, client)
                _, chosen = self._offers(form, config, plan, token)
                why_not = "" if chosen else self._why_not_here(plan)
                rows.append(previews.Planned(form.model, plan, why_not, chosen))
            except QuantkitError as error:
                wants_token |= isinstance(error, NeedsToken)
                said = f"{error.message} {self.page.remedy(error)}".strip()
                rows.append(previews.Planned(form.model, None, said))
            yield Shown(previews.of_many(rows, len(forms) - len(rows)), wants_token)

    def _first_facts(
        self, config: RunConfig, token: str | None, client: Client
    ) -> Iterator[FirstLook]:
        """What is known while the planner is at work; ends when it has ended."""
        if known_plan(config, token) is not None:
            return
        self.allow("preview", client)
        told: queue.SimpleQueue[FirstLook | None] = queue.SimpleQueue()
        if config.model == DEMO_MODEL:
            told.put(DEMO)
        failed: list[Exception] = []

        def plan() -> None:
            try:
                self._plan(config, token, client, told.put)
            except Exception as error:  # told to whoever waits
                failed.append(error)
            finally:
                told.put(None)

        threading.Thread(target=plan, name="preview", daemon=True).start()
        while (first := told.get()) is not None:
            yield first
        if failed:
            raise failed[0]

    def _preview(
        self, form: RunForm, config: RunConfig, token: str | None, client: Client
    ) -> Shown:
        plan = self._plan(config, token, client)
        offered, chosen = self._offers(form, config, plan, token)
        contexts = (t.n_context for t in config.targets if t.n_context)
        html = previews.preview(
            plan,
            context=next(contexts, None),
            here="This Space" if self.on_space else "This machine",
            why_not=self._why_not_here(plan),
            offers=offered,
            chosen=chosen,
            published=(config.publish, form.visibility) if config.publish else None,
        )
        takes = _takes(plan, *_place(form, config), token)
        return Shown(html, machines=tuple(previews.machine_choices(offered)), takes=takes)

    def search(self, text: str, client: Client) -> list[str]:
        """Return the names of models for what was typed so far; empty when the Hub does not
        answer.
        """
        text = text.strip()
        if len(text) < 2 or "://" in text or time.monotonic() < self._no_search_until:
            return []
        if text[0] in "/.~" or text.lower().startswith("demo:"):
            return []
        try:
            self.allow("search", client)
        except QuantkitError:
            return []
        try:
            return [hit.id for hit in hub.search_models(text, limit=10)]
        except QuantkitError:
            self._no_search_until = time.monotonic() + _SEARCH_PAUSE
            return []


def _place(form: RunForm, config: RunConfig) -> tuple[Executor, str]:
    """Where the form wants the run to be done. Raises UsageError where that is not possible."""
    executor, machine = registry.asked(check_machine(form.machine))
    if executor.is_remote and config.model == DEMO_MODEL:
        raise UsageError("The demo's model is only on this machine.", "Run it here.")
    if lacks := executor.lacks():
        raise UsageError(*lacks)
    return executor, machine


def _takes(plan: Plan, place: Executor, machine: str, token: str | None) -> dict[str, str]:
    """What the run takes there with every profile, those left out that do not fit. Each may have
    another machine, so it is told with its price.
    """
    found: dict[str, str] = {}
    for name, times in plan.profiles.items():
        if not place.is_remote:
            found[name] = previews.takes(times.seconds)
            continue
        needs = dataclasses.replace(
            plan.estimates, cpu=times.cpu, gpu=times.gpu, seconds=times.seconds
        )
        try:
            offers = place.offers(dataclasses.replace(plan, estimates=needs), token)
            offer = choose(offers, machine)
            found[name] = previews.takes(offer.seconds, offer.usd)
        except QuantkitError:
            continue
    return found


def known(owner: str | None) -> str:
    """Return the visitor. Raises QuantkitError for a browser that sends no cookie."""
    if owner is None:
        raise QuantkitError(
            "This browser keeps no cookies, so its runs could not be found again.",
            "Allow cookies for this page and reload it.",
        )
    return owner


def checked_token(token: Any) -> str | None:
    """Return a token as typed; None for none. Raises QuantkitError without repeating it."""
    if not token:
        return None
    text = token.strip() if isinstance(token, str) else ""
    if not text or len(text) > _MAX_TOKEN or not text.isascii() or not text.isprintable():
        raise QuantkitError(
            "That is not a token.", "Copy it again from your Hugging Face settings."
        )
    return text


def _one_each(form: RunForm) -> list[RunForm]:
    """A form for every model that this one names."""
    names = models_of(form.model)
    if len(names) > 1 and form.publish:
        raise UsageError(
            "Several models cannot be published to one repository.",
            "Leave the repository empty, and publish each from its own page.",
        )
    return [dataclasses.replace(form, model=name) for name in names]
