"""Errors as visitors of a public page and callers of its API read them: they have no terminal, and
callers no browser.

pytest tests/server/test_app_words.py
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import app_fixtures as fixtures
import pytest
from app_fixtures import ask
from gradio.utils import get_function_description
from hub_server import ALICE, SECRETS, HubServer, look, running_hub
from hub_store import tiny_model
from test_app import ENDPOINTS
from test_app_cross_site import SPACE, space, tool  # noqa: F401

from quantkit import hub
from quantkit.config import RunConfig
from quantkit.config.budgets import settle_budgets
from quantkit.config.levels import LEFT_OUT
from quantkit.config.targets import FileSize
from quantkit.errors import NeedsToken, QuantkitError
from quantkit.hub import jobs
from quantkit.hub.upload import _check_privacy
from quantkit.server.runs.request import RunForm
from quantkit.server.runs.store import RunStore
from quantkit.server.web import form_handlers, words
from quantkit.server.web.page import build_app
from quantkit.server.web.visitor import Visitors

TERMINAL = re.compile(r"(?<![\w-])--[a-z]|hf auth|\b[A-Z]{2,}_[A-Z]+|local folder")
KEY = "That is not a key. Give the one that start_job returned."


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with running_hub(monkeypatch, tmp_path) as running:
        running.add_model("alice/gated", tiny_model(), gated=True)
        yield running


def too_large() -> None:
    config = RunConfig("a/b", targets=(FileSize("5GB"),))
    settle_budgets(config, 10**6, lambda _: 0, lambda _: 0, 1000, 2000, 2000)


def offline() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        look("alice/x", None)


def unreachable() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
        patch.setattr("quantkit.hub.client._PATIENT", 0, raising=False)
        look("alice/x", None)


# What a visitor can meet, and what is left to do about it on the page.
MET: dict[str, tuple[Callable[[], Any], str]] = {
    "size": (too_large, "Ask for 1,000 to 2,000 bytes, or allow other types with “Levels”."),
    "public repository": (
        lambda: _check_privacy("me/x", True, False),
        "Choose another name or make it private on the Hub first.",
    ),
    "id": (lambda: hub.parse_reference("a/b/c"), "Write owner/name or a Hub URL."),
    "address": (lambda: hub.parse_reference("https://x.example/a"), "Write owner/name or a Hub"),
    "gated": (lambda: look("alice/gated", None), "Enter a token of an account"),
    "wrong token": (lambda: look("alice/gated", SECRETS[3]), "Enter a token of an account"),
    "missing": (lambda: look("alice/none", None), "Enter a token of an account"),
    "Hub down": (unreachable, "Try again."),
    "offline": (offline, "Whoever runs this server can mend it."),
}


def raised(trouble: Callable[[], Any]) -> QuantkitError:
    with pytest.raises(QuantkitError) as caught:
        trouble()
    return caught.value


def request(**headers: str) -> Any:
    return SimpleNamespace(client=None, cookies={}, headers=headers)


def endpoints(app: Any) -> dict[str, Callable[..., Any]]:
    return {fn.api_name: fn.fn for fn in app.fns.values() if fn.api_name in ENDPOINTS}


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(Exception) as caught:
        call()
    return getattr(caught.value, "message", str(caught.value))


@pytest.mark.parametrize("case", MET)
def test_no_visitor_is_told_of_a_terminal(
    case: str, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble, left = MET[case]
    error = raised(trouble)
    assert TERMINAL.search(error.remedy), "no trouble at all"

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(form_handlers, "estimate", fail)
    store = RunStore(tmp_path / "runs", public=True)
    handlers = form_handlers.FormHandlers(store, Visitors(b"k"), False, False)
    client = form_handlers.Client("visitor:x")
    form = RunForm("a/b", "like", "Q4_K_M")
    shown = list(handlers.preview(form, "", client))[-1].html
    started = handlers.told(
        lambda: str(handlers.start(RunForm("a/b", "like", "Q4_K_M"), "", client))
    )
    called = refusal(
        lambda: endpoints(build_app(store, Visitors(b"k")))["estimate"](request(), "a/b")
    )
    for said in (shown, started[0], called):
        assert not TERMINAL.search(said), said
    assert left in shown and left in started[0] and error.message.split("'")[0] in called
    if isinstance(error, NeedsToken):
        assert "Send a Hub token" in called and "Enter a token" not in called


def test_a_failed_run_is_told_like_any_error(tmp_path: Path) -> None:
    """Also where a run of the command line wrote it down."""
    store = RunStore(tmp_path, public=True)
    visitors = Visitors(b"k")
    key = visitors.new_key()
    owner = f"visitor:{visitors.check(key)}"
    said = ("The disk is full.", "Free some space, or choose another --out.")
    failed = fixtures.write_run(tmp_path / "x", until="fetch", outcome="failed", error=said)
    fixtures.own(failed, owner)
    app = build_app(store, visitors)
    job = endpoints(app)["job_status"](request(), "x", key)
    assert (job["error"], job["remedy"]) == (said[0], "Free some space.")


def test_the_page_itself(tmp_path: Path) -> None:
    app = build_app(RunStore(tmp_path, public=True), Visitors(b"k"))
    shown = [block["props"] for block in app.get_config_file()["components"]]
    texts = [str(props.get(name)) for props in shown for name in ("label", "info", "placeholder")]
    texts += [
        re.sub(r"<(style|script)\b.*?</\1>|style=\"[^\"]*\"", "", str(p.get("value")))
        for p in shown
    ]
    assert not [text for text in texts if TERMINAL.search(text)]


def test_on_ones_own_machine_the_terminal_is_at_hand(tmp_path: Path) -> None:
    page = words.of_page(sign_in=False, public=False)
    error = raised(lambda: hub.parse_reference("a/b/c"))
    assert page.remedy(error) == error.remedy
    assert page.words("Use --levels, or set HF_HOME.") == "Use “Levels”, or set HF_HOME."


def test_what_an_option_is_called(tmp_path: Path) -> None:
    """The fields of the form and the arguments of the API."""
    app = build_app(RunStore(tmp_path), Visitors(b"k"))
    labels = {getattr(block, "label", None) for block in app.blocks.values()}
    assert set(words.FIELDS.values()) <= labels
    takes = inspect.signature(endpoints(app)["start_job"]).parameters
    assert set(words.ARGUMENTS.values()) <= set(takes)
    assert "--" not in LEFT_OUT


def test_the_api_does_not_speak_to_browsers(tmp_path: Path) -> None:
    store, visitors = RunStore(tmp_path, public=True), Visitors(b"k")
    call = endpoints(build_app(store, visitors))
    for name in ENDPOINTS - {"estimate", "start_job", "job_status"}:
        takes_job = ["x"] if name != "list_jobs" else []
        none = refusal(lambda name=name, job=takes_job: call[name](request(), *job))
        assert none.startswith("No key was given. Give the one that start_job"), (name, none)
    assert KEY in refusal(lambda: call["list_jobs"](request(), "wrong"))
    assert KEY in refusal(lambda: call["job_status"](request(), "x", "wrong"))
    unknown = refusal(lambda: call["job_status"](request(), "x", visitors.new_key()))
    assert unknown.endswith("somebody else. list_jobs names yours.")
    # A mistyped key is no new identity.
    at = list(inspect.signature(call["start_job"]).parameters).index("key")
    takes = ["demo:smollm2-135m", *[""] * (at - 2), visitors.new_key()[:-1]]
    takes[2:7] = ["Q4_K_M", 0.0, "demo", "", "auto"]
    assert KEY in refusal(lambda: call["start_job"](request(), *takes))
    assert not list(tmp_path.glob("[!.]*/config.json"))


def test_no_description_of_an_argument_is_cut_off(tmp_path: Path) -> None:
    """Agents read them; Gradio takes one line for each."""
    for name, endpoint in endpoints(build_app(RunStore(tmp_path), Visitors(b"k"))).items():
        _, described, _ = get_function_description(endpoint)
        shown = set(described) - {"request", "user", "token"}
        assert all(described[argument].endswith(".") for argument in shown), (name, described)
        after = (inspect.getdoc(endpoint) or "").partition("Args:\n")[2]
        assert len(after.splitlines()) == len(shown), name


# A Space with sign-in: who calls says so with a token of the Hub.


@pytest.fixture
def alice(monkeypatch: pytest.MonkeyPatch) -> None:
    def account(token: str) -> str:
        assert token == ALICE
        return "alice"

    monkeypatch.setattr(jobs, "account", account)


MCP = {"Accept": "application/json, text/event-stream", "Host": SPACE}


def called(url: str, name: str, body: dict[str, Any], **headers: str) -> str:
    """What an endpoint answers over plain HTTP."""
    sent = {"Host": SPACE, **headers}
    answer = ask(url, "POST", f"/gradio_api/call/v2/{name}", body, sent)[2]
    event = json.loads(answer)["event_id"]
    return ask(url, "GET", f"/gradio_api/call/{name}/{event}", None, sent)[2].decode()


def test_a_token_in_the_header(space: Any, alice: None, caplog: Any) -> None:  # noqa: F811
    url = space[0]
    bearer = {"Authorization": f"Bearer {ALICE}"}
    assert '"hers"' in called(url, "list_jobs", {}, **bearer)
    assert '"hers"' in called(url, "list_jobs", {"oauth_token": ALICE})
    said = ask(url, "POST", "/gradio_api/mcp/", tool("b_list_jobs", {}), MCP | bearer)[2]
    assert b"hers" in said
    assert ALICE not in caplog.text
    for other in ({}, {"Authorization": "Bearer proxys-own"}, {"X-HF-Authorization": "Bearer x"}):
        said = called(url, "list_jobs", {}, **other).encode().decode("unicode_escape")
        assert "No token was sent. Send a Hub token" in said, said
    assert "Send a Hub token" in called(url, "start_job", {"model": "a/b"})


def test_the_tools_of_a_space(space: Any) -> None:  # noqa: F811
    """The documented endpoints, and not what Gradio's button to sign in adds."""
    listing = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
    said = ask(space[0], "POST", "/gradio_api/mcp/", listing, MCP)[2].decode()
    names = set(re.findall(r'"name":\s*"(b_\w+)"', said))
    assert names == {f"b_{name}" for name in ENDPOINTS}
    info = json.loads(ask(space[0], "GET", "/gradio_api/info", None, {"Host": SPACE})[2])
    assert set(info["named_endpoints"]) == {f"/{name}" for name in ENDPOINTS}
