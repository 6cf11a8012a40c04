"""One run: its head and controls, stages, pictures, files, results and logs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from quantkit.web.desk import CHUNKS, SWITCHES, Desk
from quantkit.web.form import QUIET


class Watch:
    """The components of a run's page, made where the page is being laid out."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        gr.HTML('<nav class="qk-back"><a href="./">← All runs and a new one</a></nav>')
        self.chunks: dict[str, Any] = {"head": gr.HTML(elem_id="job-head")}
        with gr.Row(elem_classes="qk-buttons"):
            self.cancel = gr.Button("Cancel", elem_id="cancel", visible=False, size="sm")
            self.resume = gr.Button(
                "Resume", variant="primary", elem_id="resume", visible=False, size="sm"
            )
            self.delete = gr.Button("Delete", elem_id="delete", visible=False, size="sm")
        with gr.Row(visible=False, elem_classes="qk-confirm", elem_id="confirm") as self.confirm:
            gr.HTML("<p>Delete this run and all its files for good?</p>")
            self.delete_now = gr.Button(
                "Delete it", variant="stop", elem_id="delete-now", size="sm"
            )
            self.keep = gr.Button("Keep it", elem_id="keep", size="sm")
        self.notice = gr.HTML(visible=False, elem_id="job-notice")
        for name in ("stages", "results", "files", "curve"):
            self.chunks[name] = gr.HTML(elem_id=f"job-{name}", visible=False)
        with gr.Column(visible=False, elem_id="publish-area") as self.publish_area:
            self._publish()
        with gr.Accordion("Model card", open=False, elem_id="card", visible=False) as self.card:
            self.chunks["card"] = gr.Markdown(elem_id="job-card", visible=False)
        with gr.Column(visible=False) as self.logs:
            with gr.Accordion("What happened", open=False, elem_id="log"):
                self.chunks["log"] = gr.HTML(elem_id="job-log")
                with gr.Accordion("Raw output of the worker", open=False, elem_id="raw"):
                    self.chunks["raw"] = gr.HTML(elem_id="job-raw")

    def _publish(self) -> None:
        with gr.Accordion("Publish to the Hugging Face Hub", open=False, elem_id="publish-now"):
            gr.HTML(
                '<p class="qk-help">Uploads the files above: the GGUF, its importance matrix,'
                " recipe, report and model card. Other files in the repository stay.</p>"
            )
            self.repo = gr.Textbox(
                label="Repository", placeholder="you/my-model-GGUF", max_length=200, elem_id="repo"
            )
            self.private = gr.Checkbox(False, label="Private repository")
            self.token = gr.Textbox(
                label="Hugging Face token",
                info="With write access. It is never written down.",
                type="password",
                visible=not self._desk.sign_in,
            )
            self.publish = gr.Button("Publish", variant="primary", elem_id="publish")

    @property
    def outputs(self) -> list[Any]:
        """Components of CHUNKS and SWITCHES, in that order."""
        switches = {
            "can_cancel": self.cancel,
            "can_resume": self.resume,
            "can_delete": self.delete,
            "can_publish": self.publish_area,
            "has_card": self.card,
            "is_there": self.logs,
        }
        return [*(self.chunks[name] for name in CHUNKS), *(switches[name] for name in SWITCHES)]

    def wire(
        self,
        job_id: gr.Textbox,
        parts: list[Any],
        refresh: Callable[..., list[Any]],
        areas: list[Any],
        opened: Callable[[str], list[Any]],
    ) -> None:
        """Connect the buttons. `refresh(job, owner, known)` gives the updates of `parts`."""
        desk = self._desk

        def act(
            action: str, current: str, request: gr.Request, user: gr.OAuthProfile | None, token: str
        ) -> list[Any]:
            owner = desk.owner(request.cookies, user.username if user else None)
            notice = desk.act(action, current, owner, token)
            return [
                gr.update(value=notice, visible=bool(notice)),
                *refresh(current, owner, {}),
            ]

        def cancel(current: str, request: gr.Request, user: gr.OAuthProfile | None) -> list[Any]:
            return act("cancel", current, request, user, "")

        def resume(
            current: str,
            typed: str,
            request: gr.Request,
            user: gr.OAuthProfile | None,
            oauth: gr.OAuthToken | None,
        ) -> list[Any]:
            return act("resume", current, request, user, oauth.token if oauth else typed)

        def delete(current: str, request: gr.Request, user: gr.OAuthProfile | None) -> list[Any]:
            owner = desk.owner(request.cookies, user.username if user else None)
            notice = desk.act("delete", current, owner)
            left = current if notice else ""
            return [
                left,
                gr.update(visible=False),
                gr.update(value=notice, visible=bool(notice)),
                *opened(left),
                *refresh(left, owner, {}),
            ]

        def publish(
            current: str,
            repo: str,
            private: bool,
            typed: str,
            request: gr.Request,
            user: gr.OAuthProfile | None,
            oauth: gr.OAuthToken | None,
        ) -> list[Any]:
            owner = desk.owner(request.cookies, user.username if user else None)
            token = oauth.token if oauth else typed
            notice = desk.publish(current, repo, private, owner, token)
            return [gr.update(value=notice, visible=True), "", *refresh(current, owner, {})]

        shown = [self.notice, *parts]
        self.cancel.click(cancel, job_id, shown, **QUIET)
        self.resume.click(resume, [job_id, self.token], shown, **QUIET)
        self.delete.click(lambda: gr.update(visible=True), None, self.confirm, **QUIET)
        self.keep.click(lambda: gr.update(visible=False), None, self.confirm, **QUIET)
        self.delete_now.click(
            delete, job_id, [job_id, self.confirm, self.notice, *areas, *parts], **QUIET
        ).then(
            None,
            job_id,
            None,
            js="(id) => { if (!id) history.pushState(null, '', location.pathname) }",
            api_visibility="private",
        )
        self.publish.click(
            publish,
            [job_id, self.repo, self.private, self.token],
            [self.notice, self.token, *parts],
            **QUIET,
        )


def updates(shown: dict[str, Any], known: dict[str, int], names: tuple[str, ...]) -> list[Any]:
    """An update for every name: skipped where nothing changed since `known`."""
    made: list[Any] = []
    for name in names:
        if name not in shown or known.get(name) == hash(shown[name]):
            made.append(gr.skip())
        elif name in SWITCHES:
            made.append(gr.update(visible=shown[name]))
        else:
            made.append(gr.update(value=shown[name], visible=bool(shown[name])))
    return made
