"""The page in a real browser: from the empty form to the result, every state, phone and desktop.

    pytest tests/server/test_app_browser.py -m browser

Screenshots of every state are kept in QUANTKIT_SCREENSHOTS, else in pytest's temporary folder.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import app_fixtures as fixtures
import pytest

from quantkit.server.runs.record import load_record, save_record
from quantkit.server.web.visitor import COOKIE

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="there is no /usr/bin/chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    sync_api.expect.set_options(timeout=120_000)  # the machine may be busy with other tests
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(CHROMIUM), args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("QUANTKIT_SCREENSHOTS") or tmp_path / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def open_page(
    browser: Any, url: str, width: int = 1280, scheme: str = "light", key: str = ""
) -> Any:
    """A page in a context of its own: another visitor."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
    )
    context.set_default_timeout(120_000)
    if key:
        context.add_cookies([{"name": COOKIE, "value": key, "url": url}])
    page = context.new_page()
    page.goto(url)
    return page


def fill_advanced(page: Any, label: str, text: str) -> None:
    """Gradio mounts what an accordion holds when it opens and gives the fields their values once
    more some time later: a script types faster, and its text is lost. So it looks again.
    """
    page.get_by_role("button", name="Advanced").click()
    field = page.get_by_label(label)
    for _ in range(100):
        field.fill(text)
        page.wait_for_timeout(1000)
        if field.input_value() == text:
            return
    raise AssertionError(f"{label} does not keep {text!r}")


@pytest.mark.slow
def test_from_the_form_to_the_result(
    browser: Any, tmp_path: Path, shots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from playwright.sync_api import expect

    monkeypatch.setenv("QUANTKIT_TEST_SECONDS", "2")
    with fixtures.serving(tmp_path / "runs") as (url, store, _):
        page = open_page(browser, url)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        expect(page.locator("#runs")).to_contain_text("No runs yet")
        page.screenshot(path=shots / "empty-1280-light.png", full_page=True)

        # What is wrong is said in the page, in a sentence.
        page.get_by_role("button", name="Start").click()
        expect(page.locator("#form-error [role=alert]")).to_contain_text("Enter a model.")

        page.locator("#model input").fill("demo:smollm2-135m")
        page.get_by_label("Fits what I have").check()
        page.get_by_role("button", name="Start").click()
        expect(page.locator("#form-error [role=alert]")).to_contain_text("has to fit")
        page.get_by_label("8 GB card (RTX").check()

        page.get_by_label("File size", exact=True).check()
        page.locator("#size input, #size textarea").fill("12 apples")
        page.locator("#model input").fill("demo:smollm2-135m")
        page.get_by_role("button", name="Start").click()
        expect(page.locator("#form-error [role=alert]")).to_contain_text("is not a size")
        page.locator("#size input, #size textarea").fill("90MB")
        page.locator("#profile").get_by_label("Demo:").check()
        page.get_by_role("button", name="Start").click()

        # It runs, and its stages move by themselves.
        page.wait_for_url(re.compile(r"\?job=[\w-]{20,}"))
        expect(page.locator("#job-head")).to_contain_text("Running")
        expect(page.locator("#job-stages li.running .name")).to_have_text(
            re.compile("convert|calibrate|quantize")
        )
        expect(page.locator("#job-stages li.done")).not_to_have_count(0)

        # The way back leads to the form; the address, a reload and the list lead to the run.
        page.go_back()
        expect(page.get_by_role("button", name="Start")).to_be_visible()
        page.go_forward()
        expect(page.locator("#job-head")).to_contain_text("smollm2-135m")
        page.reload()
        expect(page.locator("#job-head")).to_contain_text("smollm2-135m")
        page.get_by_role("link", name="Back to all runs").click()
        expect(page.locator("#runs .qk-jobs li")).to_have_count(1)
        page.locator("#runs .qk-jobs a").press("Enter")
        expect(page.locator("#job-head")).to_contain_text("Running")
        expect(page.locator("#job-convergence .vega-embed svg")).to_be_visible()
        page.screenshot(path=shots / "live-1280-light.png", full_page=True)

        # Another visitor sees nothing of it.
        stranger = open_page(browser, page.url)
        expect(stranger.locator("#job-head")).to_contain_text("There is no such run")
        stranger.goto(url)
        expect(stranger.locator("#runs")).to_contain_text("No runs yet")

        expect(page.locator("#job-results")).to_contain_text("0.0147")
        expect(page.locator("#job-head")).to_contain_text("Finished")
        page.locator("#log").get_by_role("button").first.click()
        expect(page.locator("#job-log")).to_contain_text("done in")
        with page.expect_download() as caught:
            page.locator(".qk-download").click()
        assert Path(caught.value.path()).read_bytes()[:4] == b"GGUF"

        # Gone for good, after a question.
        page.get_by_role("button", name="Delete", exact=True).click()
        page.get_by_role("button", name="Delete permanently").click()
        expect(page.locator("#runs")).to_contain_text("No runs yet")
        page.wait_for_url(url)
        assert store.runs(None) == ()
        assert not [there for there in asked if not there.startswith((url, "data:", "blob:"))]


@pytest.mark.slow
def test_plots_answer(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pointing at a mark tells what it is, a stranger's name stays text, colors follow the page,
    another file can be chosen, and nothing is asked of another server.
    """
    from playwright.sync_api import expect

    name = "<img src=x onerror=alert(1)>.gguf"
    value = fixtures.make_report()
    value["baselines"][0] |= {"kind": "given", "name": name}
    other = {"name": "Other.gguf", "n_bytes": 90_000_000, "tensors": {}, "trace": []}
    other["tensors"] = {"blk.0.attn_q.weight": {"qtype": "Q8_0", "n_elements": 64, "n_bytes": 68}}
    value["outputs"].append({**value["outputs"][0], **other})
    monkeypatch.setattr(fixtures, "make_report", lambda: value)
    with fixtures.serving(tmp_path / "runs", schedule=False) as (url, store, visitors):
        key = visitors.new_key()
        fixtures.own(fixtures.write_run(store.root / "done"), f"visitor:{visitors.check(key)}")
        page = open_page(browser, url, 390, "dark", key)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: pytest.fail("a stranger's script ran"))
        page.goto(f"{url}?job=done")
        frontier = page.locator("#job-frontier .vega-embed svg")
        expect(frontier).to_contain_text("<img src=x onerror=")
        point = page.locator(f'#job-frontier path[aria-label*="{name}"]')
        point.hover()
        told = page.locator("#vg-tooltip-element")
        expect(told).to_contain_text(f"{name}: 91.7 MB, KL 0.141")
        assert told.locator("img").count() == 0
        colors = "element => [getComputedStyle(element).fill, getComputedStyle(element).stroke]"
        assert point.evaluate(colors) == ["rgb(154, 167, 184)"] * 2, "soft, of the dark theme"

        cells = page.locator("#job-tensor-map path[role=graphics-symbol]")
        expect(cells).to_have_count(211)
        page.locator("#job-tensor-map select").select_option("Other.gguf")
        expect(cells).to_have_count(1)
        wide = "element => element.getBoundingClientRect().width"
        assert 300 < frontier.evaluate(wide) <= 390
        assert not [there for there in asked if not there.startswith((url, "data:", "blob:"))]


@pytest.mark.slow
def test_cancel_and_resume(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from playwright.sync_api import expect

    monkeypatch.setenv("QUANTKIT_TEST_SECONDS", "3")
    with fixtures.serving(tmp_path / "runs") as (url, store, _visitors):
        page = open_page(browser, url)
        page.locator("#model input").fill("demo:smollm2-135m")
        page.get_by_role("button", name="Start").click()
        expect(page.locator("#job-head")).to_contain_text("Running")
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#job-head")).to_contain_text("Cancelled")
        assert page.locator("#resume-token input").count() == 0, "none was given before"
        folder = store.root / page.url.rpartition("=")[2]
        record = load_record(folder)
        assert record is not None
        save_record(folder, dataclasses.replace(record, has_token=True))
        monkeypatch.setenv("QUANTKIT_TEST_SECONDS", "0.1")
        page.locator("#resume-token input").fill("hf_givenAgainToken01")
        page.get_by_role("button", name="Resume").click()
        expect(page.locator("#job-head")).to_contain_text("Finished")
        page.locator("#log").get_by_role("button").first.click()
        expect(page.locator("#job-log")).to_contain_text("a token is there")
        assert page.locator("#resume-token input").count() == 0


@pytest.mark.slow
def test_the_keyboard_is_enough(browser: Any, tmp_path: Path) -> None:
    """Type the model, go on to Start, and reach the run."""
    from playwright.sync_api import expect

    with fixtures.serving(tmp_path / "runs", schedule=False) as (url, _, _visitors):
        page = open_page(browser, url)
        page.locator("#model input").focus()
        page.keyboard.type("demo:smollm2-135m")
        page.keyboard.press("Enter")
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id || ''") == "start":
                break
        page.keyboard.press("Enter")
        expect(page.locator("#job-head")).to_contain_text("Next in the queue.")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_every_state(browser: Any, tmp_path: Path, shots: Path, width: int, scheme: str) -> None:
    """Every state at this width: nothing is cut off, nothing is wider than the screen."""
    from playwright.sync_api import expect

    worker = subprocess.Popen(["sleep", "3600"], start_new_session=True)
    try:
        with fixtures.serving(tmp_path / "runs", schedule=False) as (url, store, visitors):
            key = visitors.new_key()
            owner = f"visitor:{visitors.check(key)}"
            states = fixtures.make_states(store.root, owner, worker.pid)
            page = open_page(browser, url, width, scheme, key)
            expect(page.locator("#runs .qk-jobs li")).to_have_count(len(states))
            pages = {"form": "", "lost": "?job=nothing"}
            pages |= {state: f"?job={job_id}" for state, job_id in states.items()}
            for state, query in pages.items():
                page.goto(url + query)
                there = "#start" if state == "form" else "#job-head .qk-head, #job-head .qk-notice"
                page.locator(there).first.wait_for()
                page.wait_for_timeout(300)
                wide = page.evaluate("document.documentElement.scrollWidth")
                page.screenshot(path=shots / f"{state}-{width}-{scheme}.png", full_page=True)
                assert wide <= width, f"{state} is {wide} wide"
            if width == 1280:
                page.goto(url)
                page.get_by_role("button", name="Advanced").click()
                page.get_by_role("button", name="Publish to the Hub").click()
                page.locator("#visible-to").wait_for()
                page.wait_for_timeout(300)
                page.screenshot(path=shots / f"advanced-{scheme}.png", full_page=True)
    finally:
        worker.kill()
        worker.wait()
