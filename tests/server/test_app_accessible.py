"""The page for keyboards and screen readers, by axe-core in a real browser.

pytest tests/server/test_app_accessible.py -m browser
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import app_fixtures as fixtures
import pytest
from test_app_browser import browser, open_page, pytestmark, shots  # noqa: F401

_FIND = """async () => (await axe.run(document, {resultTypes: ["violations"]})).violations
  .filter((found) => ["serious", "critical"].includes(found.impact)
    || ["empty-table-header", "page-has-heading-one"].includes(found.id))
  .map((found) => found.id + ": " + found.nodes.map((node) => node.html).join(" ").slice(0, 500))"""


def check(page: Any, source: str, what: str) -> None:
    """Fail for whatever axe-core calls serious, and for headings and tables without words."""
    page.evaluate(source)
    assert page.evaluate(_FIND) == [], what


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_in_any_state(browser: Any, tmp_path: Path, scheme: str) -> None:  # noqa: F811
    axe = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed")
    source = Path(axe.__file__).with_name("axe.min.js").read_text("utf-8")
    worker = subprocess.Popen(["sleep", "3600"], start_new_session=True)
    try:
        with fixtures.serving(tmp_path / "runs", schedule=False) as (url, store, visitors):
            key = visitors.new_key()
            owner = f"visitor:{visitors.check(key)}"
            states = fixtures.make_states(store.root, owner, worker.pid)
            page = open_page(browser, url, 1280, scheme, key)
            page.locator("#model input").fill("a/b")
            page.locator("#model input").press("Tab")
            page.locator("#plan .qk-sizes").first.wait_for()
            page.get_by_role("button", name="Advanced").click()
            page.locator("#compare-with").wait_for()
            check(page, source, "form")
            for state in ("running", "finished", "failed", "cancelled"):
                page.goto(f"{url}?job={states[state]}")
                page.locator("#job-head .qk-head").wait_for()
                page.wait_for_timeout(300)
                # Gradio says "Empty value" of a plot that is still being drawn.
                page.wait_for_function("!document.querySelector('.qk-plot .empty')")
                check(page, source, state)
            store.share(states["finished"], owner, True)
            share = store.view(states["finished"], owner).shared
            page.goto(f"{url}shared/{share}")
            assert page.locator(".qk-result").count() == 1
            check(page, source, "shared")
    finally:
        worker.kill()
        worker.wait()


@pytest.mark.slow
def test_radios_are_one_group(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    """One stop of Tab, and arrows move on."""
    from playwright.sync_api import expect

    with fixtures.serving(tmp_path / "runs", schedule=False) as (url, _, _visitors):
        page = open_page(browser, url)
        page.wait_for_function("document.querySelector('#size-kind input')?.name.startsWith('qk-')")
        page.get_by_label("Same size as a standard quant").focus()
        page.keyboard.press("ArrowRight")
        expect(page.get_by_label("File size", exact=True)).to_be_checked()
        expect(page.locator("#size")).to_be_visible()
        assert page.evaluate("document.activeElement.type") == "radio"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.type") != "radio"


_SEEN = """() => { const at = document.activeElement, chip = at.closest('label');
  const drawn = ['radio', 'checkbox'].includes(at.type) ? chip : at;
  const { outlineStyle, outlineWidth } = getComputedStyle(drawn);
  return outlineStyle !== 'none' && parseFloat(outlineWidth) >= 2; }"""


@pytest.mark.slow
def test_a_list_closes_and_the_focus_is_seen(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    from playwright.sync_api import expect

    with fixtures.serving(tmp_path / "runs", schedule=False) as (url, _, _visitors):
        page = open_page(browser, url)
        page.wait_for_function("document.querySelector('#size-kind input')?.name.startsWith('qk-')")
        for back in ("Tab", "Shift+Tab"):
            for field in ("#model", "#like"):
                page.locator(f"{field} input").click()
                expect(page.locator(f"{field} input")).to_have_attribute("aria-expanded", "true")
                page.keyboard.press(back)
                page.wait_for_timeout(300)
                expect(page.locator(f"{field} input")).to_have_attribute("aria-expanded", "false")
                expect(page.locator("ul.option-list")).to_have_count(0)
        page.locator("#model input").focus()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.type") == "radio" and page.evaluate(_SEEN)
        page.get_by_label("Fits what I have").check()
        page.locator("#devices input").first.focus()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.type") == "checkbox" and page.evaluate(_SEEN)
        page.locator("#memory input, #memory textarea").focus()
        assert page.evaluate(_SEEN)


@pytest.mark.slow
def test_the_focus_is_not_lost(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    """What an action hides was focused; the next stop of Tab would be the top of the page."""
    from playwright.sync_api import expect

    with fixtures.serving(tmp_path / "runs", schedule=False) as (url, _, _visitors):
        page = open_page(browser, url)
        page.add_init_script(
            "window.Notification = class { static requestPermission() {"
            " return Promise.resolve('denied') } }"
        )
        page.reload()
        page.get_by_role("button", name="Start").click()
        expect(page.locator("#form-error")).to_contain_text("Enter a model.")
        page.locator("#model input").press_sequentially("demo:smollm2-135m")
        page.keyboard.press("Tab")
        expect(page.locator("#plan")).to_contain_text("135M parameters")
        expect(page.locator("#form-error")).to_have_count(0)
        page.get_by_role("button", name="Start").click()
        expect(page.locator("#job-head h2")).to_be_focused()
        page.get_by_role("button", name="Notify me").click()
        expect(page.locator("#notify")).to_contain_text("does not allow notifications")
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#job-head h2")).to_be_focused()
        for leave in (lambda: page.locator("#keep").click(), lambda: page.keyboard.press("Escape")):
            page.locator("#delete").click()
            expect(page.locator("#keep")).to_be_visible()
            leave()
            expect(page.locator("#keep")).to_have_count(0)
            expect(page.locator("#delete")).to_be_focused()
        page.get_by_role("button", name="Edit and start again").click()
        expect(page.locator("#form-error")).to_contain_text("filled in as for that run")
        expect(page.locator(".qk-header h1")).to_be_focused()
        page.wait_for_timeout(1000)
        expect(page.locator("#form-error")).to_contain_text("filled in as for that run")
        page.locator("#profile").get_by_label("Quick look").check()
        expect(page.locator("#form-error")).to_have_count(0)


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_start_stays_where_somebody_aims_at_it(
    browser: Any,  # noqa: F811
    tmp_path: Path,
    width: int,
) -> None:
    """Whatever the preview says, and however long a run takes with each profile."""
    at = "document.querySelector('#start').getBoundingClientRect().top + scrollY"
    with fixtures.serving(tmp_path / "runs", schedule=False) as (url, _, _visitors):
        page = open_page(browser, url, width)
        page.locator("#start").wait_for()
        page.wait_for_timeout(500)
        before = page.evaluate(at)
        page.locator("#model input").fill("demo:smollm2-135m")
        page.keyboard.press("Tab")
        page.locator("#plan .qk-sizes").first.wait_for()
        page.wait_for_timeout(500)
        assert page.evaluate(at) == before
