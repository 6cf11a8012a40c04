"""The page: one form, one run to watch, one list. `handlers` does the work."""

from __future__ import annotations

import os
from typing import Any

import gradio as gr
from gradio.utils import get_space

from quantkit.errors import NeedsToken
from quantkit.server.runs.store import RunStore
from quantkit.server.web.api import add_endpoints
from quantkit.server.web.events import asked, quietly, said
from quantkit.server.web.first_run import duplicate, hardware, missing
from quantkit.server.web.form import Form
from quantkit.server.web.form_handlers import Client
from quantkit.server.web.handlers import CHUNKS, SWITCHES, Handlers
from quantkit.server.web.view import filled_in, first_run, notice
from quantkit.server.web.visitor import Visitors
from quantkit.server.web.watch import Watch, short_hash, updates


class Page(gr.Blocks):
    """Gradio prints a traceback for every value that a field cannot have, the value with it: a
    stranger could fill the log's disk. Here it is one sentence for who sent it, and no line.
    """

    async def preprocess_data(self, *args: Any, **options: Any) -> list[Any]:
        """Return the values as the handlers take them. Raises gr.Error."""
        try:
            return await super().preprocess_data(*args, **options)
        except Exception:
            said = "A field of the page cannot have the value that was sent."
            raise gr.Error(said, print_exception=False) from None


_HEADER = """<header class="qk-header"><h1><a href="./">quantkit</a></h1>
<p>Any Hugging Face language model as the best GGUF for its size, with measurements to show it.</p>
</header>"""
_NAMES = (*CHUNKS, *SWITCHES, "runs")
_POLL_SECONDS = 2
# After Start the address names the run, so that a reload finds it again.
_SET_URL = (
    "(id) => { if (id) { history.pushState(null, '', '?job=' + id); scrollTo(0, 0);"
    " qkFocus('#job-head h2') } }"
)
_TO_THE_FORM = (
    "() => { history.pushState(null, '', location.pathname); scrollTo(0, 0);"
    " qkFocus('.qk-header h1') }"
)


def build_app(store: RunStore, visitors: Visitors) -> gr.Blocks:
    """Build the whole page, without starting the scheduler or listening."""
    on_space = get_space() is not None
    sign_in = on_space and bool(os.environ.get("OAUTH_CLIENT_ID"))
    handlers = Handlers(store, visitors, on_space, sign_in)

    def opened(current: str) -> list[Any]:
        """Update which areas are shown: the form and the list, or one run."""
        return [gr.update(visible=v) for v in (not current, bool(current), not current)]

    def refresh(current: str, owner: str | None, known: Any) -> list[Any]:
        """Return updates of everything that changed since `known`, and what is known now.

        Empty when nothing changed.
        """
        shown = handlers.shown(current, owner) if current else {"runs": handlers.run_list(owner)}
        hashes = {name: short_hash(value) for name, value in shown.items()}
        known = known if isinstance(known, dict) else {}
        return [] if hashes == known else [*updates(shown, known, _NAMES), hashes]

    def poll(client: Client, token: str, current: str, known: Any) -> Any:
        return refresh(current, client.owner, known) or gr.skip()

    def load(
        request: gr.Request, user: gr.OAuthProfile | None, oauth: gr.OAuthToken | None
    ) -> list[Any]:
        current = str(request.query_params.get("job", ""))[:100]
        client = handlers.client(request, user)
        handlers.welcome(client, oauth.token if oauth else None)
        return [current, *opened(current), *refresh(current, client.owner, {})]

    with Page(title="quantkit", analytics_enabled=False) as app:
        gr.HTML(_HEADER)
        if lacks := missing(os.environ):
            told = first_run(lacks, hardware(os.environ), duplicate(os.environ))
            gr.HTML(told, elem_id="first-run")
        if sign_in:
            gr.LoginButton(elem_id="sign-in", size="sm")
        # Both in the page and not in the server's session: a tab goes on after the server
        # restarted, and a stranger's sessions take no memory and hold no connection open.
        run_id = gr.Textbox("", visible=False, max_length=100)
        sent = gr.JSON({}, visible=False)  # what this tab shows, as hashes
        # Nothing is visible before `load` says which page it is: no flash of the other one.
        with gr.Column(elem_id="new-run", visible=False) as new_run:
            form = Form(handlers)
        with gr.Column(elem_id="job", visible=False) as run:
            watch = Watch(handlers)
        with gr.Column(elem_id="run-list", visible=False) as run_list:
            runs = gr.HTML(elem_id="runs")
            with gr.Accordion(
                "Runs of an API key", open=False, elem_id="of-key", visible=not sign_in
            ):
                key = gr.Textbox(
                    label="Key",
                    info="As start_job returned it. Its runs then stand in this list, too, and can"
                    " be opened, resumed and published here.",
                    type="password",
                    max_length=200,
                    elem_id="key",
                )
                with gr.Row(elem_classes="qk-buttons"):
                    show_key = gr.Button("Show its runs", elem_id="show-key", size="sm")
                key_notice = gr.HTML(visible=False, elem_id="key-notice")
        areas = [new_run, run, run_list]
        parts = [*watch.outputs, runs, sent]

        def start(client: Client, token: str, *values: Any) -> list[Any]:
            *fields, typed = values
            ids: list[str] = []
            lacking: list[bool] = []  # a token

            def do() -> str:
                try:
                    ids.extend(handlers.start(form.read(fields), token or typed, client))
                except NeedsToken:
                    lacking.append(True)
                    raise
                n = len(ids)
                return notice(f"{n} runs are queued.", "They are below.", "info") if n > 1 else ""

            told, ok = handlers.told(do)
            if not ok:
                asks = bool(lacking) and not sign_in
                field = gr.update(visible=True) if asks else gr.skip()
                return ["", said(told), field, *[gr.skip()] * (len(areas) + len(parts))]
            new = ids[0] if len(ids) == 1 else ""
            return [new, said(told), "", *opened(new), *refresh(new, client.owner, {})]

        quietly(app.load, load, None, [run_id, *areas, *parts])
        quietly(gr.Timer(_POLL_SECONDS).tick, asked(handlers, poll), [run_id, sent], parts)
        form.start_button.click(
            asked(handlers, start),
            form.fields,
            [run_id, form.error, form.token, *areas, *parts],
            show_progress="full",
            show_progress_on=form.start_button,
            concurrency_limit=8,
            api_visibility="private",
        ).then(None, run_id, None, js=_SET_URL, api_visibility="private")
        watch.wire(run_id, parts, refresh, areas, opened)

        def edit(client: Client, token: str, current: str) -> list[Any]:
            """Fill in the form as for this run, and open it."""
            filled: list[Any] = []

            def do() -> str:
                again = handlers.again(current, client.owner)
                filled.extend(form.filled(again.form))
                return filled_in(again.left_out, again.published_to)

            told, ok = handlers.told(do)
            if not ok:
                n = len(areas) + len(form.fields) + len(parts)
                return [current, said(told), gr.skip(), *[gr.skip()] * n]
            shown = [*opened(""), *filled, *refresh("", client.owner, {})]
            return ["", said(""), said(told), *shown]

        quietly(
            watch.edit.click,
            asked(handlers, edit),
            run_id,
            [run_id, watch.notice, form.error, *areas, *form.fields, *parts],
        ).then(None, None, None, js=_TO_THE_FORM, api_visibility="private")

        def show_runs(client: Client, token: str, typed: str, known: Any) -> list[Any]:
            told, _ = handlers.told(lambda: handlers.show_runs_of(typed, client))
            shown = refresh("", client.owner, known) or [gr.skip()] * len(parts)
            return [said(told), "", *shown]

        shown = [key_notice, key, *parts]
        quietly(show_key.click, asked(handlers, show_runs), [key, sent], shown)
        endpoints = add_endpoints(handlers)
    for event in app.fns.values():  # the button to sign in has one that Gradio makes public
        if event.api_name not in endpoints:
            event.api_visibility = "private"
    app.queue(default_concurrency_limit=8, max_size=400)
    return app
