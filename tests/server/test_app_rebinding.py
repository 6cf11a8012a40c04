"""The page of one's own machine: other names, other sites and other ports do not reach it.

pytest tests/server/test_app_rebinding.py
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import app_fixtures as fixtures
import pytest
from app_fixtures import ask
from test_app_cross_site import EVIL, RUN, Site, digest, tick, tool

from quantkit.errors import UsageError
from quantkit.server.web.origin import FROM, Places, counted
from quantkit.server.web.visitor import COOKIE, TOKEN


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """`make app`: the page of one's own machine, with a run of the command line."""
    root = tmp_path_factory.mktemp("private") / "runs"
    with fixtures.serving(root, schedule=False) as served:
        fixtures.write_run(root / "local")
        yield served


def test_a_private_page_goes_by_its_own_names(private: Site) -> None:
    """DNS rebinding: another name that leads here, its page being of the same origin."""
    url, store, _ = private
    port = url.rstrip("/").rpartition(":")[2]
    before = digest(store.root)
    start = {"model": "/etc", "profile": "demo"}
    for host in (
        *(f"evil.example:{port}", "evil.example", f"evil.localhost:{port}", f"localhost.:{port}"),
        *(f"127.0.0.1.evil.example:{port}", "10.0.0.1", f"[fe80::1]:{port}", "a b", "", "x" * 300),
        f"127.0.0.1@evil.example:{port}",
    ):
        sent = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
        sent |= {"X-Forwarded-Host": "localhost", "X-Forwarded-For": "127.0.0.1"}
        for method, path, body in (
            ("GET", "/", None),
            ("GET", "/config", None),
            ("POST", RUN, tick(private)),
            ("POST", "/gradio_api/call/v2/start_job", start),
            ("POST", "/gradio_api/mcp/", tool("start_job", start)),
        ):
            status, _, said = ask(url, method, path, body, sent)
            assert status == 421 and b"\n" not in said, (host, path, status)
    assert digest(store.root) == before
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST"):
        assert ask(url, "GET", "/config", None, {"Host": host})[0] == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_other_sites_do_not_start_runs_on_a_private_page(private: Site, kind: str | None) -> None:
    """Also where no cookie is needed, and other pages of this machine, which share its cookies."""
    url, store, visitors = private
    before = digest(store.root)
    key = visitors.new_key()
    cookie = {"Cookie": f"{COOKIE}={key}"}
    for origin in (EVIL, "http://localhost:3000", "http://127.0.0.1", "null", "file://"):
        sent = {"Origin": origin, **cookie, **({"Content-Type": kind} if kind else {})}
        for path, body in (
            ("/gradio_api/call/v2/start_job", {"model": "demo:smollm2-135m"}),
            ("/gradio_api/mcp/", tool("start_job", {"model": "demo:smollm2-135m"})),
            (RUN, tick(private)),
        ):
            status, headers, _ = ask(url, "POST", path, body, sent)
            assert status == 403 and "access-control-allow-origin" not in headers
    assert digest(store.root) == before


def test_no_other_site_frames_it(private: Site) -> None:
    _, headers, _ = ask(private[0], "GET", "/")
    assert headers["content-security-policy"].endswith("frame-ancestors 'self'")
    assert headers["x-frame-options"] == "SAMEORIGIN"


def test_headers_that_decide_come_once(private: Site) -> None:
    host, port = private[0].removeprefix("http://").rstrip("/").split(":")
    own = f"http://{host}:{port}"
    for twice in (
        f"Host: {host}:{port}\r\nHost: evil.example",
        f"Host: {host}:{port}\r\nOrigin: {own}\r\nOrigin: {EVIL}",
        f"Host: {host}:{port}\r\nSec-Fetch-Site: same-origin\r\nSec-Fetch-Site: cross-site",
        f"Host: {host}:{port}\r\n{TOKEN}: a\r\n{TOKEN}: b",
    ):
        with socket.create_connection((host, int(port)), timeout=120) as connection:
            connection.sendall(f"GET /config HTTP/1.1\r\n{twice}\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 400 ")


def test_names_and_proxies_are_set_by_the_environment() -> None:
    plain = Places.of({}, False)
    assert plain.serves("localhost:1") and plain.serves("127.1.2.3") and plain.serves("[::1]")
    assert not plain.serves("mybox") and not plain.trusts("127.0.0.1")
    named = Places.of({"GRADIO_SERVER_NAME": "192.168.1.5"}, False)
    assert named.serves("192.168.1.5:7860") and not named.serves("192.168.1.6:7860")
    everywhere = Places.of({"GRADIO_SERVER_NAME": "0.0.0.0"}, False)
    assert everywhere.serves("192.168.1.5:7860") and not everywhere.serves("mybox:7860")
    behind = Places.of({"QUANTKIT_HOSTS": "Quant.example.org, mybox:7860"}, False)
    assert behind.serves("quant.example.org") and behind.serves("mybox:7860")
    assert behind.owns("https://quant.example.org", "127.0.0.1:7860")
    assert not behind.owns("https://quant.example.org:444", "127.0.0.1:7860")
    assert behind.trusts("127.0.0.1") and not behind.trusts("10.0.0.1")
    proxied = Places.of({"QUANTKIT_PROXIES": "10.0.0.0/8"}, False)
    assert proxied.trusts("10.1.2.3") and not proxied.trusts("127.0.0.1")
    for wrong in ({"QUANTKIT_HOSTS": "a b"}, {"QUANTKIT_PROXIES": "proxy"}):
        with pytest.raises(UsageError):
            Places.of(wrong, False)


def test_whose_address_is_counted() -> None:
    """A visitor cannot choose it: only the last word of a trusted proxy is taken."""
    plain, on_space = Places.of({}, False), Places.of({}, True)
    forged = {"x-forwarded-for": "1.1.1.1"}
    assert plain.address("127.0.0.1", forged) == "127.0.0.1"
    seen = {"x-forwarded-for": "1.1.1.1, 203.0.113.9"}
    assert on_space.address("10.0.0.1", seen) == "203.0.113.9"
    assert on_space.address("10.0.0.1", {"x-forwarded-for": "1.1.1.1, rubbish"}) == "10.0.0.1"
    passed = {FROM: plain.passed_on("203.0.113.9").decode()}
    assert plain.address("127.0.0.1", passed) == "203.0.113.9"
    assert on_space.address("127.0.0.1", passed) == "127.0.0.1"
    assert counted("2001:db8::1") == counted("2001:db8::ffff") != counted("2001:db8:0:1::1")
    assert counted("::ffff:1.2.3.4") == counted("1.2.3.4")


def test_a_stranger_is_no_proxy(private: Site) -> None:
    """What only a proxy may say changes neither the cookie nor the page's address."""
    sent = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "evil.example"}
    sent |= {"X-Gradio-Server": "https://evil.example", "X-Forwarded-Prefix": "/evil"}
    _, headers, body = ask(private[0], "GET", "/", None, sent)
    assert "__Host-" not in headers["set-cookie"] and b"evil" not in body
    assert b"evil" not in ask(private[0], "GET", "/config", None, sent)[2]


def test_each_of_several_in_one_packet_is_judged(private: Site) -> None:
    host, port = private[0].removeprefix("http://").rstrip("/").split(":")
    head = f" HTTP/1.1\r\nHost: {host}:{port}\r\n"
    evil = f"GET /session{head}Origin: {EVIL}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=120) as connection:
        connection.sendall(f"GET /robots.txt{head}\r\n{evil}".encode())
        said = b""
        while more := connection.recv(65536):
            said += more
    assert said.count(b"HTTP/1.1 200 ") == 1 and said.count(b"HTTP/1.1 403 ") == 1
