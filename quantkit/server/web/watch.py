"""One run: its head and controls, stages, pictures, files, results, publishing and logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from gradio.components.plot import PlotData

from quantkit.errors import QuantkitError
from quantkit.evidence.report.text import CAPTIONS
from quantkit.server.web.charts import PLOTS
from quantkit.server.web.form import QUIET, visibility
from quantkit.server.web.handlers import CHUNKS, SWITCHES, Client, Handlers
from quantkit.server.web.view import notice


class Watch:
    """The components of a run's page, made where the page is being laid out."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers
        gr.HTML('<nav class="qk-back"><a href="./">← Back to all runs</a></nav>')
        self.chunks: dict[str, Any] = {"head": gr.HTML(elem_id="job-head")}
        with gr.Row(elem_classes="qk-buttons"):
            self.cancel = gr.Button("Cancel", elem_id="cancel", visible=False, size="sm")
            self.resume = gr.Button(
                "Resume", variant="primary", elem_id="resume", visible=False, size="sm"
            )
            self.delete = gr.Button("Delete", elem_id="delete", visible=False, size="sm")
        # What was given before is gone: tokens are kept in the worker's environment only.
        self.again = gr.Textbox(
            label="Hugging Face token",
            info="To resume a run that needs one: for a gated or private model, or to publish.",
            type="password",
            visible=False,
            elem_id="resume-token",
        )
        with gr.Row(visible=False, elem_classes="qk-confirm", elem_id="confirm") as self.confirm:
            gr.HTML("<p>Permanently delete this run and all its files?</p>")
            self.delete_now = gr.Button(
                "Delete permanently", variant="stop", elem_id="delete-now", size="sm"
            )
            self.keep = gr.Button("Keep the run", elem_id="keep", size="sm")
        self.notice = gr.HTML(visible=False, elem_id="job-notice")
        self._show("stages", "results")
        self._draw("frontier")
        with gr.Column(visible=False, elem_id="talk-area") as self.talk_area:
            with gr.Accordion("Try it", open=False, elem_id="talk"):
                self._talk()
        with gr.Column(visible=False, elem_id="publish-area") as self.publish_area:
            with gr.Accordion("Publish to the Hugging Face Hub", open=False, elem_id="publish-now"):
                self._publish()
        self._show("report", "curve")
        self._draw("domains", "convergence", "tensor-map", "bits-by-kind")
        self._show("files")
        with gr.Accordion("Model card", open=False, elem_id="card", visible=False) as self.card:
            self._show("card")
        with gr.Column(visible=False) as self.logs:
            with gr.Accordion("Log", open=False, elem_id="log"):
                self.chunks["log"] = gr.HTML(elem_id="job-log")
                with gr.Accordion("Raw log", open=False, elem_id="raw"):
                    self.chunks["raw"] = gr.HTML(elem_id="job-raw")

    def _show(self, *names: str) -> None:
        for name in names:
            self.chunks[name] = gr.HTML(elem_id=f"job-{name}", visible=False)

    def _draw(self, *names: str) -> None:
        for name in names:
            self.chunks[name] = gr.Plot(
                label=CAPTIONS[name], elem_id=f"job-{name}", elem_classes="qk-plot", visible=False
            )

    def _talk(self) -> None:
        gr.HTML(
            '<p class="qk-help">Answers have up to 200 tokens and are deterministic: the same'
            " prompt gives the same answer. On a small machine this takes a moment.</p>"
        )
        self.prompt = gr.Textbox(
            label="Prompt",
            placeholder="What is the capital of France?",
            lines=2,
            max_length=4000,
            elem_id="prompt",
        )
        with gr.Row(elem_classes="qk-buttons"):
            self.ask = gr.Button(
                "Ask the quantized model", variant="primary", elem_id="ask", size="sm"
            )
            self.ask_both = gr.Button("Compare with the original", elem_id="ask-both", size="sm")
        with gr.Row(elem_classes="qk-answers"):
            self.answer = gr.Textbox(
                label="This file", lines=4, interactive=False, elem_id="answer", buttons=["copy"]
            )
            self.base_answer = gr.Textbox(
                label="The original",
                lines=4,
                interactive=False,
                visible=False,
                elem_id="base-answer",
                buttons=["copy"],
            )
        self.talk_notice = gr.HTML(visible=False, elem_id="talk-notice")

    def _publish(self) -> None:
        gr.HTML(
            '<p class="qk-help">Uploads the files above: the GGUF, its importance matrix,'
            " recipe, report and model card. Other files in the repository stay.</p>"
        )
        self.repo = gr.Textbox(
            label="Repository", placeholder="you/my-model-GGUF", max_length=200, elem_id="repo"
        )
        self.visibility = visibility("visibility")
        self.token = gr.Textbox(
            label="Hugging Face token",
            info="With write access. It is never stored.",
            type="password",
            visible=not self._handlers.sign_in,
            elem_id="publish-token",
        )
        self.collection = gr.Textbox(
            label="Collection",
            info="Optional: the last part of the collection's URL.",
            placeholder="you/my-models-65f1c3",
            max_length=300,
            elem_id="collection",
        )
        self.changes = gr.HTML(visible=False, elem_id="changes")
        with gr.Row(elem_classes="qk-buttons"):
            self.compare = gr.Button("Preview upload", elem_id="compare", size="sm")
            self.publish = gr.Button(
                "Publish", variant="primary", visible=False, elem_id="publish", size="sm"
            )

    @property
    def outputs(self) -> list[Any]:
        """Components of CHUNKS and SWITCHES, in that order."""
        switches = {
            "can_cancel": self.cancel,
            "can_resume": self.resume,
            "can_delete": self.delete,
            "can_publish": self.publish_area,
            "can_try": self.talk_area,
            "has_card": self.card,
            "is_there": self.logs,
            "may_give_token": self.again,
        }
        return [*(self.chunks[name] for name in CHUNKS), *(switches[name] for name in SWITCHES)]

    def wire(
        self,
        run_id: gr.Textbox,
        parts: list[Any],
        refresh: Callable[..., list[Any]],
        areas: list[Any],
        opened: Callable[[str], list[Any]],
    ) -> None:
        """Connect the buttons. `refresh(run, owner, known)` gives the updates of `parts`."""
        handlers = self._handlers

        def act(action: str, current: str, client: Client, token: str = "") -> list[Any]:
            notice = handlers.act(action, current, client, token)
            return [
                gr.update(value=notice, visible=bool(notice)),
                *refresh(current, client.owner, {}),
            ]

        def cancel(current: str, request: gr.Request, user: gr.OAuthProfile | None) -> list[Any]:
            return act("cancel", current, handlers.client(request, user))

        def resume(
            current: str,
            typed: str,
            request: gr.Request,
            user: gr.OAuthProfile | None,
            oauth: gr.OAuthToken | None,
        ) -> list[Any]:
            token = oauth.token if oauth else typed
            return act("resume", current, handlers.client(request, user), token)

        def delete(current: str, request: gr.Request, user: gr.OAuthProfile | None) -> list[Any]:
            client = handlers.client(request, user)
            notice = handlers.act("delete", current, client)
            left = current if notice else ""
            return [
                left,
                gr.update(visible=False),
                gr.update(value=notice, visible=bool(notice)),
                *opened(left),
                *refresh(left, client.owner, {}),
            ]

        shown = [self.notice, *parts]
        self.cancel.click(cancel, run_id, shown, **QUIET)
        self.resume.click(resume, [run_id, self.again], shown, **QUIET).then(
            lambda: "", None, self.again, **QUIET
        )
        self.delete.click(lambda: gr.update(visible=True), None, self.confirm, **QUIET)
        self.keep.click(lambda: gr.update(visible=False), None, self.confirm, **QUIET)
        self.delete_now.click(
            delete, run_id, [run_id, self.confirm, self.notice, *areas, *parts], **QUIET
        ).then(
            None,
            run_id,
            None,
            js="(id) => { if (!id) history.pushState(null, '', location.pathname) }",
            api_visibility="private",
        )
        self._wire_publish(run_id, parts, refresh)
        self._wire_talk(run_id)

    def _wire_publish(
        self, run_id: gr.Textbox, parts: list[Any], refresh: Callable[..., list[Any]]
    ) -> None:
        handlers = self._handlers

        def compare(
            current: str,
            repo: str,
            seen_by: str,
            typed: str,
            request: gr.Request,
            user: gr.OAuthProfile | None,
            oauth: gr.OAuthToken | None,
        ) -> list[Any]:
            token, client = oauth.token if oauth else typed, handlers.client(request, user)
            found, ok = told(lambda: handlers.compare(current, repo, seen_by, client, token))
            return [gr.update(value=found, visible=True), gr.update(visible=ok)]

        def publish(
            current: str,
            repo: str,
            seen_by: str,
            collection: str,
            typed: str,
            request: gr.Request,
            user: gr.OAuthProfile | None,
            oauth: gr.OAuthToken | None,
        ) -> list[Any]:
            token, client = oauth.token if oauth else typed, handlers.client(request, user)

            def do() -> str:
                handlers.publish(current, repo, seen_by, collection, client, token)
                return notice("The upload has started.", "Its progress is above.", "info")

            said, ok = told(do)
            return [
                gr.update(value=said, visible=True),
                gr.update(visible=not ok),
                "" if ok else gr.skip(),
                *refresh(current, client.owner, {}),
            ]

        inputs = [run_id, self.repo, self.visibility]
        self.compare.click(
            compare,
            [*inputs, self.token],
            [self.changes, self.publish],
            show_progress="full",
            show_progress_on=self.changes,
            concurrency_limit=4,
            api_visibility="private",
        )
        self.publish.click(
            publish,
            [*inputs, self.collection, self.token],
            [self.changes, self.publish, self.token, *parts],
            **QUIET,
        )
        # What was shown is for what was asked: another name has to be looked at again.
        gr.on(
            [self.repo.input, self.visibility.input],
            lambda: [gr.update(visible=False), gr.update(visible=False)],
            None,
            [self.changes, self.publish],
            **QUIET,
        )

    def _wire_talk(self, run_id: gr.Textbox) -> None:
        handlers = self._handlers

        def talk(
            current: str, prompt: str, original: bool, client: Client
        ) -> Iterator[tuple[Any, Any]]:
            """Yield the growing answer and a notice."""
            try:
                yield "", gr.update(visible=False)
                for text in handlers.talk(current, prompt, original, client):
                    yield text, gr.skip()
            except QuantkitError as error:
                yield gr.skip(), gr.update(value=notice(error.message, error.remedy), visible=True)

        def ask(
            current: str, prompt: str, request: gr.Request, user: gr.OAuthProfile | None
        ) -> Iterator[Any]:
            yield from talk(current, prompt, False, handlers.client(request, user))

        def ask_base(
            current: str, prompt: str, request: gr.Request, user: gr.OAuthProfile | None
        ) -> Iterator[Any]:
            for text, said in talk(current, prompt, True, handlers.client(request, user)):
                if isinstance(text, str):
                    text = gr.update(value=text, visible=True)
                yield text, said

        limits: dict[str, Any] = {
            "concurrency_limit": 2,
            "concurrency_id": "talk",
            "show_progress": "minimal",
            "api_visibility": "private",
        }
        inputs = [run_id, self.prompt]
        for button in (self.ask, self.ask_both):
            event = button.click(ask, inputs, [self.answer, self.talk_notice], **limits)
            if button is self.ask_both:
                event.then(ask_base, inputs, [self.base_answer, self.talk_notice], **limits)


def told(action: Callable[[], str]) -> tuple[str, bool]:
    """Return the action's HTML, or what went wrong as a notice; and whether it succeeded."""
    try:
        return action(), True
    except QuantkitError as error:
        return notice(error.message, error.remedy), False


def short_hash(value: Any) -> str:
    """Hash the content of a part, to notice changes; a text, because a script rounds long
    numbers.
    """
    return f"{hash(value):x}"


def updates(shown: dict[str, Any], known: dict[str, str], names: tuple[str, ...]) -> list[Any]:
    """Return an update for every name: skipped where nothing changed since `known`."""
    made: list[Any] = []
    for name in names:
        if name not in shown or known.get(name) == short_hash(shown[name]):
            made.append(gr.skip())
        elif name in SWITCHES:
            made.append(gr.update(visible=shown[name]))
        elif name in PLOTS:
            # Vega-Lite's JSON is what Gradio makes of an Altair chart.
            plot = PlotData(type="altair", plot=shown[name]) if shown[name] else None
            made.append(gr.update(value=plot, visible=plot is not None))
        else:
            made.append(gr.update(value=shown[name], visible=bool(shown[name])))
    return made
