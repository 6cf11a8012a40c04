"""What the page's events do: plain methods of `Desk`, between Gradio's values and the job store."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from quantkit import hub
from quantkit.errors import QuantkitError
from quantkit.launch import JobForm, JobStore, JobView, check_repo, estimate, to_config
from quantkit.web import results, view
from quantkit.web.visitor import Visitors

logger = logging.getLogger(__name__)

# The parts of a job's page that are sent only when they changed, in the order of the outputs.
CHUNKS = ("head", "stages", "curve", "files", "results", "card", "log", "raw")
SWITCHES = ("can_cancel", "can_resume", "can_delete", "can_publish", "has_card", "is_there")
_MAX_TOKEN = 500
_SEARCH_PAUSE = 60.0  # seconds without asking a Hub that did not answer
_BUG = "Something went wrong here."
_BUG_REMEDY = "Try again; if it stays, report it with the server's log."


class Desk:
    """Handlers. `owner` is the visitor that the server made sure of, never what a page claims."""

    def __init__(self, store: JobStore, visitors: Visitors, on_space: bool, sign_in: bool) -> None:
        self.store = store
        self.visitors = visitors
        self.on_space = on_space
        self.sign_in = sign_in  # whether a Hub user can sign in, and has to before a run
        self._no_search_until = 0.0

    def owner(self, cookies: Mapping[str, Any], username: str | None) -> str | None:
        """Who is asking; None for a visitor without a cookie."""
        if username is not None:
            return f"hf:{username}"
        visitor = self.visitors.of_cookies(cookies)
        return None if visitor is None else f"visitor:{visitor}"

    # Forms.

    def start(self, form: JobForm, token: str, owner: str | None, username: str | None) -> str:
        """Queue the run that the form asks for. Returns its id. Raises QuantkitError."""
        if self.sign_in and username is None:
            raise QuantkitError("You are not signed in.", "Sign in with Hugging Face first.")
        config = to_config(form, self.store.public)
        return self.store.submit(config, known(owner), checked_token(token))

    def preview(self, form: JobForm, token: str) -> str:
        """What the run would take, as HTML."""
        return answered(
            lambda: results.preview(
                estimate(
                    to_config(form, self.store.public), checked_token(token), self.store.public
                )
            )
        )

    def search(self, text: str) -> list[str]:
        """Names of models for what was typed so far; empty when the Hub does not answer."""
        text = text.strip()
        if len(text) < 2 or "://" in text or time.monotonic() < self._no_search_until:
            return []
        if text[0] in "/.~" or text.lower().startswith("demo:"):
            return []
        try:
            return [hit.id for hit in hub.search_models(text, limit=10)]
        except QuantkitError:
            self._no_search_until = time.monotonic() + _SEARCH_PAUSE
            return []

    # A job.

    def act(self, action: str, job_id: Any, owner: str | None, token: str = "") -> str:
        """Cancel, resume or delete. Returns a notice as HTML, empty when it worked."""

        def do() -> str:
            if action == "cancel":
                self.store.cancel(job_id, owner)
            elif action == "resume":
                self.store.resume(job_id, owner, checked_token(token))
            elif action == "delete":
                self.store.delete(job_id, owner)
            return ""

        return answered(do)

    def publish(self, job_id: Any, repo: str, private: bool, owner: str | None, token: str) -> str:
        """Queue the upload of a validated run. Returns a notice as HTML."""

        def do() -> str:
            checked = checked_token(token)
            self.store.publish(job_id, owner, check_repo(repo), private is True, checked)
            return view.notice("The upload is on its way.", "Its progress is above.", "info")

        return answered(do)

    # What is shown.

    def shown(self, job_id: Any, owner: str | None) -> dict[str, Any]:
        """Every part of a job's page by name: HTML, Markdown or whether a control is there."""
        try:
            job = self.store.view(job_id, owner)
            raw = self.store.log_tail(job_id, owner)
        except QuantkitError as error:
            nothing: dict[str, Any] = dict.fromkeys((*CHUNKS, *SWITCHES), "")
            lost = view.notice(error.message, error.remedy)
            return {**nothing, **dict.fromkeys(SWITCHES, False), "head": lost}
        return {
            **_rendered(job),
            "raw": view.raw_log(raw),
            "can_cancel": job.can_cancel,
            "can_resume": job.can_resume,
            "can_delete": job.can_delete,
            "can_publish": job.can_publish,
            "has_card": bool(job.card),
            "is_there": True,
        }

    def job_list(self, owner: str | None) -> str:
        return answered(lambda: view.job_list(self.store.jobs(owner)))


def _rendered(job: JobView) -> dict[str, Any]:
    return {
        "head": view.head(job),
        "stages": view.stages(job),
        "curve": view.curve(job),
        "files": view.files(job),
        "results": results.results(job),
        "card": view.card(job),
        "log": view.log(job),
    }


def known(owner: str | None) -> str:
    """The visitor. Raises QuantkitError for a browser that sends no cookie."""
    if owner is None:
        raise QuantkitError(
            "This browser keeps no cookies, so its runs could not be found again.",
            "Allow cookies for this page and reload it.",
        )
    return owner


def checked_token(token: Any) -> str | None:
    """A token as typed; None for none. Raises QuantkitError without repeating it."""
    if not token:
        return None
    text = token.strip() if isinstance(token, str) else ""
    if not text or len(text) > _MAX_TOKEN or not text.isascii() or not text.isprintable():
        raise QuantkitError(
            "That is not a token.", "Copy it again from your Hugging Face settings."
        )
    return text


def answered(action: Callable[[], str]) -> str:
    """The action's HTML, or what went wrong as a notice: a page never shows a traceback."""
    try:
        return action()
    except QuantkitError as error:
        return view.notice(error.message, error.remedy)
    except Exception:
        logger.exception("a page event failed")
        return view.notice(_BUG, _BUG_REMEDY)
