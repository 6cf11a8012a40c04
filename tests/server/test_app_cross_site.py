"""Another site, another name, another caller: nobody acts with a visitor's cookies but the page.

pytest tests/server/test_app_cross_site.py
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import app_fixtures as fixtures
import pytest
from app_fixtures import ask, event_number
from gradio import oauth
from test_space import session

from quantkit.server.runs.store import RunStore
from quantkit.server.web.visitor import COOKIE, TOKEN, Visitors, cookie_name

Site = tuple[str, RunStore, Visitors]
SPACE = "a-b.hf.space"
EVIL = "https://evil.example"
CROSS = {"Origin": EVIL, "Sec-Fetch-Site": "cross-site"}
RUN = "/gradio_api/run/predict"


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A Space with sign-in, and two runs of alice's."""
    root = tmp_path_factory.mktemp("space") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"SYSTEM": "spaces", "SPACE_ID": "a/b", "SPACE_HOST": SPACE}.items():
            patch.setenv(name, value)
        given = {"CLIENT_ID": "id", "CLIENT_SECRET": "secret", "SCOPES": "openid"}
        for name, value in given.items():
            patch.setenv(f"OAUTH_{name}", value)
            patch.setattr(oauth, f"OAUTH_{name}", value)
        patch.setattr("gradio.block_function.spaces", None)  # our folder, not the package
        patch.setattr(oauth, "OPENID_PROVIDER_URL", "http://127.0.0.1:1")
        with fixtures.serving(root, public=True, schedule=False) as served:
            for name in ("hers", "hers2"):
                fixtures.own(fixtures.write_run(root / name), "hf:alice")
            yield served


def hers(site: Site) -> dict[str, str]:
    """What alice's browser adds by itself to every request, whoever's page sends it."""
    _, _, visitors = site
    signed = session("secret", "alice", "hf_aliceSecretToken01", time.time() + 900)
    key = hers_key(visitors)
    return {
        "Host": SPACE,
        "X-Forwarded-Proto": "https",
        "X-Forwarded-For": "203.0.113.9",
        "Cookie": f"{cookie_name(True)}={key}; session={signed}",
    }


def hers_key(visitors: Visitors) -> str:
    visitor = "a" * 24
    return f"{visitor}.{visitors._sign(visitor)}"


def own_page(site: Site) -> dict[str, str]:
    """What her own page sends."""
    token = site[2].page_token("a" * 24)
    return {
        **hers(site),
        "Origin": f"https://{SPACE}",
        "Sec-Fetch-Site": "same-origin",
        TOKEN: token,
    }


def digest(root: Path) -> str:
    # Of runs: the clock lies beside them, and what is being deleted.
    found = sorted(path for path in root.glob("[!.]*/**/*") if path.is_file())
    return hashlib.sha256(b"".join(str(p).encode() + p.read_bytes() for p in found)).hexdigest()


def tick(site: Site, job: str = "") -> dict[str, Any]:
    number, n = event_number(site[0], "", "tick")
    return {"data": [job, {}][:n], "fn_index": number, "session_hash": "x"}


def acts(site: Site) -> list[tuple[str, str, Any]]:
    """Everything that reads or changes something of hers by her cookies."""
    calls: list[tuple[str, str, Any]] = [
        ("POST", RUN, tick(site)),
        ("POST", RUN, tick(site, "hers")),
        ("GET", f"/files/hers/{fixtures.GGUF}", None),
        ("GET", "/session", None),
        ("GET", "/logout", None),
        ("GET", "/gradio_api/queue/data?session_hash=x", None),
        ("POST", "/gradio_api/cancel", {"session_hash": "x", "fn_index": 0, "event_id": "x"}),
        ("POST", "/gradio_api/reset", {"event_id": "x"}),
    ]
    data: dict[str, list[Any]] = {
        "delete-now": ["hers2"],
        "cancel": ["hers"],
        "publish": ["hers", "alice/leaked", "public", "", ""],
    }
    for name, values in data.items():
        number, n = event_number(site[0], name)
        body = {"data": values[:n], "fn_index": number, "session_hash": "x"}
        calls += [("POST", RUN, body), ("POST", "/gradio_api/queue/join", body)]
    start = {"model": "demo:smollm2-135m", "publish": "alice/made", "visibility": "public"}
    calls += [
        ("POST", "/gradio_api/call/v2/start_job", start),
        ("POST", "/gradio_api/call/start_job", {"data": ["demo:smollm2-135m"]}),
        ("POST", "/gradio_api/mcp/", tool("b_start_job", start)),
    ]
    return calls


def tool(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    params = {"name": name, "arguments": arguments}
    return {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}


@pytest.mark.parametrize(
    "sent",
    [
        CROSS,
        {"Origin": EVIL},
        {"Origin": "null", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "same-site", "Origin": "https://evil.hf.space"},
        {"Referer": f"{EVIL}/a-b.hf.space"},
        {"Origin": f"https://{SPACE}.evil.example"},
        {"Origin": f"https://evil.example/{SPACE}"},
        {"Origin": f"https://{SPACE}@evil.example"},
        {"Origin": f"http://{SPACE}"},
        {"Origin": f"https://{SPACE}:8443"},
        {"Origin": "https://huggingface.co", "Sec-Fetch-Site": "cross-site"},
        {"Origin": EVIL, "Host": "evil.example"},
        {"Origin": EVIL, "X-Forwarded-Host": "evil.example"},
        {"Origin": EVIL, "X-HTTP-Method-Override": "GET"},
        {**CROSS, "Content-Type": "text/plain"},
        {**CROSS, "Content-Type": "application/x-www-form-urlencoded"},
    ],
)
def test_another_site_neither_reads_nor_acts(space: Site, sent: dict[str, str]) -> None:
    url, store, _ = space
    before = digest(store.root)
    token = {TOKEN: "0" * 64}
    for method, path, body in acts(space):
        status, headers, said = ask(url, method, path, body, {**hers(space), **token, **sent})
        assert status in (403, 404, 415) and b"\n" not in said, (path, status, said[:200])
        assert "access-control-allow-origin" not in headers
        assert "access-control-allow-credentials" not in headers
    assert digest(store.root) == before


@pytest.mark.parametrize("token", [None, "", "0" * 64, "ä", "of another"])
def test_our_own_origin_is_not_enough(space: Site, token: str | None) -> None:
    """A page of ours that was made to send something has no token of hers."""
    url, store, visitors = space
    before = digest(store.root)
    sent = own_page(space)
    del sent[TOKEN]
    if token is not None:
        sent[TOKEN] = visitors.page_token("b" * 24) if token == "of another" else token
    for method, path, body in acts(space):
        if path.startswith(("/gradio_api/run", "/gradio_api/queue", "/gradio_api/c", "/gradio_a")):
            if "/call/" in path or "/mcp" in path:
                continue  # these do not act by cookies at all
            status, _, said = ask(url, method, path, body, sent)
            assert status == 403 and b"Reload the page" in said, (path, said[:100])
    assert digest(store.root) == before


def test_her_own_page_does_all_of_it(space: Site) -> None:
    url, store, _ = space
    fixtures.own(fixtures.write_run(store.root / "mine"), "hf:alice")
    sent = own_page(space)
    status, headers, said = ask(url, "POST", RUN, tick(space), sent)
    assert status == 200 and b"mine" in said
    assert headers["access-control-allow-origin"] == f"https://{SPACE}"
    assert ask(url, "GET", "/session", None, sent)[2].decode() == sent[TOKEN]
    file = f"/files/mine/{fixtures.GGUF}"
    assert ask(url, "GET", file, None, sent)[0] == 200
    plain = {name: sent[name] for name in sent if name not in ("Origin", "Sec-Fetch-Site")}
    assert b"mine" in ask(url, "POST", RUN, tick(space), plain)[2]  # a browser that tells nothing
    typed = {**hers(space), "Sec-Fetch-Site": "none"}
    assert ask(url, "GET", file, None, typed)[0] == 200
    number, n = event_number(url, "delete-now")
    body = {"data": ["mine"][:n], "fn_index": number, "session_hash": "x"}
    assert ask(url, "POST", RUN, body, sent)[0] == 200
    assert not (store.root / "mine").exists()


def test_a_caller_without_a_browser_has_no_cookies(space: Site) -> None:
    """Neither an endpoint with a key nor one with nothing at all acts as alice."""
    url, store, visitors = space
    before = digest(store.root)
    status, _, said = ask(url, "POST", RUN, tick(space), hers(space))
    assert status == 200 and b"hers" not in said
    keyed = {**own_page(space), "X-Quantkit-Key": visitors.new_key()}
    assert b"hers" not in ask(url, "POST", RUN, tick(space), keyed)[2]
    assert ask(url, "GET", f"/files/hers/{fixtures.GGUF}", None, keyed)[0] == 404
    bearer = {**own_page(space), "Authorization": "Bearer hf_x"}
    assert b"hers" not in ask(url, "POST", RUN, tick(space), bearer)[2]
    for sent in (hers(space), own_page(space)):
        body = {"job_id": "hers"}
        answer = ask(url, "POST", "/gradio_api/call/v2/cancel_job", body, sent)
        event = json.loads(answer[2])["event_id"]
        said = ask(url, "GET", f"/gradio_api/call/cancel_job/{event}", None, sent)[2]
        assert b"event: error" in said and b"No token was sent" in said
        accepts = {**sent, "Accept": "application/json, text/event-stream"}
        said = ask(url, "POST", "/gradio_api/mcp/", tool("b_job_status", body), accepts)[2]
        assert b"There is no such run" in said
    assert digest(store.root) == before


def test_who_may_read_across_origins(space: Site) -> None:
    """The page itself; the Hub only what is told to anybody, and without cookies."""
    url = space[0]
    base = {"Host": SPACE, "X-Forwarded-Proto": "https"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x"}
    for origin, path, allowed in (
        (f"https://{SPACE}", RUN, True),
        (EVIL, RUN, False),
        (EVIL, "/config", False),
        ("null", "/config", False),
        ("https://huggingface.co", RUN, False),
        ("https://huggingface.co.evil.example", "/config", False),
        ("https://other.hf.space", "/config", False),
    ):
        sent = {**base, "Origin": origin}
        status, headers, _ = ask(url, "OPTIONS", path, None, {**sent, **asked})
        assert ("access-control-allow-origin" in headers) == allowed
        assert allowed or status in (403, 405)
        _, headers, _ = ask(url, "GET", "/config", None, sent)
        assert ("access-control-allow-credentials" in headers) == allowed
    _, headers, _ = ask(url, "GET", "/config", None, {**base, "Origin": "https://huggingface.co"})
    assert headers["access-control-allow-origin"] == "https://huggingface.co"
    assert "access-control-allow-credentials" not in headers


def test_the_hub_alone_frames_it(space: Site) -> None:
    _, headers, _ = ask(space[0], "GET", "/", None, {"Host": SPACE})
    ancestors = headers["content-security-policy"].rpartition("frame-ancestors ")[2]
    assert ancestors == "'self' https://huggingface.co"


def test_the_cookie_of_a_space_is_its_own(space: Site) -> None:
    """One that a sibling could set (no __Host-), or one that comes twice, is nobody's."""
    url, _, visitors = space
    base = {"Host": SPACE, "X-Forwarded-Proto": "https", "Sec-Fetch-Site": "none"}
    _, headers, _ = ask(url, "GET", "/", None, base)
    set_cookie = headers["set-cookie"]
    assert set_cookie.startswith(f"__Host-{COOKIE}=") and "Domain" not in set_cookie
    for part in ("Path=/;", "Secure", "HttpOnly", "SameSite=None"):
        assert part in set_cookie
    evil = visitors.new_key()
    for tossed in (
        f"{COOKIE}={evil}",
        f"{cookie_name(True)}={evil}; {cookie_name(True)}={hers_key(visitors)}",
    ):
        sent = {**base, "Cookie": tossed}
        assert "set-cookie" in ask(url, "GET", "/", None, sent)[1]
        assert ask(url, "GET", "/session", None, sent)[2] == b""
    kept = {**base, "Cookie": f"{COOKIE}={evil}; {cookie_name(True)}={hers_key(visitors)}"}
    assert "set-cookie" not in ask(url, "GET", "/", None, kept)[1]
    assert ask(url, "GET", "/session", None, kept)[2] == visitors.page_token("a" * 24).encode()


def test_a_session_is_heard_by_its_visitor_alone(space: Site) -> None:
    """Who knows the name of a visitor's session cannot listen to what it is told."""
    url, _, visitors = space
    number, n = event_number(url, "start")
    form = json.loads(ask(url, "GET", "/config")[2])
    values = {c["id"]: c["props"].get("value") for c in form["components"]}
    inputs = next(d for d in form["dependencies"] if d["id"] == number)["inputs"]
    body = {"data": [values[i] for i in inputs], "fn_index": number, "session_hash": "known"}
    assert len(inputs) == n
    assert ask(url, "POST", "/gradio_api/queue/join", body, own_page(space))[0] == 200
    path = "/gradio_api/queue/data?session_hash=known"
    for stranger in ({"Host": SPACE}, {**own_page(space), "Cookie": "", TOKEN: ""}):
        assert ask(url, "GET", path, None, stranger)[0] == 404
    him = f"{'b' * 24}.{visitors._sign('b' * 24)}"
    sent = {**own_page(space), "Cookie": f"{cookie_name(True)}={him}"}
    assert ask(url, "GET", path, None, {**sent, TOKEN: visitors.page_token("b" * 24)})[0] == 404
    status, _, said = ask(url, "GET", path, None, own_page(space))
    assert status == 200 and b"process_completed" in said


def test_the_way_back_from_the_hub_is_open(space: Site) -> None:
    """A navigation from another site, in the middle of a sign-in."""
    url = space[0]
    sent = {"Host": SPACE, "X-Forwarded-Proto": "https", "Referer": "https://huggingface.co/"}
    sent |= {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    sent |= {"Sec-Fetch-Dest": "document"}
    status, headers, _ = ask(url, "GET", "/login/callback?code=x&state=forged", None, sent)
    assert status == 307 and headers["location"].startswith("/login/huggingface")
    assert ask(url, "GET", "/?job=hers", None, sent)[0] == 200
