"""A calibration text of a visitor's own: taken as text only, kept with the run, deleted with it.

pytest tests/server/test_app_texts.py
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import app_fixtures as fixtures
import pytest
from test_app_browser import browser, open_page, shots  # noqa: F401

from quantkit.config.calibration import parse_spec
from quantkit.errors import UsageError
from quantkit.server.runs import texts
from quantkit.server.runs.store import RunStore
from quantkit.server.web import doors
from quantkit.server.web.visitor import Visitors

TEXT = "What the model will be used for.\n" * 100


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, RunStore, Visitors]]:
    root = tmp_path_factory.mktemp("texts") / "runs"
    with fixtures.serving(root, public=True, schedule=False) as served:
        yield served


def send(site: tuple[str, RunStore, Visitors], data: bytes, **more: str) -> tuple[int, bytes]:
    url, _, visitors = site
    headers = {**fixtures.page_headers(url, visitors, visitors.new_key()), **more}
    body = {"text": base64.b64encode(data).decode()}
    status, _, answer = fixtures.ask(url, "POST", "/texts", body, headers)
    return status, answer


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"GGUF\0\0\0\1" * 1000, b"not plain text"),
        (b"\xfd\xfe" * 1000, b"UTF-8"),
        ("ä".encode("latin-1") * 2000, b"UTF-8"),
        (b"short", b"fewer than 1,000"),
        (b" \n" * 5000, b"fewer than 1,000"),
    ],
)
def test_what_is_no_text_is_refused(
    site: tuple[str, RunStore, Visitors], data: bytes, said: bytes
) -> None:
    status, answer = send(site, data)
    assert status == 422 and said in answer


def test_what_is_sent_otherwise_is_refused(site: tuple[str, RunStore, Visitors]) -> None:
    url, _, visitors = site
    headers = fixtures.page_headers(url, visitors, visitors.new_key())
    for body in ({"text": 1}, {"text": "not base64!"}, {}, {"text": "", "name": "../x"}, []):
        status, _, answer = fixtures.ask(url, "POST", "/texts", body, headers)
        assert status == 422 and b"Traceback" not in answer
    door, _ = doors.find("POST", "/texts")
    assert door is not None and door.max_body < 1.4 * texts.MOST_BYTES
    other = {**headers, "Origin": "https://evil.example"}
    assert fixtures.ask(url, "POST", "/texts", {"text": ""}, other)[0] == 403


def test_a_text_goes_with_its_run(tmp_path: Path) -> None:
    """Somebody else's name for it opens nothing, and what nobody takes goes after a day."""
    store = RunStore(tmp_path / "ru,ns", public=True)
    store.root.mkdir()
    name, n = texts.keep(store.root, "visitor:me", b"\xef\xbb\xbf" + TEXT.encode())
    assert n == len(TEXT)
    path = texts.kept(store.root, "visitor:me", name)
    for owner, asked in (("visitor:you", name), ("visitor:me", "../../x"), ("visitor:me", "")):
        with pytest.raises(UsageError, match="no longer here"):
            texts.kept(store.root, owner, asked)
    run = store.submit(fixtures.CONFIG, "visitor:me", text=path)
    config, _ = store.asked(run, "visitor:me")
    (asked_for,) = parse_spec(config.calibration)
    assert Path(asked_for.name) == store.root / run / texts.FILE
    assert Path(asked_for.name).read_text() == TEXT
    assert [summary.id for summary in store.runs("visitor:me")] == [run]
    os.utime(path, (0, 0))
    texts.keep(store.root, "visitor:you", TEXT.encode())
    assert not path.exists()


@pytest.mark.slow
@pytest.mark.browser
def test_the_form_gives_it_to_the_run(
    site: tuple[str, RunStore, Visitors],
    browser: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    from playwright.sync_api import expect

    url, store, _ = site
    (tmp_path / "notes.py").write_text(TEXT)
    page = open_page(browser, url)
    page.locator("#model input").fill("a/b")
    page.get_by_role("button", name="Advanced").click()
    page.wait_for_timeout(2500)  # Gradio gives the fields their values once more
    page.locator("#own-text").set_input_files(tmp_path / "notes.py")
    expect(page.locator("#own-text-said")).to_contain_text(f"{len(TEXT):,} characters")
    page.get_by_role("button", name="Start").click()
    page.wait_for_url("**/?job=*")
    config = json.loads((store.root / page.url.rpartition("=")[2] / "config.json").read_text())
    assert config["calibration"].endswith(f"/{texts.FILE}")
