"""Handle the events of the page: plain methods of `Handlers`, between Gradio and the run store."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from quantkit import hub
from quantkit.errors import NeedsToken, QuantkitError, UsageError
from quantkit.hub.jobs import account
from quantkit.server.previews.talk import check_prompt, say
from quantkit.server.runs import compared
from quantkit.server.runs.again import Again, form_of
from quantkit.server.runs.request import check_collection, check_repo, check_visibility
from quantkit.server.runs.view import DAMAGED, RunView
from quantkit.server.web import previews, results, view
from quantkit.server.web.charts import PLOTS
from quantkit.server.web.form_handlers import Client, FormHandlers, checked_token, known

# The parts of a run's page that are sent only when they changed, in the order of the outputs.
CHUNKS = (
    *("head", "stages", "share", "results", "report", "files", "curve", "card", "log", "raw"),
    *("tried", "repo", "collection", *PLOTS),
)
SWITCHES = (
    *("can_cancel", "can_resume", "can_notify", "can_edit", "can_open", "can_close"),
    *(
        "can_delete",
        "can_compare",
        "can_publish",
        "can_try",
        "has_card",
        "is_there",
        "may_give_token",
    ),
)
COLLECTION = "GGUFs by quantkit"  # what is proposed


class Handlers(FormHandlers):
    """Handlers of the page and of the API."""

    # A run.

    def act(self, action: Callable[[], None], client: Client) -> str:
        """Do something with a run. Returns a notice as HTML, empty when it worked."""

        def do() -> str:
            self.allow("act", client)
            action()
            return ""

        return self.told(do)[0]

    def again(self, run_id: Any, owner: str | None) -> Again:
        """Return the form that starts the same run once more. Raises QuantkitError."""
        return form_of(*self.store.asked(run_id, owner))

    def compare(
        self, run_id: Any, repo: str, visibility: str, collection: str, client: Client, token: str
    ) -> str:
        """Return what publishing would change, as HTML. Raises QuantkitError."""
        visibility, into = check_visibility(visibility), check_collection(collection)
        files, places = self.store.staged(run_id, client.owner)
        self.allow("compare", client)
        secret = self._secret(checked_token(token))
        repo = self.proposed(run_id, repo, secret, client)
        closed = self.store.closed(run_id, client.owner) if visibility == "model" else ""
        private = bool(closed) or visibility == "private"
        changes = hub.compare(files, places, repo, secret, private)
        return previews.changes(changes, closed, into)

    def compare_with(self, run_id: Any, named: str, client: Client, token: str) -> None:
        """Queue the measurement of others' files beside a run's. Raises QuantkitError."""
        names, secret = compared.parse(named), checked_token(token)
        if not names:
            raise UsageError("Name what to compare with.", "Write owner/name of a repository.")
        self.allow("publish", client)
        run = self.store.view(run_id, client.owner)
        sizes = [file.n_bytes for file in run.models]
        files = compared.settle(names, sizes, self._secret(secret))
        self.store.compare(run_id, client.owner, files, secret)

    def proposed(self, run_id: Any, repo: str, secret: str | None, client: Client) -> str:
        """Return the repository as given, else the one of before, else the account's own with the
        model's name. Raises QuantkitError.
        """
        run = self.store.view(run_id, client.owner)
        named = repo if str(repo or "").strip() else run.publish_to
        if named:
            return check_repo(named)
        token = self._secret(secret)
        if client.username is None and token is None:
            raise NeedsToken("Publishing needs a token.", "It needs the permission to write.")
        user = client.username or account(str(token))
        name = view.model_name(run.model).partition("@")[0]
        return check_repo(f"{user}/{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-GGUF")

    def publish(
        self, run_id: Any, repo: str, visibility: str, collection: str, client: Client, token: str
    ) -> None:
        """Queue the upload of a validated run. Raises QuantkitError."""
        secret = checked_token(token)  # none on one's own machine: what it is logged in with
        self.allow("publish", client)
        slug = check_collection(collection)
        repo = self.proposed(run_id, repo, secret, client)
        seen_by = check_visibility(visibility)
        self.store.publish(run_id, client.owner, repo, seen_by, secret, slug)

    def talk(
        self, run_id: Any, file: str, prompt: str, original: bool, client: Client
    ) -> Iterator[str]:
        """Yield what a finished file, the first without a name, or the original answers; it grows.
        Raise QuantkitError.
        """
        text = check_prompt(prompt)
        ours, base = self.store.models(run_id, client.owner, str(file or ""))
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

    def show_runs_of(self, key: Any, client: Client) -> str:
        """Put the runs of an API key into the list of this browser. Returns a notice as HTML.
        Raises QuantkitError.
        """
        self.allow("act", client)
        visitor = self.visitors.check(str(key or "").strip())
        if visitor is None:
            raise UsageError("That is not a key.", "Copy it from the answer of start_job.")
        n = self.store.open_beside(f"visitor:{visitor}", known(client.owner))
        if not n:
            raise UsageError("This key has no runs.", "Start one with it first.")
        runs = "1 run is" if n == 1 else f"{n} runs are"
        return view.notice(f"{runs} in your list.", "Show them again for later ones.", "info")

    # What is shown.

    def shown(self, run_id: Any, owner: str | None) -> dict[str, str | bool]:
        """Return every part of a page by name: HTML, a plot as JSON, or whether a control is
        shown.
        """
        try:
            run = self.page.run_of(self.store.view(run_id, owner))
            raw = self.store.log_tail(run_id, owner)
        except QuantkitError as error:
            lost = self.notice(error)
            return {**dict.fromkeys(CHUNKS, ""), **dict.fromkeys(SWITCHES, False), "head": lost}
        return {
            "head": view.head(run),
            "stages": view.stages(run),
            "curve": view.curve(run),
            "files": view.files(run) + view.strip(run),
            "share": view.share(run),
            "results": results.results(run, paths=self._paths(run, owner)),
            "report": results.report(run),
            "card": view.card(run),
            "log": view.log(run),
            "raw": view.raw_log(raw),
            "tried": "\n".join(run.tried),
            "repo": run.publish_to or "",
            "collection": self._collection(run),
            **results.plots(run),
            "can_cancel": run.can_cancel,
            "can_resume": run.can_resume,
            "can_notify": run.is_active,
            "can_open": run.can_share and not run.shared,
            "can_close": bool(run.shared),
            "can_edit": not run.is_active and run.state != DAMAGED,
            "can_delete": run.can_delete,
            "can_compare": run.can_publish and not run.is_remote and run.has_base,
            "can_publish": run.can_publish,
            "can_try": run.can_try,
            "has_card": bool(run.card),
            "is_there": True,
            "may_give_token": run.can_resume and not self.sign_in and run.wants_token,
        }

    def _collection(self, run: RunView) -> str:
        """The collection that is proposed: for several files one of the account's own. An app that
        people sign in to has no leave to make one.
        """
        return COLLECTION if len(run.models) > 1 and not self.sign_in else ""

    def _paths(self, run: RunView, owner: str | None) -> dict[str, Path]:
        """Where the files of a result lie, for who sits at this machine."""
        if self.store.public or not run.report:
            return {}
        return self.store.result_paths(run.id, owner)

    def run_list(self, owner: str | None) -> str:
        return self.told(lambda: view.run_list(self.store.runs(owner)))[0]
