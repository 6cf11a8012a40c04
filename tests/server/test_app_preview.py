"""The preview, the sizes it knows, where a run may be done, and trying a finished file.

pytest tests/server/test_app_preview.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import app_fixtures as fixtures
import gradio_client
import pytest
from hub_jobs import hardware
from hub_server import HubServer
from huggingface_hub import JobHardwareInfo
from plans import PLAN, ask
from tiny_models import tiny_llama

from quantkit import hub, sandbox
from quantkit.config import DEMO_MODEL, RunConfig
from quantkit.config.budgets import Budget
from quantkit.config.targets import BitsPerWeight, FitsMemory, LikeMix
from quantkit.errors import NeedsToken, QuantkitError
from quantkit.hub import jobs
from quantkit.planning.nouns import Plan
from quantkit.sandbox import api
from quantkit.sandbox.untrusted import build
from quantkit.server.executors import local, registry
from quantkit.server.executors.hf_jobs.executor import HfJobs
from quantkit.server.executors.protocol import choose
from quantkit.server.previews import talk
from quantkit.server.previews.estimate import _key, _Known, _known, estimate
from quantkit.server.previews.sizes import with_sizes
from quantkit.server.runs import compared
from quantkit.server.runs.record import load_record
from quantkit.server.runs.request import RunForm, to_config
from quantkit.server.runs.store import RunStore
from quantkit.server.web import form_handlers as handlers_module
from quantkit.server.web import previews, view
from quantkit.server.web.form import suited
from quantkit.server.web.form_handlers import Client
from quantkit.server.web.handlers import Handlers
from quantkit.server.web.page import build_app
from quantkit.server.web.visitor import COOKIE, Visitors
from quantkit.tensors import to_json

HOSTILE = "<img src=x onerror=alert(1)>\"'&"
ME = Client("visitor:me", None, "1.2.3.4")


@pytest.fixture
def handlers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Handlers]:
    """A handlers whose planner answers PLAN, and whose Hub offers the usual machines."""
    offered = tuple(jobs._machine(JobHardwareInfo(**item)) for item in hardware())
    monkeypatch.setattr(handlers_module, "estimate", lambda config, *_: ask(config))
    monkeypatch.setattr(handlers_module, "known_plan", lambda config, token: ask(config))
    monkeypatch.setattr(jobs, "machines", lambda token: offered)
    fresh = HfJobs()  # which remembers no machines of another test
    monkeypatch.setattr(registry, "HF_JOBS", fresh)
    monkeypatch.setitem(registry.EXECUTORS, "hf_jobs", fresh)
    monkeypatch.setenv("QUANTKIT_WHEEL", "https://example.org/q.whl")
    monkeypatch.setattr(local, "memory_here", lambda environment: 16e9)
    yield Handlers(RunStore(tmp_path / "runs"), Visitors(b"k"), on_space=False, sign_in=False)


def shown(handlers: Handlers, **fields: Any) -> str:
    *_, last = handlers.preview(RunForm("a/b", **fields), "", ME)
    return last.html


def limits(form: RunForm) -> list[int]:
    return [budget.limit_bytes for budget in ask(to_config(form, True)).sizes.budgets]


def test_what_fits_a_memory() -> None:
    form = RunForm("a/b", "fits", memory="1.4GB", context=4096)
    assert to_config(form, True).targets == (FitsMemory("1.4GB@4096"),)
    assert limits(form) == [1_400_000_000 - PLAN.context.n_bytes(4096)]
    assert limits(dataclasses.replace(form, memory="80GB")) == [1_000_000_000]
    with pytest.raises(QuantkitError, match="does not fit in 1 GB with a context of 8,192"):
        limits(dataclasses.replace(form, memory="1GB", context=8192))


def test_what_fits_several_devices() -> None:
    """One size for each, with what else was written; those that hold the largest file are one."""
    form = RunForm("a/b", "fits", devices=("phone-8gb", "gpu-8gb"), memory="1.4", context=4096)
    targets = to_config(form, True).targets
    assert [str(target) for target in targets] == [
        "fits Phone 8 GB with a context of 4,096",
        "fits 8 GB card (RTX 3070, 4060) with a context of 4,096",
        "fits 1.4 with a context of 4,096",
    ]
    assert limits(form) == [1_400_000_000 - PLAN.context.n_bytes(4096), 1_000_000_000]
    with pytest.raises(QuantkitError, match="no device"):
        to_config(dataclasses.replace(form, devices=("toaster",)), True)


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"memory": ""}, "Pick a device"),
        ({"memory": "lots"}, "gpu-12gb, .*mac-16gb"),
        ({"context": 0}, "such as 8192"),
        ({"memory": "8GB@4096"}, "the context has a field of its own"),
    ],
)
def test_what_is_no_memory(fields: dict[str, Any], remedy: str) -> None:
    form = RunForm("a/b", **{"size_kind": "fits", "memory": "8GB", **fields})
    with pytest.raises(QuantkitError) as error:
        to_config(form, True)
    assert re.search(remedy, error.value.remedy)


def test_the_preview_says_where_a_run_is_published(handlers: Handlers) -> None:
    assert "Will be published" not in shown(handlers)
    for seen_by, words in (("public", "public"), ("private", "private")):
        html = shown(handlers, publish="alice/M-GGUF", visibility=seen_by)
        assert f"<dt>Will be published to</dt><dd>alice/M-GGUF ({words})</dd>" in html
    assert "(private: the model is gated)" in shown(handlers, publish="alice/M-GGUF")


def test_the_notice_of_a_form_names_what_is_left_empty() -> None:
    html = view.filled_in(("max_types",), "alice/M-GGUF")
    assert "no field for: max_types." in html and "that run was for alice/M-GGUF" in html
    assert "repository" not in view.filled_in((), None)


def test_a_family_is_one_run_of_several_sizes(handlers: Handlers) -> None:
    mixes = ("Q3_K_M", "Q4_K_M", "Q5_K_M")
    form = RunForm("a/b", "family", family=mixes)
    assert to_config(form, True).targets == tuple(LikeMix(mix) for mix in mixes)
    (job,) = handlers.start(form, "", ME)
    assert handlers.store.view(job, ME.owner).target == "like Q3_K_M, like Q4_K_M, like Q5_K_M"
    shown_all = shown(handlers, size_kind="family", family=mixes)
    assert "3 files: 480.0 MB, 600.0 MB, 700.0 MB" in shown_all
    assert ask(to_config(form, True)).estimates.seconds == 3400 + 2 * 600
    small = dataclasses.replace(PLAN, stock={**PLAN.stock, "Q3_K_M": 10})
    one_less = with_sizes(small, to_config(form, True))
    assert len(one_less.sizes.budgets) == 2
    assert "below the smallest" in one_less.sizes.refused[0].refusal


def test_another_size_is_not_planned_again() -> None:
    config = RunConfig("a/b", targets=(LikeMix("Q4_K_M"),))
    _known[_key(config, None)] = _Known(plan=PLAN)
    try:
        other = dataclasses.replace(config, targets=(BitsPerWeight("4.0"),), seed=5)
        assert estimate(other).sizes.budgets[0].limit_bytes == 500_000_000
        with pytest.raises(QuantkitError, match="below the smallest possible file"):
            estimate(dataclasses.replace(config, targets=(BitsPerWeight("1.0"),)))
        assert _key(config, None) != _key(config, "hf_token"), "what a token sees is its own"
    finally:
        _known.clear()


def test_the_preview_says_what_is_to_be_known(handlers: Handlers) -> None:
    html = shown(handlers)
    assert "Looking at" not in html
    for words in (
        "<dt>Memory needed</dt><dd>at least 5.00 GB",
        *("LlamaForCausalLM", "1B parameters", "mit, gated", "at most 600.0 MB (4.80 bits"),
        "99.9 % of the linear parameters (not token_embd: looked up)",
        *("This machine", "57 min", "free", "Job: cpu-upgrade", "stops after", "Q5_K_M"),
    ):
        assert words in html, words
    away = shown(handlers, machine="a10g-large")
    assert '<tr class="ours"><th scope="row">Job: a10g-large' in away
    assert "8,192 tokens take 1.12 GB" in shown(
        handlers, size_kind="fits", memory="2GB", context=8192
    )
    assert "does not fit on" in shown(handlers, machine="no-such")
    assert next(iter(handlers.preview(RunForm(""), "", ME))).html == ""


def test_levels_that_are_not_made_are_named() -> None:
    page = previews.preview(dataclasses.replace(PLAN, left_out=("Q2_K", "Q3_K")))
    assert "Not made" in page and "Q2_K, Q3_K: no file of the sizes" in page


def test_first_facts_come_before_the_planner(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model is, and no guess of what only the planner knows."""

    def late(*_: Any) -> Plan:
        raise QuantkitError("the planner was asked before the page was told anything")

    monkeypatch.setattr(handlers_module, "known_plan", lambda config, token: None)
    monkeypatch.setattr(handlers_module, "estimate", late)
    form = RunForm("demo:smollm2-135m", "family", family=("Q4_K_M", "Q6_K"))
    told = handlers.preview(form, "", ME)
    assert "Looking at demo:smollm2-135m …" in next(told).html
    first = next(told).html
    for words in ("135M parameters", "apache-2.0", "Working out"):
        assert words in first, words
    assert "about" not in first
    assert "the planner was asked" in next(told).html


def test_a_run_too_large_for_the_page(handlers: Handlers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "memory_here", lambda environment: 4e9)
    assert "too large" in shown(handlers) and "needs about 5.00 GB of memory" in shown(handlers)
    with pytest.raises(QuantkitError, match="too large for this machine.*Choose a Job"):
        handlers.start(RunForm("a/b"), "", ME)


def test_several_models_elsewhere(handlers: Handlers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its machine, time, price and limit, and their sum; what is too large for this
    machine is no matter there.
    """
    monkeypatch.setattr(local, "memory_here", lambda environment: 4e9)
    form = RunForm("a/b, a/c", machine="t4-small")
    *_, last = handlers.preview(form, "", ME)
    offer = choose(
        HfJobs().offers(ask(RunConfig("a/b", targets=(LikeMix("Q4_K_M"),))), None), "t4-small"
    )
    assert last.html.count(f"Job: t4-small (1x T4): ${offer.most_usd:.2f} at most") == 2
    assert last.html.count(f"<td>{previews.usd(offer.usd)}</td>") == 2
    cost, most = previews.usd(2 * offer.usd), 2 * offer.most_usd
    assert f"all at once: together {cost}, ${most:.2f} at most" in last.html
    assert "this machine" not in last.html and len(handlers.start(form, "hf_token", ME)) == 2
    *_, here = handlers.preview(dataclasses.replace(form, machine="here"), "", ME)
    assert here.html.count("needs about 5.00 GB of memory") == 2 and "one after" not in here.html


def test_profiles_elsewhere_have_their_price(handlers: Handlers) -> None:
    """Each may have another machine: a quicker one costs more."""
    *_, here = handlers.preview(RunForm("a/b"), "", ME)
    assert here.takes["standard"] == "57 min"
    *_, away = handlers.preview(RunForm("a/b", machine="auto"), "", ME)
    assert away.takes and all(", $" in said or "under" in said for said in away.takes.values())


def test_the_demo_is_refused_elsewhere_by_the_preview_too(handlers: Handlers) -> None:
    form = RunForm(DEMO_MODEL, machine="auto")
    *_, last = handlers.preview(form, "hf_token", ME)
    assert "only on this machine" in last.html and "parameters" not in last.html
    *_, several = handlers.preview(dataclasses.replace(form, model=f"{DEMO_MODEL}, a/b"), "", ME)
    assert "only on this machine" in several.html and "Job: " in several.html
    with pytest.raises(QuantkitError, match="only on this machine"):
        handlers.start(form, "hf_token", ME)


def test_what_lies_here_is_no_download(handlers: Handlers) -> None:
    assert "Download" in shown(handlers)
    footprint = dataclasses.replace(PLAN.footprint, downloaded=0)
    assert "Download" not in previews.preview(dataclasses.replace(PLAN, footprint=footprint))


def test_the_demo_has_the_least_work_unless_somebody_chose() -> None:
    assert suited(DEMO_MODEL, "standard", "") == ("demo", "demo")
    assert suited("a/b", "demo", "demo") == ("standard", "")
    for profile, chosen in (("standard", "hand"), ("thorough", ""), ("demo", "hand")):
        for model in (DEMO_MODEL, "a/b", None):
            assert suited(model, profile, chosen) == (profile, chosen)


def called(handlers: Handlers, name: str, **given: Any) -> dict[str, Any]:
    """What an endpoint of the API answers to somebody who is not signed in."""
    app = build_app(handlers.store, handlers.visitors)
    (endpoint,) = [f for f in app.fns.values() if f.api_name == name]
    asks = SimpleNamespace(client=None, cookies={}, headers={})
    bound = inspect.signature(endpoint.fn).bind(request=asks, **given)
    bound.apply_defaults()
    return endpoint.fn(*bound.args)


def test_the_api_tells_prices_and_limits(handlers: Handlers) -> None:
    told = called(handlers, "estimate", model="a/b", machine="t4-small")
    offer = told["offer"]
    assert offer in told["offers"] and offer["machine"] == "t4-small"
    assert offer["usd"] == pytest.approx(offer["usd_per_hour"] * offer["seconds"] / 3600, abs=1e-3)
    assert offer["most_usd"] == pytest.approx(offer["usd_per_hour"] * offer["hours"], abs=0.01)
    assert called(handlers, "estimate", model="a/b")["offer"] is None
    token = SimpleNamespace(token="hf_token")
    started = called(handlers, "start_job", model="a/b", machine="t4-small", token=token)
    same = ("machine", "hours", "usd_per_hour", "most_usd")
    assert {n: started[n] for n in same} == {n: offer[n] for n in same}
    here = called(handlers, "start_job", model="a/b")
    assert here["most_usd"] is None and here["machine"] is None


def test_who_is_not_signed_in_is_asked_for_a_token(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a place elsewhere is chosen, and where Start needs one."""
    app = build_app(handlers.store, handlers.visitors)
    ids = {getattr(block, "elem_id", None): block._id for block in app.blocks.values()}
    asks = SimpleNamespace(client=None, cookies={COOKIE: handlers.visitors.new_key()})

    def shows_field(event: tuple[str, str], **fields: Any) -> bool:
        target = (ids[event[0]], event[1])
        (fn,) = [f for f in app.fns.values() if target in f.targets and ids["token"] in outputs(f)]
        values = [
            fields.get(str(block.elem_id), getattr(block, "value", None)) for block in fn.inputs
        ]
        answer = fn.fn(asks, None, None, *values)
        last = list(answer)[-1] if inspect.isgenerator(answer) else answer
        return bool(last[outputs(fn).index(ids["token"])].get("visible"))

    def outputs(fn: Any) -> list[int]:
        return [block._id for block in fn.outputs]

    away = {"model": "a/b", "where": "hf_jobs"}
    assert not shows_field(("model", "change"), model="a/b")
    assert shows_field(("model", "change"), **away) and shows_field(("start", "click"), **away)

    def private(repo: str, token: str | None) -> dict[str, int]:
        raise NeedsToken(f"{repo} is private.")

    monkeypatch.setattr(compared, "gguf_files", private)
    beside = {"model": "a/b", "compare-with": "lab/m-GGUF"}
    assert shows_field(("start", "click"), **beside)


def test_an_order_for_a_job(handlers: Handlers) -> None:
    with pytest.raises(NeedsToken, match="nobody is signed in"):
        handlers.start(RunForm("a/b", machine="auto"), "", ME)
    (run,) = handlers.start(RunForm("a/b", machine="t4-small"), "hf_token", ME)
    record = load_record(handlers.store.root / run)
    assert record is not None and record.machine == "t4-small" and record.hours
    assert record.usd_per_hour == pytest.approx(0.4, rel=0.01) and record.has_token
    assert '"device": "cuda"' in (handlers.store.root / run / "config.json").read_text()
    assert "hf_token" not in "".join(
        path.read_text() for path in (handlers.store.root / run).iterdir()
    )


def test_an_address_of_the_hub_is_a_link_and_no_other(handlers: Handlers) -> None:
    page = f"{hub.endpoint()}/bob/Gated"
    told = handlers.notice(NeedsToken("Gated.", f"Open {page}, not https://evil.example/<b>."))
    assert f'Open <a href="{page}" rel="noopener" target="_blank">{page}</a>, not' in told
    assert told.count("<a ") == 1 and "&lt;b&gt;" in told


def test_all_of_it_is_escaped() -> None:
    plan = dataclasses.replace(
        PLAN,
        model=dataclasses.replace(PLAN.model, architecture=HOSTILE, license=HOSTILE),
        stock={"Q4_K_M": 1},
        sizes=dataclasses.replace(PLAN.sizes, refused=(Budget(HOSTILE, 1, HOSTILE),)),
        warnings=(HOSTILE,),
    )
    html = previews.preview(plan, here=HOSTILE, why_not=HOSTILE)
    assert "onerror" in html and "<img" not in html and "cannot be shown" not in html


@pytest.mark.slow
def test_an_estimate_is_the_plan_in_json(tmp_path: Path) -> None:
    """Of a real planner in its child, with the keys of `quantkit plan --json`."""
    model = str(tiny_llama(tmp_path / "llama"))
    with fixtures.serving(tmp_path / "runs") as (url, _, _):
        client = gradio_client.Client(url, verbose=False)
        told = client.predict(model, like="Q4_K_M", profile="demo", api_name="/estimate")
    plan = build(Plan, told)
    assert told == {**to_json(plan), "offers": [], "offer": None}
    assert [budget.target for budget in plan.sizes.budgets] == ["like Q4_K_M"]
    assert plan.model.n_parameters > 0 and plan.estimates.seconds > 0


# Trying a file.

SAYS = """
import os
def answer(path, messages):
    secret = [n for n in os.environ if n.endswith(("TOKEN", "SECRET"))]
    for text in ("You said ", messages[-1]["content"], f" {secret}"):
        yield text
"""


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Let a stand-in for llama.cpp answer, in the real sandbox."""

    def say(code: str) -> None:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        (folder / "stand_in.py").write_text(code)

        def stream(
            _function: str, arguments: dict[str, Any], shape: Any, **options: Any
        ) -> Iterator[Any]:
            job = sandbox.Job("stand_in:answer", arguments, path=[folder], **options)
            return api.listen(job, "part", shape)

        names = {"Limits": sandbox.Limits, "Crashed": sandbox.Crashed, "stream": stream}
        monkeypatch.setattr(talk, "sandbox", SimpleNamespace(**names))

    monkeypatch.setenv("QUANTKIT_HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OAUTH_CLIENT_SECRET", "secret")
    return say


def test_a_file_answers_without_secrets(
    handlers: Handlers, answering: Callable[[str], None]
) -> None:
    answering(SAYS)
    fixtures.own(fixtures.write_run(handlers.store.root / "done"), ME.owner)
    assert handlers.store.view("done", ME.owner).can_try
    *_, last = handlers.talk("done", "", " hello ", False, ME)
    assert last == "You said hello []"
    with pytest.raises(QuantkitError, match="original is no longer"):
        list(handlers.talk("done", "", "hello", True, ME))
    with pytest.raises(QuantkitError, match="no such run"):
        list(handlers.talk("done", "", "hello", False, Client("visitor:mallory")))
    for prompt in ("", "  ", "x" * 5000, None):
        with pytest.raises(QuantkitError):
            list(handlers.talk("done", "", prompt, False, ME))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import time; time.sleep(600)", "too long"),
        ("yield bytes(1)", "not JSON serializable"),
        ("raise SystemExit(3)", "ended early: 3"),
        ("raise ValueError('a bad template')", "a bad template"),
        ("import os; os.abort()", "crashed .SIGABRT"),
    ],
)
def test_a_file_that_does_not_answer(
    tmp_path: Path,
    answering: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    words: str,
) -> None:
    answering(f"def answer(path, messages):\n    {code}\n    yield 'x'\n")
    monkeypatch.setattr(talk, "_WALL_SECONDS", 1 if "sleep" in code else 600)
    with pytest.raises(QuantkitError, match=words):
        list(talk.say(tmp_path, [{"role": "user", "content": "hello"}]))


@pytest.mark.slow
def test_a_real_file_answers() -> None:
    from quantkit.sources.demo import packaged_gguf

    question = [{"role": "user", "content": "Write one sentence about the sea."}]
    first, second = (list(talk.say(packaged_gguf(), question)) for _ in range(2))
    assert len(first) > 5 and first[-1].strip() and first == second


def test_the_planner_says_that_a_token_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From the process that plans to the page, which asks for it in its own words."""
    with HubServer() as hub:
        files = {"config.json": "{}", "model.safetensors": b"x" * 100}
        hub.add_model("bob/gated", files, gated=True)
        for name, value in {**hub.env, "HF_HOME": str(tmp_path)}.items():
            monkeypatch.setenv(name, value)
        handlers = Handlers(RunStore(tmp_path / "runs"), Visitors(b"k"), False, False)
        *_, last = handlers.preview(RunForm("bob/gated"), "", ME)
        with pytest.raises(NeedsToken):
            handlers.start(RunForm("bob/gated"), "", ME)
    assert last.wants_token and "Agree and access repository" in last.html
    assert "Enter a token of an account that has access." in last.html
    assert "hf auth" not in last.html
