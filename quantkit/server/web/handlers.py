"""Handle the events of the page: plain methods of `Handlers`, between Gradio and the run store."""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from quantkit import hub
from quantkit.config import DEMO_MODEL, RunConfig
from quantkit.errors import QuantkitError, UsageError
from quantkit.planning.nouns import Plan
from quantkit.server.executors import registry
from quantkit.server.executors.protocol import Offer, Order, choose
from quantkit.server.executors.registry import LOCAL
from quantkit.server.previews.estimate import Looked, estimate, known_plan
from quantkit.server.previews.first_look import DEMO, FirstLook
from quantkit.server.previews.talk import check_prompt, say
from quantkit.server.runs.adopt import adopt
from quantkit.server.runs.request import (
    RunForm,
    check_collection,
    check_machine,
    check_repo,
    check_visibility,
    to_config,
)
from quantkit.server.runs.store import RunStore
from quantkit.server.web import previews, results, view
from quantkit.server.web.charts import PLOTS
from quantkit.server.web.rate_limit import RateLimit
from quantkit.server.web.visitor import Visitors

logger = logging.getLogger(__name__)

# The parts of a run's page that are sent only when they changed, in the order of the outputs.
CHUNKS = ("head", "stages", "results", "report", "files", "curve", "card", "log", "raw", *PLOTS)
SWITCHES = (
    *("can_cancel", "can_resume", "can_delete", "can_publish", "can_try"),
    *("has_card", "is_there", "may_give_token"),
)
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


class Handlers:
    """Handlers of the page and of the API."""

    def __init__(self, store: RunStore, visitors: Visitors, on_space: bool, sign_in: bool) -> None:
        self.store = store
        self.visitors = visitors
        self.on_space = on_space
        self.sign_in = sign_in  # whether a Hub user can sign in, and has to before a run
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

    # Forms.

    def start(self, form: RunForm, token: str, client: Client) -> str:
        """Queue what the form asks for. Returns the run's id. Raises QuantkitError."""
        if self.sign_in and client.username is None:
            raise QuantkitError("You are not signed in.", "Sign in with Hugging Face first.")
        owner, secret = known(client.owner), checked_token(token)
        config = to_config(form, self.store.public)  # what is wrong is said at once
        self.allow("start", client)
        order, device = self._order(form, config, secret, client)
        config = dataclasses.replace(config, device=device)
        place = self.visitors.place(client.counted_as)
        return self.store.submit(config, owner, secret, order, place)

    def _order(
        self, form: RunForm, config: RunConfig, token: str | None, client: Client
    ) -> tuple[Order, str]:
        """Where the run is to be done, and on which device. Raises QuantkitError when it cannot be
        done there.
        """
        executor, machine = registry.asked(check_machine(form.machine))
        if executor.is_remote:
            if config.model == DEMO_MODEL:
                raise UsageError("The demo's model is only on this machine.", "Run it here.")
            executor.check(token)
            plan = self._plan(config, token, client)
            offer = choose(executor.offers(plan, token), machine)
            return offer.order, offer.device
        # On one's own machine nobody has to wait for a plan.
        found = self._plan(config, token, client) if self.on_space else known_plan(config, token)
        if found is None:
            return Order(executor.name), config.device
        why_not = self._why_not_here(found)
        if why_not and self.store.public:
            raise QuantkitError(
                f"The run is too large for this page. {why_not}",
                "Choose " + "".join(f"a {e.noun}, or " for e in self.remote) + "a smaller model.",
            )
        seconds = found.estimates.seconds
        return Order(executor.name, estimate_seconds=seconds), config.device

    def estimate(self, form: RunForm, token: str | None, client: Client) -> Plan:
        """Return the planner's answer. Raises QuantkitError."""
        return self._plan(to_config(form, self.store.public), token, client)

    def _plan(
        self, config: RunConfig, token: str | None, client: Client, looked: Looked | None = None
    ) -> Plan:
        return estimate(config, token, self.store.public, client.counted_as, looked)

    def _why_not_here(self, plan: Plan) -> str:
        return LOCAL.why_not(plan, self.store.root, self.store.limits.seconds)

    def preview(self, form: RunForm, token: str, client: Client) -> Iterator[str]:
        """Yield what the run would take, as HTML: first facts at once, all of it when it is known.

        Empty when no model was named yet.
        """
        if not str(form.model or "").strip():
            yield ""
            return
        try:
            secret = checked_token(token)
            config = to_config(form, self.store.public)
            if known_plan(config, secret) is None:
                self.allow("preview", client)
                yield from self._first_facts(config, secret, client)
            yield self._preview(form, config, secret, client)
        except QuantkitError as error:
            yield view.notice(error.message, error.remedy)
        except Exception:
            logger.exception("a preview failed")
            yield view.notice(_BUG, _BUG_REMEDY)

    def _first_facts(self, config: RunConfig, token: str | None, client: Client) -> Iterator[str]:
        """What is known while the planner is at work; ends when it has ended."""
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
            yield previews.looked_at(first)
        if failed:
            raise failed[0]

    def _preview(self, form: RunForm, config: RunConfig, token: str | None, client: Client) -> str:
        plan = self._plan(config, token, client)
        offered: list[Offer] = []
        chosen = None
        wanted, machine = registry.asked(check_machine(form.machine))
        for executor in self.remote if config.model != DEMO_MODEL else ():
            try:
                found = executor.offers(plan, token)
                offered += found
                if executor is wanted:
                    chosen = choose(found, machine)
            except QuantkitError as error:
                if wanted.is_remote:
                    return view.notice(error.message, error.remedy)
        contexts = (t.n_context for t in config.targets if t.n_context)
        return previews.preview(
            plan,
            context=next(contexts, None),
            here="This Space" if self.on_space else "This machine",
            why_not=self._why_not_here(plan),
            offers=offered,
            chosen=chosen,
        )

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

    # A run.

    def act(self, action: Callable[[], None], client: Client) -> str:
        """Do something with a run. Returns a notice as HTML, empty when it worked."""

        def do() -> str:
            self.allow("act", client)
            action()
            return ""

        return told(do)[0]

    def compare(self, run_id: Any, repo: str, visibility: str, client: Client, token: str) -> str:
        """Return what publishing would change, as HTML. Raises QuantkitError."""
        visibility = check_visibility(visibility)
        files, places = self.store.staged(run_id, client.owner)
        self.allow("compare", client)
        secret = checked_token(token)
        if secret is None and not self.store.public:
            secret = hub.resolve_token()  # one's own machine is logged in with it
        closed = self.store.closed(run_id, client.owner) if visibility == "model" else ""
        private = bool(closed) or visibility == "private"
        changes = hub.compare(files, places, check_repo(repo), secret, private)
        return previews.changes(changes, closed)

    def publish(
        self, run_id: Any, repo: str, visibility: str, collection: str, client: Client, token: str
    ) -> None:
        """Queue the upload of a validated run. Raises QuantkitError."""
        secret = checked_token(token)  # none on one's own machine: what it is logged in with
        self.allow("publish", client)
        slug, repo = check_collection(collection), check_repo(repo)
        seen_by = check_visibility(visibility)
        self.store.publish(run_id, client.owner, repo, seen_by, secret, slug)

    def talk(self, run_id: Any, prompt: str, original: bool, client: Client) -> Iterator[str]:
        """Yield what the finished file, or the original, answers; it grows. Raise
        QuantkitError.
        """
        text = check_prompt(prompt)
        ours, base = self.store.models(run_id, client.owner)
        path = base if original else ours
        if path is None:
            raise QuantkitError(
                "The original is no longer on this machine."
                if original
                else "The file is not on this machine.",
                "Download the file to try it.",
            )
        self.allow("talk", client)
        yield from say(path, [{"role": "user", "content": text}])

    # What is shown.

    def shown(self, run_id: Any, owner: str | None) -> dict[str, str | bool]:
        """Return every part of a page by name: HTML, a plot as JSON, or whether a control is
        shown.
        """
        try:
            run = self.store.view(run_id, owner)
            raw = self.store.log_tail(run_id, owner)
        except QuantkitError as error:
            lost = view.notice(error.message, error.remedy)
            return {**dict.fromkeys(CHUNKS, ""), **dict.fromkeys(SWITCHES, False), "head": lost}
        return {
            "head": view.head(run),
            "stages": view.stages(run),
            "curve": view.curve(run),
            "files": view.files(run) + view.strip(run),
            "results": results.results(run),
            "report": results.report(run),
            "card": view.card(run),
            "log": view.log(run),
            "raw": view.raw_log(raw),
            **results.plots(run),
            "can_cancel": run.can_cancel,
            "can_resume": run.can_resume,
            "can_delete": run.can_delete,
            "can_publish": run.can_publish,
            "can_try": run.can_try,
            "has_card": bool(run.card),
            "is_there": True,
            "may_give_token": run.can_resume and not self.sign_in,
        }

    def run_list(self, owner: str | None) -> str:
        return told(lambda: view.run_list(self.store.runs(owner)))[0]


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


def told(action: Callable[[], str]) -> tuple[str, bool]:
    """Return the action's text and True, or what went wrong as a notice and False: a page never
    shows a traceback.
    """
    try:
        return action(), True
    except QuantkitError as error:
        return view.notice(error.message, error.remedy), False
    except Exception:
        logger.exception("a page event failed")
        return view.notice(_BUG, _BUG_REMEDY), False
