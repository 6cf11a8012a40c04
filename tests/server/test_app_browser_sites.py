"""Another site in a real browser that has the visitor's cookies: it neither reads nor acts.

pytest tests/server/test_app_browser_sites.py -m browser
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import app_fixtures as fixtures
import pytest
from app_fixtures import event_number
from test_app_browser import browser, open_page, pytestmark  # noqa: F401
from test_app_cross_site import digest

ATTACK = """async ([url, remove]) => {
  const said = {};
  const ways = {
    fetched: [url + "gradio_api/run/predict", {method: "POST", body: remove}],
    typed: [url + "gradio_api/run/predict",
            {method: "POST", body: remove, headers: {"Content-Type": "application/json"}}],
    blind: [url + "gradio_api/run/predict", {method: "POST", body: remove, mode: "no-cors"}],
    token: [url + "session", {}],
    config: [url + "config", {}],
    queued: [url + "gradio_api/queue/join", {method: "POST", body: remove}],
    started: [url + "gradio_api/call/v2/start_job",
              {method: "POST", body: '{"model": "demo:smollm2-135m"}'}],
  };
  for (const [name, [there, how]] of Object.entries(ways))
    said[name] = await fetch(there, {credentials: "include", ...how})
      .then(async a => a.type + " " + a.status + " " + await a.text(), e => "blocked");
  const form = document.createElement("form");
  Object.assign(form, {method: "POST", enctype: "text/plain", target: "into",
                       action: url + "gradio_api/run/predict"});
  const field = document.createElement("input");
  field.name = remove.slice(0, -2) + ', "x": "'; field.value = '"}';
  form.append(field);
  const frame = document.createElement("iframe");
  frame.name = "into";
  document.body.append(form, frame);
  form.submit();
  const image = new Image(), script = document.createElement("script");
  image.src = url + "logout"; script.src = url + "config";
  document.body.append(image, script);
  const framed = document.createElement("iframe");
  framed.src = url; framed.name = "framed";
  document.body.append(framed);
  await new Promise(done => setTimeout(done, 1500));
  return said;
}"""


class Elsewhere(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><body>another site</body>")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def elsewhere() -> Iterator[int]:
    """The port of a server of somebody else's on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.1", "evil.localhost"])
def test_another_site(browser: Any, tmp_path: Path, elsewhere: int, host: str) -> None:  # noqa: F811
    """On another port the browser sends the cookies along: to it that is the same site."""
    from playwright.sync_api import expect

    with fixtures.serving(tmp_path / "runs", public=True, schedule=False) as (url, store, visitors):
        key = visitors.new_key()
        fixtures.own(fixtures.write_run(store.root / "hers"), f"visitor:{visitors.check(key)}")
        page = open_page(browser, url, key=key)
        expect(page.locator("#runs .qk-jobs li")).to_have_count(1)
        before = digest(store.root)
        number, _ = event_number(url, "delete-now")
        remove = f'{{"data": ["hers"], "fn_index": {number}, "session_hash": "x"}}'
        evil = page.context.new_page()
        evil.goto(f"http://{host}:{elsewhere}/")
        said = evil.evaluate(ATTACK, [url, remove])
        assert set(said.values()) == {"blocked"}, said
        framed = evil.frame("framed")
        assert framed is None or "quantkit" not in framed.content()
        assert digest(store.root) == before
        # Her own page still does it, and keeps its token while another tab gets a new cookie.
        page.context.clear_cookies()
        other = page.context.new_page()
        other.goto(url)
        expect(other.locator("#runs")).to_contain_text("No runs yet")
        expect(page.locator("#runs")).to_contain_text("No runs yet")


@pytest.mark.slow
def test_another_name_that_leads_here(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    """The name of a stranger whose address has become this machine's."""
    with fixtures.serving(tmp_path / "runs", schedule=False) as (url, store, _):
        fixtures.write_run(store.root / "local")
        before = digest(store.root)
        name = url.replace("127.0.0.1", "evil.localhost")
        page = browser.new_context().new_page()
        answer = page.goto(name)
        assert answer is not None and answer.status == 421
        asked = "gradio_api/call/v2/start_job"
        status = page.evaluate(
            """async (there) => (await fetch(there, {method: "POST",
            body: '{"model": "/etc"}', headers: {"Content-Type": "application/json",
            "X-Forwarded-Host": "localhost"}})).status""",
            name + asked,
        )
        assert status == 421 and digest(store.root) == before
