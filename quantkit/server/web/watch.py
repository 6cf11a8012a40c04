"""One run: its head and controls, stages, pictures, files, results, publishing and logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import gradio as gr
from gradio.components.plot import PlotData

from quantkit.errors import QuantkitError
from quantkit.evidence.report.text import CAPTIONS
from quantkit.server.web.charts import PLOTS
from quantkit.server.web.events import asked, growing, quietly, said
from quantkit.server.web.form import token_field, visibility
from quantkit.server.web.form_handlers import Client, checked_token
from quantkit.server.web.handlers import CHUNKS, COLLECTION, SWITCHES, Handlers


class Watch:
    """The components of a run's page, made where the page is being laid out."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers
        gr.HTML('<nav class="qk-back"><a href="./">← Back to all runs</a></nav>')
        self.chunks: dict[str, gr.HTML | gr.Plot | gr.Dropdown | gr.Textbox] = {
            "head": gr.HTML(elem_id="job-head")
        }
        with gr.Row(elem_classes="qk-buttons"):
            self.cancel = gr.Button("Cancel", elem_id="cancel", visible=False, size="sm")
            self.resume = gr.Button(
                "Resume", variant="primary", elem_id="resume", visible=False, size="sm"
            )
            self.open = gr.Button("Share", elem_id="share", visible=False, size="sm")
            self.close = gr.Button("Stop sharing", elem_id="unshare", visible=False, size="sm")
            self.notify = gr.Button(
                "Notify me when it is done", elem_id="notify", visible=False, size="sm"
            )
            self.edit = gr.Button("Edit and start again", elem_id="edit", visible=False, size="sm")
            self.delete = gr.Button("Delete", elem_id="delete", visible=False, size="sm")
        # What was given before is gone: tokens are kept in the worker's environment only.
        self.again = token_field(
            "To resume a run that needs one: for a gated or private model, or to publish.",
            "resume-token",
        )
        with gr.Row(visible=False, elem_classes="qk-confirm", elem_id="confirm") as self.confirm:
            gr.HTML("<p>Permanently delete this run and all its files?</p>")
            self.delete_now = gr.Button(
                "Delete permanently", variant="stop", elem_id="delete-now", size="sm"
            )
            self.keep = gr.Button("Keep the run", elem_id="keep", size="sm")
        self.notice = gr.HTML(visible=False, elem_id="job-notice")
        self._show("stages", "share", "results")
        self._draw("frontier")
        with gr.Column(visible=False, elem_id="talk-area") as self.talk_area:
            with gr.Accordion("Try it", open=False, elem_id="talk"):
                self._talk()
        with gr.Column(visible=False, elem_id="beside-area") as self.beside_area:
            with gr.Accordion("Compare with other GGUFs", open=False, elem_id="beside-others"):
                self.others = gr.Textbox(
                    label="Files or repositories on the Hub",
                    info="Each is downloaded and measured beside the files of this run.",
                    placeholder="bartowski/Qwen_Qwen3-0.6B-GGUF",
                    max_length=2000,
                    elem_id="others",
                )
                self.others_token = token_field(
                    "For a gated or private repository. It is never stored.",
                    "others-token",
                    not self._handlers.sign_in,
                )
                with gr.Row(elem_classes="qk-buttons"):
                    self.measure = gr.Button("Measure them", elem_id="measure", size="sm")
                self.others_notice = gr.HTML(visible=False, elem_id="others-notice")
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
        # Which files there are is known later, and to the page alone: hence the custom value.
        self.chunks["tried"] = self.file = gr.Dropdown(
            [],
            label="File",
            info="The file of this run that answers.",
            visible=False,
            allow_custom_value=True,
            elem_id="talk-file",
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
        self.chunks["repo"] = self.repo = gr.Textbox(
            label="Repository",
            info="Empty: where it was published last, else the model's name with -GGUF, in your"
            " account.",
            placeholder="you/my-model-GGUF",
            max_length=200,
            elem_id="repo",
        )
        self.visibility = visibility("visibility")
        self.token = token_field(
            "With write access. It is never stored.", "publish-token", not self._handlers.sign_in
        )
        self.chunks["collection"] = self.collection = gr.Textbox(
            label="Collection",
            info="Optional. The title of one of yours, created if there is none, or the last part"
            " of any collection's URL.",
            placeholder=COLLECTION,
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
            "can_notify": self.notify,
            "can_open": self.open,
            "can_close": self.close,
            "can_edit": self.edit,
            "can_delete": self.delete,
            "can_compare": self.beside_area,
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
        handlers, store, sent = self._handlers, self._handlers.store, parts[-1]

        def changed(current: str, client: Client, known: Any) -> list[Any]:
            """Update what an action has changed: what somebody typed elsewhere stays."""
            return refresh(current, client.owner, known) or [gr.skip()] * len(parts)

        def acting(action: Callable[[str, str | None, str | None], None]) -> Callable[..., Any]:
            """Return the event of a button: `action(run, owner, token)`, then what is shown."""

            def act(client: Client, token: str, current: str, known: Any, typed: str) -> list[Any]:
                notice = handlers.act(
                    lambda: action(current, client.owner, checked_token(token or typed)), client
                )
                return [said(notice), *changed(current, client, known)]

            return asked(handlers, act)

        def delete(client: Client, token: str, current: str) -> list[Any]:
            notice = handlers.act(lambda: store.delete(current, client.owner), client)
            left = current if notice else ""
            shown = [*opened(left), *refresh(left, client.owner, {})]
            return [left, gr.update(visible=False), said(notice), *shown]

        for button, is_open in ((self.open, True), (self.close, False)):

            def turn(
                client: Client, token: str, current: str, known: Any, is_open: bool = is_open
            ) -> list[Any]:
                said_so = handlers.act(lambda: store.share(current, client.owner, is_open), client)
                return [said(said_so), *changed(current, client, known)]

            quietly(button.click, asked(handlers, turn), [run_id, sent], [self.notice, *parts])
        self.notify.click(None, None, None, js="() => qkNotify()", api_visibility="private")
        given, shown = [run_id, sent, self.again], [self.notice, *parts]
        cancelled = quietly(self.cancel.click, acting(store.cancel), given, shown)
        resumed = quietly(self.resume.click, acting(store.resume), given, shown)
        quietly(resumed.then, lambda: "", None, self.again)
        quietly(self.delete.click, lambda: gr.update(visible=True), None, self.confirm)
        kept = quietly(self.keep.click, lambda: gr.update(visible=False), None, self.confirm)
        for done, to in (
            (cancelled, "#job-head h2"),
            (resumed, "#job-head h2"),
            (kept, "#delete"),
        ):
            done.then(None, None, None, js=f"() => qkFocus('{to}')", api_visibility="private")
        deleted = [run_id, self.confirm, self.notice, *areas, *parts]
        quietly(self.delete_now.click, asked(handlers, delete), run_id, deleted).then(
            None,
            run_id,
            None,
            js="(id) => { if (!id) { history.pushState(null, '', location.pathname);"
            " qkFocus('.qk-header h1') } }",
            api_visibility="private",
        )

        def measure(client: Client, token: str, current: str, *fields: Any) -> list[Any]:
            known, named, typed = fields

            def do() -> str:
                handlers.compare_with(current, named, client, token or typed)
                gr.Info("The comparison is queued.")
                return ""

            told, ok = handlers.told(do)
            return [said(told), "" if ok else gr.skip(), *changed(current, client, known)]

        quietly(
            self.measure.click,
            asked(handlers, measure),
            [run_id, sent, self.others, self.others_token],
            [self.others_notice, self.others_token, *parts],
        )
        self._wire_publish(run_id, parts, changed)
        self._wire_talk(run_id)

    def _wire_publish(
        self, run_id: gr.Textbox, parts: list[Any], changed: Callable[..., list[Any]]
    ) -> None:
        handlers = self._handlers

        def compare(client: Client, token: str, current: str, *fields: str) -> list[Any]:
            repo, seen_by, collection, typed = fields
            found, ok = handlers.told(
                lambda: handlers.compare(current, repo, seen_by, collection, client, token or typed)
            )
            return [said(found), gr.update(visible=ok)]

        def publish(client: Client, token: str, current: str, *fields: Any) -> list[Any]:
            repo, seen_by, collection, typed, known = fields

            def do() -> str:
                handlers.publish(current, repo, seen_by, collection, client, token or typed)
                gr.Info("The upload has started. Its progress is at the top of the page.")
                return ""

            found, ok = handlers.told(do)
            kept = "" if ok else gr.skip()
            shown = changed(current, client, known)
            return [said(found), gr.update(visible=not ok), kept, *shown]

        given = [run_id, self.repo, self.visibility, self.collection, self.token]
        self.compare.click(
            asked(handlers, compare),
            given,
            [self.changes, self.publish],
            show_progress="full",
            show_progress_on=self.changes,
            concurrency_limit=4,
            api_visibility="private",
        )
        quietly(
            self.publish.click,
            asked(handlers, publish),
            [*given, parts[-1]],
            [self.changes, self.publish, self.token, *parts],
        )
        # What was shown is for what was asked: another name has to be looked at again.
        quietly(
            partial(gr.on, [self.repo.input, self.visibility.input, self.collection.input]),
            lambda: [gr.update(visible=False)] * 2,
            None,
            [self.changes, self.publish],
        )

    def _wire_talk(self, run_id: gr.Textbox) -> None:
        handlers = self._handlers

        def answer(trigger: Callable[..., Any], original: bool, box: gr.Textbox) -> Any:
            """Wire one of the two to what was asked: the growing answer, and a notice."""

            def talk(
                client: Client, token: str, current: str, file: str, prompt: str
            ) -> Iterator[Any]:
                label = "The original" if original else file or "This file"
                try:
                    yield gr.update(value="", visible=True, label=label), said("")
                    for text in handlers.talk(current, file, prompt, original, client):
                        yield gr.update(value=text, visible=True), gr.skip()
                except QuantkitError as error:
                    yield gr.skip(), said(handlers.notice(error))

            return trigger(
                growing(handlers, talk),
                [run_id, self.file, self.prompt],
                [box, self.talk_notice],
                concurrency_limit=2,
                concurrency_id="talk",
                show_progress="minimal",
                api_visibility="private",
            )

        answer(self.ask.click, False, self.answer)
        first = answer(self.ask_both.click, False, self.answer)
        answer(first.then, True, self.base_answer)


def short_hash(value: str | bool) -> str:
    """Hash the content of a part, to notice changes; a text, because a script rounds long
    numbers.
    """
    return f"{hash(value):x}"


def updates(
    shown: Mapping[str, str | bool], known: Mapping[str, str], names: Sequence[str]
) -> list[Any]:
    """Return an update for every name: skipped where nothing changed since `known`."""
    changed = {name for name in shown if known.get(name) != short_hash(shown[name])}
    return [_update(name, shown[name]) if name in changed else gr.skip() for name in names]


def _update(name: str, value: str | bool) -> Any:
    if name in ("repo", "collection"):
        return gr.update(value=str(value))
    if name == "tried":  # a name a line
        names = str(value).splitlines()
        return gr.update(choices=names, value=next(iter(names), None), visible=len(names) > 1)
    if name not in PLOTS:
        return gr.update(visible=value) if isinstance(value, bool) else said(value)
    # Vega-Lite's JSON is what Gradio makes of an Altair chart.
    plot = PlotData(type="altair", plot=str(value)) if value else None
    return gr.update(value=plot, visible=plot is not None)
