"""The form in a real browser: a gated model, a token, several models, and a run once more.

pytest tests/server/test_app_browser_form.py -m browser
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import app_fixtures as fixtures
import plans
import pytest
from test_app_browser import browser, open_page, pytestmark, shots  # noqa: F401

from quantkit.config import RunConfig
from quantkit.config.targets import FitsMemory
from quantkit.errors import NeedsToken
from quantkit.planning.nouns import Plan
from quantkit.server.web import form_handlers


def gated(config: RunConfig, token: str | None, *_: object) -> Plan:
    """A plan for whoever has a token."""
    if config.model.startswith("bob/") and token != "hf_aliceToken0123":
        raise NeedsToken(f"{config.model} is gated.", "Open its page and click “Agree”.")
    return plans.ask_small(config)


@pytest.mark.slow
def test_a_token_is_asked_for_beside_the_error(
    browser: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Typing it, without another click, brings the plan; and Start obeys the preview."""
    from playwright.sync_api import expect

    with fixtures.serving(tmp_path / "runs", schedule=False) as (url, store, _):
        monkeypatch.setattr(form_handlers, "estimate", gated)
        page = open_page(browser, url)
        expect(page.locator("#plan")).to_contain_text("Choose a model")
        page.locator("#model input").fill("bob/Gated")
        page.locator("#model input").press("Tab")
        expect(page.locator("#plan [role=alert]")).to_contain_text("Enter a token of an account")
        assert "hf auth login" not in page.locator("#plan").inner_text()
        page.get_by_role("button", name="Start").click()
        expect(page.locator("#form-error")).to_contain_text("bob/Gated is gated.")
        assert store.runs(None) == ()
        page.locator("#token input").press_sequentially("hf_aliceToken0123", delay=20)
        expect(page.locator("#plan")).to_contain_text("135M parameters")
        expect(page.locator("#plan")).to_contain_text("the usual choice")
        expect(page.locator("#token input")).to_have_value("hf_aliceToken0123")
        page.get_by_role("button", name="Start").click()
        expect(page.locator("#job-head")).to_contain_text("Next in the queue")


@pytest.mark.slow
def test_several_models_and_one_once_more(
    browser: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from playwright.sync_api import expect

    with fixtures.serving(tmp_path / "runs", schedule=False) as (url, store, visitors):
        monkeypatch.setattr(form_handlers, "estimate", gated)
        key = visitors.new_key()
        page = open_page(browser, url, key=key)
        page.locator("#model input").fill("a/one, bob/two, c/three")
        page.locator("#model input").press("Tab")
        expect(page.locator("#plan tbody tr")).to_have_count(3)
        expect(page.locator("#plan")).to_contain_text("bob/two is gated.")
        page.get_by_role("button", name="Start").click()
        expect(page.locator("#form-error")).to_contain_text("bob/two is gated.")
        expect(page.locator("#runs")).to_contain_text("No runs yet")  # not the others, either
        page.locator("#model input").fill("a/one, c/three")
        page.locator("#model input").press("Tab")
        expect(page.locator("#plan")).to_contain_text("One run each")
        page.get_by_role("button", name="Start").click()
        expect(page.locator("#form-error")).to_contain_text("2 runs are queued.")
        expect(page.locator("#runs .qk-jobs li")).to_have_count(2)

        config = dataclasses.replace(
            fixtures.CONFIG, targets=(FitsMemory("gpu-8gb@4096"),), seed=7, calibration="docs"
        )
        why = ("Not enough disk.", "Free 3 GB.")
        failed = fixtures.write_run(
            store.root / "failed", config, until="fetch", share=0.1, outcome="failed", error=why
        )
        fixtures.own(failed, f"visitor:{visitors.check(key)}")
        page.goto(f"{url}?job=failed")
        page.get_by_role("button", name="Edit and start again").click()
        expect(page.locator("#form-error")).to_contain_text("filled in as for that run")
        expect(page.locator("#model input")).to_have_value(config.model)
        expect(page.get_by_label("8 GB card (RTX")).to_be_checked()
        expect(page.locator("#plan")).to_contain_text("4,096 tokens take")
        assert page.url == url
        page.get_by_role("button", name="Start").click()
        expect(page.locator("#job-head")).to_contain_text("in the queue")
        page.wait_for_url("**/?job=*")
        again, _ = store.asked(page.url.rpartition("=")[2], f"visitor:{visitors.check(key)}")
        assert again == config


@pytest.mark.slow
def test_a_run_is_told_of_in_the_tab_and_by_a_notification(
    browser: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from playwright.sync_api import expect

    monkeypatch.setenv("QUANTKIT_TEST_SECONDS", "1.5")
    with fixtures.serving(tmp_path / "runs") as (url, _, _visitors):
        page = open_page(browser, url)
        page.add_init_script(
            "window.told = []; window.Notification = class { constructor(text) { told.push(text) }"
            " static requestPermission() { return Promise.resolve('granted') } }"
        )
        page.reload()
        page.locator("#model input").fill("demo:smollm2-135m")
        page.get_by_role("button", name="Start").click()
        expect(page.locator("#job-stages")).to_contain_text(re.compile(r"\d+ %"))
        expect(page).to_have_title(re.compile(r"^\d+ % · \w+ · demo:smollm2-135m · quantkit$"))
        page.get_by_role("button", name="Notify me").click()
        expect(page.locator("body > .qk-sr")).to_contain_text(re.compile("told when|Stage"))
        expect(page).to_have_title("Finished · demo:smollm2-135m · quantkit")
        page.wait_for_function("told.length === 1")
        assert page.evaluate("told[0]") == "demo:smollm2-135m: finished."
        page.get_by_role("link", name="Back to all runs").click()
        expect(page).to_have_title("quantkit")


@pytest.mark.slow
def test_the_demo_is_preselected_with_the_least_work(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    from playwright.sync_api import expect

    with fixtures.serving(tmp_path / "runs", schedule=False) as (url, _, _):
        page = open_page(browser, url)

        def choose(model: str) -> None:
            page.locator("#model input").fill(model)
            page.locator("#model input").press("Enter")

        profile = page.locator("#profile")
        expect(profile.get_by_label("Standard")).to_be_checked()
        choose("demo:smollm2-135m")
        expect(profile.get_by_label("Demo:")).to_be_checked()
        choose("a/b")
        expect(profile.get_by_label("Standard")).to_be_checked()
        profile.get_by_label("Quick look").check()
        choose("demo:smollm2-135m")
        expect(page.locator("#plan")).to_contain_text("apache-2.0")
        expect(profile.get_by_label("Quick look")).to_be_checked()


@pytest.mark.slow
def test_an_id_typed_over_a_slow_line_is_planned(
    browser: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every key asks for suggestions. While nobody could hear the answers yet they were too many
    for one address, the plan's among them, and the preview waited forever.
    """
    from playwright.sync_api import expect

    monkeypatch.setattr(form_handlers, "estimate", plans.ask_small)
    with fixtures.serving(tmp_path / "runs", schedule=False) as (url, _, _visitors):
        page = open_page(browser, url)
        slow = {"offline": False, "latency": 1500, "downloadThroughput": -1, "uploadThroughput": -1}
        page.context.new_cdp_session(page).send("Network.emulateNetworkConditions", slow)
        page.locator("#model input").press_sequentially("alice/a-model-of-a-rather-long-name")
        page.keyboard.press("Tab")
        expect(page.locator("#plan")).to_contain_text("Q4_K_M", timeout=30_000)
