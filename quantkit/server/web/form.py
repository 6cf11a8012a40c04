"""The form: what to make, how large, with how much work, and where. One id and one click are
enough.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gradio as gr

from quantkit.config import DEMO_MODEL
from quantkit.config.devices import DEVICES
from quantkit.ggml.types import QUANTIZED, STOCK_MIXES
from quantkit.machine.kind import uses_gpu
from quantkit.server.executors.registry import AUTO, HERE
from quantkit.server.runs.request import CALIBRATION_TEXTS, FAMILIES, RunForm
from quantkit.server.web.events import asked, growing, quietly
from quantkit.server.web.form_handlers import Client
from quantkit.server.web.handlers import Handlers
from quantkit.tensors import METHODS

_SUGGESTIONS: list[Any] = [
    ("demo:smollm2-135m (small, needs no network)", DEMO_MODEL),
    "HuggingFaceTB/SmolLM2-360M-Instruct",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "meta-llama/Llama-3.2-1B-Instruct",
]
_KINDS = [
    ("Fits what I have", "fits"),
    ("Same size as a standard quant", "like"),
    ("File size", "size"),
    ("Bits per weight", "bpw"),
    ("Several sizes", "family"),
]
# What stands in the field once the fingers rest (the event's own text can be an earlier one), and
# nothing for the keys before the last.
_TYPED = (
    "async () => { const key = window.qkKey = (window.qkKey || 0) + 1;"
    " await new Promise((done) => setTimeout(done, 250));"
    " return key === window.qkKey ? document.querySelector('#model input').value : '' }"
)
# The same for fields whose every key would ask the Hub: once the fingers rest, another word.
_SETTLED = (
    "async (before) => { const key = window.qkKeys = (window.qkKeys || 0) + 1;"
    " await new Promise((done) => setTimeout(done, 700));"
    " return key === window.qkKeys ? String(Date.now()) : before }"
)
# What was said of the choice before this one.
_CLEARED = "() => ({ __type__: 'update', value: '', visible: false })"
_ANY_MACHINE = [("the cheapest that finishes within 8 hours", AUTO)]
_USUAL = "standard"
_PROFILES = [
    ("Demo: a try, with the least work", "demo"),
    ("Quick look", "fast"),
    ("Standard (recommended)", "standard"),
    ("Best: much more work, for a file with many users", "thorough"),
]
_OWN_TEXT = (
    '<div class="qk-own"><label for="own-text">Text of your own</label>'
    '<p id="own-text-help" class="qk-help">A text file like what the model will be used for, at'
    " most 4 MB. It is kept with the run and deleted with it.</p>"
    '<input type="file" id="own-text" aria-describedby="own-text-help own-text-said">'
    '<p id="own-text-said" role="status"></p></div>'
)
_NO_PLAN = (
    '<div class="qk-preview qk-empty"><p>What it takes</p>'
    "<p>Choose a model: its sizes, time and price appear here.</p></div>"
)
_CONTEXTS = [2048, 4096, 8192, 16384, 32768, 65536, 131072]


class Form:
    """The form's components, made where the page is being laid out."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers
        with gr.Row(elem_classes="qk-new"):
            with gr.Column(scale=6, min_width=320):
                self._ask()
            with gr.Column(scale=5, min_width=320, elem_id="beside"):
                self._beside()
        self._wire()

    def _ask(self) -> None:
        handlers = self._handlers
        places = "." if handlers.store.public else ", or the path of a folder."
        self.model = gr.Dropdown(
            _SUGGESTIONS,
            value=None,
            label="Model",
            info=f"Type to search the Hugging Face Hub, or paste an id or address{places}"
            " Several ids, with commas between, are one run each.",
            allow_custom_value=True,
            elem_id="model",
        )
        self.typed = gr.Textbox(visible=False, max_length=200)
        self._size()
        self.profile = gr.Radio(
            profiles({}),
            value=_USUAL,
            label="Quality",
            info="More work makes a better file of the same size.",
            elem_id="profile",
            elem_classes="qk-stack",
        )
        self.chosen = gr.Textbox("", visible=False, max_length=10)  # as `suited` has it
        self._where()
        self._advanced()
        self._publish()

    def _beside(self) -> None:
        """The button, what is in its way, and what the choice comes to: one column, in sight. The
        button is the first, for what is above it moves it while somebody aims.
        """
        with gr.Row(elem_classes="qk-buttons"):
            self.start_button = gr.Button("Start", variant="primary", elem_id="start")
        self.error = gr.HTML(visible=False, elem_id="form-error")
        self.plan = gr.HTML(_NO_PLAN, elem_id="plan")
        self.token = token_field(
            "For gated and private models, to publish, and for what runs elsewhere, in your"
            " account. Never stored.",
            "token",
        )
        # Changes once who types a token or a revision has stopped.
        self.settled = gr.Textbox(visible="hidden", max_length=30, elem_id="settled")

    def _size(self) -> None:
        self.kind = gr.Radio(
            _KINDS, value="like", label="How big should the file be?", elem_id="size-kind"
        )
        self.like = gr.Dropdown(
            STOCK_MIXES,
            value="Q4_K_M",
            label="Type",
            info="No larger than llama.cpp's own file of this type.",
            elem_id="like",
        )
        self.devices = gr.CheckboxGroup(
            [(device.title, name) for name, device in DEVICES.items()],
            value=[],
            label="What should it run on?",
            info="The largest file that fits beside its context. For several, one run makes all.",
            visible=False,
            elem_id="devices",
        )
        with gr.Row(visible=False, elem_id="fits") as self.fits:
            self.memory = gr.Textbox(
                label="Other memory",
                info="What is free, for file and context: an 8 GB card has about 7.",
                placeholder="7GB",
                max_length=30,
                elem_id="memory",
            )
            self.context = gr.Dropdown(
                [(f"{n:,} tokens", n) for n in _CONTEXTS],
                value=8192,
                label="Context",
                info="Conversation length that has to fit.",
                elem_id="context",
            )
        self.size = gr.Textbox(
            label="File size",
            placeholder="5.5GB",
            info="Of the whole file, such as 90MB, 5.5GB or 5GiB.",
            visible=False,
            max_length=30,
            elem_id="size",
        )
        self.bpw = gr.Number(
            4.5,
            label="Bits per weight",
            info="Average over the whole file and all parameters.",
            step=0.1,
            visible=False,
            elem_id="bpw",
        )
        self.family = gr.CheckboxGroup(
            list(FAMILIES["whole"]),
            value=list(FAMILIES["everyday"]),
            label="Sizes",
            info="One run makes a file for each, no larger than llama.cpp's own file of that type.",
            visible=False,
            elem_id="family",
        )

    def _where(self) -> None:
        here = "On this Space, free" if self._handlers.on_space else "On this machine"
        if self._handlers.on_space and uses_gpu(os.environ):
            here += ", on its GPU"
        self.where = gr.Radio(
            [(here, HERE), *((e.title, e.name) for e in self._handlers.remote)],
            value=HERE,
            label="Where?",
            visible=bool(self._handlers.remote),
            elem_id="where",
            elem_classes="qk-stack",
        )
        self.machine = gr.Dropdown(
            _ANY_MACHINE,
            value=AUTO,
            label="Machine",
            info="All that the run fits on, with its time and price there.",
            visible=False,
            allow_custom_value=True,
            elem_id="machine",
        )

    def _advanced(self) -> None:
        with gr.Accordion("Advanced", open=False, elem_id="advanced"):
            self.revision = gr.Textbox(
                label="Revision",
                info="Branch, tag or commit. Empty: main.",
                max_length=200,
                elem_id="revision",
            )
            self.levels = gr.Dropdown(
                [qtype.name for qtype in sorted(QUANTIZED)],
                value=[],
                multiselect=True,
                label="Levels",
                info="Tensor types to choose from. Empty: those of the profile.",
            )
            self.prefer = gr.Radio(
                [("quality for the size", "quality"), ("speed on a CPU", "speed")],
                value="quality",
                label="Prefer",
                info="Below 4 bits the best types answer at half the speed of others on a CPU.",
            )
            self.equalize = gr.Checkbox(
                label="Equalize channels",
                info="Outliers cost less; adapters of the original do not fit the file.",
                elem_id="equalize",
            )
            self.methods = gr.CheckboxGroup(
                list(METHODS),
                value=list(METHODS),
                label="Methods",
                info="Quantization methods that compete for every tensor.",
            )
            self.calibration = gr.Textbox(
                "auto",
                label="Calibration text",
                info=f"name[:weight], … of {', '.join(CALIBRATION_TEXTS)}.",
                max_length=300,
            )
            self.compare = gr.Textbox(
                label="Compare with",
                info="GGUFs of others, measured beside yours: repositories or files on the Hub.",
                placeholder="bartowski/Qwen_Qwen3-0.6B-GGUF",
                max_length=2000,
                elem_id="compare-with",
            )
            gr.HTML(_OWN_TEXT)
            self.own_text = gr.Textbox(visible="hidden", max_length=30, elem_id="own-text-id")
            self.types = gr.Textbox(
                label="Pinned types",
                info="JSON of tensor patterns to types. The search leaves these tensors alone.",
                placeholder='{"token_embd": "Q8_0", "ffn_down": "Q6_K"}',
                lines=2,
                max_length=10_000,
            )
            self.seed = gr.Number(
                0, label="Seed", info="The same seed gives the same file.", precision=0
            )
            has_gpu = uses_gpu(os.environ)
            self.device = gr.Radio(
                ["cpu", "cuda"],
                value="cuda" if has_gpu else "cpu",
                label="Device",
                info="The device that the model runs on.",
                visible=has_gpu,
            )

    def _publish(self) -> None:
        with gr.Accordion("Publish to the Hub", open=False, elem_id="publish-form"):
            self.repo = gr.Textbox(
                label="Repository",
                placeholder="you/my-model-GGUF",
                info="Optional. Without one nothing is uploaded; you can also publish later.",
                max_length=200,
            )
            self.visibility = visibility("visible-to")

    @property
    def _by_name(self) -> dict[str, gr.components.Component]:
        """The inputs by the names of `RunForm`; where and on which machine are one thing there."""
        return {
            **{"model": self.model, "size_kind": self.kind, "like": self.like, "size": self.size},
            **{"bpw": self.bpw, "devices": self.devices, "memory": self.memory},
            **{"context": self.context},
            **{"family": self.family, "profile": self.profile},
            **{"where": self.where, "machine": self.machine},
            **{"revision": self.revision, "levels": self.levels, "prefer": self.prefer},
            **{"equalize": self.equalize, "methods": self.methods},
            **{"compare": self.compare, "own_text": self.own_text},
            **{"calibration": self.calibration, "types": self.types, "seed": self.seed},
            **{"device": self.device, "publish": self.repo, "visibility": self.visibility},
        }

    @property
    def fields(self) -> list[gr.components.Component]:
        """The inputs, in the order of `read`. The token comes last."""
        return [*self._by_name.values(), self.token]

    def filled(self, form: RunForm) -> list[Any]:
        """Return updates of `fields` that fill in a form; no token. Without a device it is this
        machine's.
        """
        where, colon, machine = form.machine.partition(":")
        given = {**vars(form), "where": where, "machine": machine or AUTO}
        given["device"] = form.device or self.device.value
        return [*(gr.update(value=_plain(given[name])) for name in self._by_name), gr.skip()]

    def read(self, values: Sequence[Any]) -> RunForm:
        """Return the form's values without the token, as a run is started with them."""
        given = dict(zip(self._by_name, values, strict=True))
        where, machine = given.pop("where"), given.pop("machine")
        given["context"] = _number(given["context"])
        given["machine"] = HERE if where == HERE else f"{where}:{machine or AUTO}"
        return RunForm(**given)

    def _wire(self) -> None:
        handlers = self._handlers

        def sizes(kind: str) -> list[Any]:
            return [gr.update(visible=kind == name) for name, made in by_kind.items() for _ in made]

        def search(client: Client, token: str, typed: object) -> Any:
            found = handlers.search(str(typed)[:100], client)
            return gr.update(choices=found) if found else gr.skip()

        def preview(client: Client, token: str, *values: Any) -> Iterator[Any]:
            *fields, typed = values
            form = self.read(fields)
            for shown in handlers.preview(form, token or typed, client):
                elsewhere = form.machine != HERE
                wanted = bool(shown.wants_token or typed or form.publish or elsewhere)
                yield [
                    shown.html or _NO_PLAN,
                    gr.update(visible=wanted and not handlers.sign_in),
                    gr.update(choices=[*_ANY_MACHINE, *shown.machines]),
                    gr.update(choices=profiles(shown.takes)),
                ]

        by_kind: dict[str, list[gr.components.Component | gr.Row]] = {
            **{"like": [self.like], "fits": [self.devices, self.fits], "size": [self.size]},
            **{"bpw": [self.bpw], "family": [self.family]},
        }
        quietly(self.kind.change, sizes, self.kind, [x for made in by_kind.values() for x in made])
        quietly(
            self.where.change,
            lambda where: gr.update(visible=where != HERE),
            self.where,
            self.machine,
        )
        preselected = [self.profile, self.chosen]
        quietly(self.model.input, suited, [self.model, *preselected], preselected)
        quietly(self.profile.input, lambda: "hand", None, self.chosen)
        self.model.key_up(
            asked(handlers, search),
            self.typed,
            self.model,
            js=_TYPED,
            trigger_mode="always_last",
            show_progress="hidden",
            concurrency_limit=4,
            api_visibility="private",
        )
        shown: list[Any] = [self.model, self.kind, self.like, self.size, self.bpw, self.memory]
        shown += [self.devices, self.context, self.family, self.profile, self.where, self.machine]
        shown += [
            self.levels,
            self.prefer,
            self.equalize,
            self.types,
            self.visibility,
            self.settled,
        ]
        changed = [field.input for field in self.fields if hasattr(field, "input")]
        gr.on(changed, None, None, self.error, js=_CLEARED, api_visibility="private")
        for typed in (self.token, self.revision, self.repo):
            typed.change(None, self.settled, self.settled, js=_SETTLED, api_visibility="private")
        gr.on(
            [component.change for component in shown],
            growing(handlers, preview),
            self.fields,
            [self.plan, self.token, self.machine, self.profile],
            trigger_mode="always_last",
            concurrency_limit=16,  # more than may wait (previews.turns): the rest is told at once
            concurrency_id="preview",
            show_progress="hidden",
            api_visibility="private",
        )


def profiles(takes: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the profiles as choices, with what a run of the model takes where that is known."""
    return [
        (f"{title} · about {takes[name]}" if name in takes else title, name)
        for title, name in _PROFILES
    ]


def suited(model: str | None, profile: str, chosen: str) -> tuple[str, str]:
    """Return the profile that is preselected for a model, and by whom it was `chosen` then: by
    "hand", as the "demo"'s, or, empty, by nobody. What was chosen by hand stays.
    """
    is_demo = str(model or "").strip() == DEMO_MODEL
    if is_demo and profile == _USUAL and not chosen:
        return "demo", "demo"
    if not is_demo and profile == "demo" and chosen == "demo":
        return _USUAL, ""
    return profile, chosen


def token_field(info: str, elem_id: str, visible: bool = False) -> gr.Textbox:
    """Make the field of a token, for who cannot sign in."""
    return gr.Textbox(
        label="Hugging Face token", info=info, type="password", visible=visible, elem_id=elem_id
    )


def visibility(elem_id: str) -> gr.Radio:
    """Make the choice of who can see the published repository."""
    return gr.Radio(
        [
            ("Public, unless the model is private or gated", "model"),
            ("Private", "private"),
            ("Public", "public"),
        ],
        value="model",
        label="Visibility",
        info="The terms of a gated model apply to files made from it: check that they allow this.",
        elem_id=elem_id,
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _number(value: Any) -> int | float:
    """A context as chosen or typed; what is none is refused further on."""
    if isinstance(value, (int, float)):
        return value
    text = str(value or "").replace(",", "").removesuffix("tokens").strip()
    return int(text) if text.isdecimal() and len(text) < 10 else -1
