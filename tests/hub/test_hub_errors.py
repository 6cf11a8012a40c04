"""What the Hub may answer, each as one sentence with a remedy; and where tokens go."""

from __future__ import annotations

import email.utils
import logging
import os
import re
import subprocess
import sys
import time
import traceback
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hub_server import ALICE, BOB, SECRETS, HubServer, isolate, look, running_hub
from hub_store import tiny_model
from huggingface_hub import constants

import quantkit.hub.client as hub_client
from quantkit import hub, sources
from quantkit.errors import QuantkitError
from quantkit.hub.client import Asked, call, hf_api


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with running_hub(monkeypatch, tmp_path) as hub_server:
        yield hub_server


@pytest.fixture
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isolate(monkeypatch, tmp_path)


GATED, PRIVATE = {"gated": True}, {"private": True}
ERRORS = [
    ("not found", {}, "alice/none", None, None, "There is no model alice/none.*private.*HF_TOKEN"),
    ("not found, token", {}, "alice/none", BOB, None, "this token does not see it"),
    ("private, anonymous", PRIVATE, "alice/x", None, None, "no token was given"),
    ("private, other's token", PRIVATE, "alice/x", BOB, None, "this token does not see it"),
    ("gated, anonymous", GATED, "alice/x", None, None, "gated.*/alice/x and.*“Agree.*HF_TOKEN"),
    ("gated, not granted", GATED, "alice/x", BOB, None, "gated.*with a token of that account"),
    ("wrong token", {}, "alice/x", SECRETS[3], None, "does not accept this token.*settings/tokens"),
    ("no revision", {}, "alice/x@v9", None, None, "alice/x has no revision v9"),
    ("forbidden", {}, "alice/x", BOB, 403, "This token has no permission to read alice/x"),
    ("payment", {}, "alice/x", BOB, 402, "requires payment"),
    ("limit", {}, "alice/x", None, 429, "rate limit is reached.*a few minutes; with a token"),
    ("broken", {}, "alice/x", None, 500, "problem of its own .status 500"),
    ("down", {}, "alice/x", None, 503, "problem of its own .status 503"),
    ("teapot", {}, "alice/x", None, 418, "refused the request for alice/x .status 418"),
]


@pytest.mark.parametrize("case", ERRORS, ids=[case[0] for case in ERRORS])
def test_error_sentences(server: HubServer, case: tuple, caplog: pytest.LogCaptureFixture) -> None:
    _, flags, text, token, status, sentence = case
    caplog.set_level(logging.DEBUG)
    server.add_model("alice/x", tiny_model(), **flags)
    if status is not None:
        server.fail_next("/api/models/alice/x", status, times=99)
    with pytest.raises(QuantkitError) as caught:
        look(text, token)
    assert re.search(sentence, str(caught.value)), str(caught.value)
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + caplog.text
    assert not any(secret in shown for secret in SECRETS)


def test_the_right_token_opens(server: HubServer) -> None:
    server.add_model("alice/private", tiny_model(), private=True)
    server.add_model("alice/gated", tiny_model(), gated=True).granted.add("bob")
    assert look("alice/private", ALICE).private
    assert look("alice/gated", BOB).gated


@pytest.mark.parametrize(("kind", "word"), [("dataset", "a dataset"), ("space", "a Space")])
def test_other_kinds_of_repository(server: HubServer, kind: str, word: str) -> None:
    server.add_model("alice/x", {"README.md": b""}, kind=kind)
    with pytest.raises(QuantkitError, match=f"alice/x is {word}, not a model"):
        look("alice/x")


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
@pytest.mark.parametrize("path", ["/api/models/", "config.json", "/resolve/.*safetensors"])
def test_passing_trouble_is_retried(server: HubServer, status: int, path: str) -> None:
    server.add_model("alice/x", tiny_model())
    server.fail_next(path, status)
    assert look("alice/x").n_parameters == 156


@pytest.mark.parametrize("path", ["/api/models/", "/resolve/.*config", "/lfs/"])
def test_cut_connections_are_retried(server: HubServer, path: str) -> None:
    server.add_model("alice/x", tiny_model())
    server.cut_next(path, after_bytes=20)
    assert look("alice/x").n_parameters == 156


def test_long_waits_are_reported_not_waited_for(server: HubServer) -> None:
    server.add_model("alice/x", tiny_model())
    server.fail_next("/api/models/", 429, headers={"Retry-After": "77"})
    with pytest.raises(QuantkitError, match="again in 77 seconds"):
        look("alice/x", BOB)
    assert len(server.requests) == 1


SOON = email.utils.format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
WAITS = {
    "a date": ({"Retry-After": SOON}, r"again in (3[0-6]|2\d)\d\d seconds"),
    "a date long ago": ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, "in a few minutes"),
    "a superscript": ({"Retry-After": "\N{SUPERSCRIPT TWO}"}, "in a few minutes"),
    "words": ({"Retry-After": "soon, I hope"}, "in a few minutes"),
    "nothing": ({"Retry-After": ""}, "in a few minutes"),
    "a negative": ({"Retry-After": "-5"}, "in a few minutes"),
    "no day": ({"Retry-After": "Wed, 99 Oct 99999 07:28:00 GMT"}, "in a few minutes"),
    "many digits": ({"Retry-After": "9" * 5000}, "again in 999999999 seconds"),
    "a limit": ({"RateLimit": '"api";r=0;t=55'}, "again in 55 seconds"),
    "a long limit": ({"RateLimit": '"api";r=0;t=7200'}, "again in 7200 seconds"),
    "an odd limit": ({"RateLimit": f'"api";r=0;t={"9" * 5000}'}, "in a few minutes"),
    "an odd policy": (
        {"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": f'"api";q={"9" * 5000};w=9'},
        "in a few minutes",
    ),
}


@pytest.mark.parametrize("case", WAITS)
def test_whatever_an_answer_says_of_waiting(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Also of requests that huggingface_hub repeats by itself: it sleeps no longer than minutes."""
    headers, sentence = WAITS[case]
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    server.add_model("alice/x", tiny_model())
    server.fail_next("/api/models/", 429, times=99, headers=headers)
    with pytest.raises(QuantkitError, match=sentence):
        look("alice/x", BOB)
    server.fail_next("/api/models", 429, times=99, headers=headers)
    with pytest.raises(QuantkitError, match=sentence):
        call(lambda: list(hf_api(BOB).list_models(search="x")), Asked(), BOB, waits=())
    assert len(slept) > 4 and max(slept) <= 301


def test_no_hub_at_all(isolated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(QuantkitError, match="http://127.0.0.1:9 cannot be reached"):
        look("alice/x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(QuantkitError, match="switched off here. Unset HF_HUB_OFFLINE"):
        look("alice/x")


@pytest.mark.parametrize("path", ["/api/models/", "/resolve/"])
def test_a_hub_that_hangs(server: HubServer, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setitem(hub_client._SECONDS, "read", 0.1)
    server.add_model("alice/x", tiny_model())
    server.hang_next(path, 5.0)
    assert look("alice/x").n_parameters == 156
    server.hang_next(path, 5.0, times=9)
    with pytest.raises(QuantkitError, match="did not answer in time"):
        look("alice/x")


def test_a_search_that_hangs(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hub_client._SECONDS, "read", 0.1)
    server.hang_next("/api/models", 5.0, times=99)
    with pytest.raises(QuantkitError, match="did not answer in time"):
        hub.search_models("x")


def test_not_a_hub(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.lfs["x"] = b"<html>welcome to the hotel"
    monkeypatch.setenv("HF_ENDPOINT", server.url("cdn") + "/lfs/x?")
    with pytest.raises(QuantkitError, match="does not answer like the Hub"):
        hub.search_models("x")


# Tokens


def test_whose_token(isolated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.resolve_token() is None
    monkeypatch.setenv("HF_TOKEN", ALICE)
    assert hub.resolve_token() == ALICE
    monkeypatch.setenv("SYSTEM", "spaces")
    assert hub.resolve_token() is None
    monkeypatch.setenv("QUANTKIT_HF_TOKEN", BOB)
    assert hub.resolve_token() == BOB
    monkeypatch.delenv("SYSTEM")
    monkeypatch.setenv("QUANTKIT_HF_TOKEN", "")
    assert hub.resolve_token() is None


def test_anonymous_means_anonymous(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", ALICE)
    server.add_model("alice/x", tiny_model())
    hub.download(look("alice/x"), None)
    assert {request.user for request in server.requests} == {None}


def test_tokens_stay_with_the_hub(server: HubServer, tmp_path: Path) -> None:
    server.add_model("alice/x", tiny_model(), private=True)
    info = look("alice/x", ALICE)
    hub.download(info, ALICE)
    sources.fetch_metadata(info, ALICE, tmp_path / "meta")
    assert {r.user for r in server.requests if r.server == "hub"} == {"alice"}
    assert {r.user for r in server.requests if r.server == "cdn"} == {None}


def test_scrub() -> None:
    text = f"Bearer abc.def {ALICE} hf_oauth_eyJh.x-y_z my-own-secret hf_hub_download"
    assert hub.scrub(text, "my-own-secret") == "Bearer *** *** *** *** hf_hub_download"


def test_a_server_that_echoes_the_token(server: HubServer) -> None:
    server.add_model("alice/x", tiny_model())
    server.fail_next("/api/", 403, times=9, headers={"X-Error-Message": f"{BOB} may not"})
    with pytest.raises(QuantkitError, match=r"\*\*\* may not") as caught:
        look("alice/x", BOB)
    assert BOB not in "".join(traceback.format_exception(caught.value))


def test_a_process_of_its_own(server: HubServer, tmp_path: Path) -> None:
    """As a worker is started: everything by environment; and a preview imports no torch."""
    server.add_model("alice/x", tiny_model(), private=True)
    code = (
        "import sys; from quantkit import hub, sources; "
        "info = sources.inspect(hub.parse_reference('alice/x'), hub.resolve_token()); "
        "print(info.n_parameters, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    env = {**os.environ, **server.env, "SYSTEM": "spaces", "QUANTKIT_HF_TOKEN": ALICE}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["156", "False", "False"], done.stderr
