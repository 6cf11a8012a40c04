"""A result that its owner opened up, all of its files as one archive, and the commands that run it.

pytest tests/server/test_app_share.py
"""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import app_fixtures as fixtures
import pytest
from test_app_browser import browser, open_page, shots  # noqa: F401

from quantkit.run.events import EventLog
from quantkit.server.runs.record import NoSuchRun, load_record
from quantkit.server.runs.store import RunStore
from quantkit.server.web.visitor import COOKIE, Visitors

HOSTILE = "<img src=x onerror=alert(1)>.gguf"


@pytest.fixture
def site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, RunStore, Visitors]]:
    made = fixtures.make_report()
    made["baselines"][0] |= {"kind": "given", "name": HOSTILE}
    made["outputs"][0]["label"] = "Q4_K_M"
    monkeypatch.setattr(fixtures, "make_report", lambda: made)
    with fixtures.serving(tmp_path / "runs", public=True, schedule=False) as served:
        yield served


def own(store: RunStore, visitors: Visitors, name: str = "done") -> tuple[str, str]:
    """A finished run's key and owner."""
    key = visitors.new_key()
    owner = f"visitor:{visitors.check(key)}"
    fixtures.own(fixtures.write_run(store.root / name), owner)
    return key, owner


def share_of(store: RunStore, name: str = "done") -> str:
    record = load_record(store.root / name)
    assert record is not None and record.shared is not None
    return record.shared


def test_a_link_shows_the_result_and_nothing_else(site: tuple[str, RunStore, Visitors]) -> None:
    url, store, visitors = site
    key, owner = own(store, visitors)
    status, headers, _ = fixtures.ask(url, "GET", "/shared/" + "A" * 32)
    assert status == 404 and "script" not in headers["content-security-policy"]
    with pytest.raises(NoSuchRun):
        store.share("done", "visitor:somebody else", True)
    store.share("done", owner, True)
    share = share_of(store)
    assert len(share) == 32

    status, headers, body = fixtures.ask(url, "GET", f"/shared/{share}")
    page = body.decode()
    assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
    assert "set-cookie" not in headers and headers["x-robots-tag"] == "noindex"
    assert "below that of the best llama.cpp file" in page and "By domain" in page
    assert "&lt;img src=x" in page and "<img src=x" not in page and "<script" not in page
    for secret in ("/done/", "job.json", str(store.root), key, "log.txt", "config.json"):
        assert secret not in page, secret
    status, headers, body = fixtures.ask(url, "GET", f"/shared/{share}/{fixtures.GGUF}")
    assert (status, body[:4]) == (200, b"GGUF")
    assert headers["content-disposition"].startswith("attachment")
    for name in ("config.json", "job.json", "..%2Fjob.json", "log.txt", "events.jsonl"):
        assert fixtures.ask(url, "GET", f"/shared/{share}/{name}")[0] == 404, name

    store.share("done", owner, False)
    for path in (f"/shared/{share}", f"/shared/{share}/{fixtures.GGUF}"):
        status, _, body = fixtures.ask(url, "GET", path)
        assert status == 404 and b"leads to no result" in body and b"your list" not in body
    store.share("done", owner, True)
    assert share_of(store) != share, "a link that was closed stays closed"


@pytest.mark.parametrize("is_private", [True, False, None])
def test_a_link_names_a_public_repository_alone(
    site: tuple[str, RunStore, Visitors], is_private: bool | None
) -> None:
    """A private one has the account in its name; what is not known to be public counts as one."""
    url, store, visitors = site
    model = dataclasses.replace(fixtures.CONFIG, model="/home/alice/models/Tiny-Model")
    folder = fixtures.write_run(store.root / "done", model, outcome=None)
    known = {} if is_private is None else {"private": is_private}
    events = EventLog(folder / "events.jsonl")
    events.emit("publish", "finished", url="https://huggingface.co/alice/secret", **known)
    events.emit(None, "finished", "all stages are done")
    owner = f"visitor:{visitors.check(visitors.new_key())}"
    fixtures.own(folder, owner)
    store.share("done", owner, True)
    page = fixtures.ask(url, "GET", f"/shared/{share_of(store)}")[2].decode()
    assert ("hf.co/alice/secret" in page) == (is_private is False)
    assert "<h1>Tiny-Model</h1>" in page and "/home" not in page
    assert store.view("done", owner).published_url, "its owner sees it"


def test_a_run_that_made_nothing_has_no_link(site: tuple[str, RunStore, Visitors]) -> None:
    _, store, visitors = site
    owner = f"visitor:{visitors.check(visitors.new_key())}"
    fixtures.own(fixtures.write_run(store.root / "half", until="search", outcome=None), owner)
    with pytest.raises(Exception, match="no result to share"):
        store.share("half", owner, True)


def test_all_files_come_as_one_archive(site: tuple[str, RunStore, Visitors]) -> None:
    url, store, visitors = site
    key, _ = own(store, visitors)
    cookie = {"Cookie": f"{COOKIE}={key}"}
    status, headers, body = fixtures.ask(url, "GET", "/archive/done", headers=cookie)
    assert status == 200 and "quantkit.zip" in headers["content-disposition"]
    with zipfile.ZipFile(io.BytesIO(body)) as made:
        assert made.testzip() is None
        assert {fixtures.GGUF, "README.md", "report.json"} <= set(made.namelist())
        whole = (store.root / "done" / "7-stitch" / fixtures.GGUF).read_bytes()
        assert made.read(fixtures.GGUF) == whole
    other = {"Cookie": f"{COOKIE}={visitors.new_key()}"}
    assert fixtures.ask(url, "GET", "/archive/done", headers=other)[0] == 404


@pytest.mark.slow
@pytest.mark.browser
def test_the_first_screen_of_a_result(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    """What it is worth, how to run it, and a link that others can open until it is closed."""
    from playwright.sync_api import expect

    with fixtures.serving(tmp_path / "runs", schedule=False) as (url, store, visitors):
        key, _ = own(store, visitors)
        page = open_page(browser, url, key=key)
        page.goto(f"{url}?job=done")
        first = page.locator("#job-results .qk-result")
        expect(first).to_contain_text("below that of the best llama.cpp file")
        expect(first).to_contain_text(f"{store.root}/done")
        page.evaluate("document.execCommand = () => { window.copied = getSelection() + '' }")
        page.evaluate("navigator.clipboard.writeText = (text) => { window.copied = text }")
        page.get_by_role("button", name="Copy the command for llama.cpp").click()
        page.wait_for_function("(window.copied || '').startsWith('llama-server -m ')")
        page.locator(".qk-back a").focus()
        expect(page.get_by_text("Copied", exact=True)).to_have_count(0)
        expect(page.locator(".qk-back a")).to_be_focused()  # the button does not take it back
        assert page.locator("#job-report details:not([open])").count() >= 3
        page.get_by_role("button", name="Share", exact=True).click()
        link = page.locator("#share-link")
        expect(link).to_contain_text(f"{url}shared/")
        phone = open_page(browser, f"{url}?job=done", 390, key=key)
        expect(phone.locator("#share-link")).to_contain_text(f"{url}shared/")
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390
        stranger = open_page(browser, link.inner_text())
        expect(stranger.locator("body")).to_contain_text("smaller (Q4")
        page.get_by_role("button", name="Stop sharing").click()
        expect(link).to_have_count(0)
        stranger.reload()
        expect(stranger.locator("body")).to_contain_text("leads to no result")
