"""A result of several files in a real browser, times beside the profiles, and runs of an API key.

pytest tests/server/test_app_browser_family.py -m browser
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import app_fixtures as fixtures
import pytest
from test_app_browser import browser, open_page, pytestmark, shots  # noqa: F401

from quantkit.run.folder import RunDir
from quantkit.server.web import handlers

OTHER = "SmolLM2-135M-Instruct-EVO-Q6_K.gguf"


def with_another(folder: Path) -> Path:
    """Put a second file into a finished run."""
    directory = RunDir(folder)
    path = folder / "9-publish" / "upload" / OTHER
    path.write_bytes(b"GGUF" + bytes(range(256)) * 500)
    record = directory.records()["publish"]
    outputs = (*record.outputs, directory.describe(path))
    directory.save_record(dataclasses.replace(record, outputs=outputs))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_every_file_of_a_family(
    browser: Any,  # noqa: F811
    tmp_path: Path,
    shots: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    width: int,
) -> None:
    """Each has its name, figures and commands, one archive has all; the one that is chosen, by
    keyboard alone, answers; a collection is proposed, and what is typed over it stays.
    """
    from playwright.sync_api import expect

    value = fixtures.make_report()
    other = {**value["outputs"][0], "name": OTHER, "n_bytes": 138_000_000, "path": OTHER}
    other |= {"search": {**(other.get("search") or {}), **UNSPENT}}
    value["outputs"].append(other)
    monkeypatch.setattr(fixtures, "make_report", lambda: value)

    def say(path: Path, messages: list[dict[str, str]]) -> Iterator[str]:
        yield f"I am {path.name}."

    monkeypatch.setattr(handlers, "say", say)
    with fixtures.serving(tmp_path / "runs", schedule=False) as (url, store, visitors):
        key = visitors.new_key()
        owner = f"visitor:{visitors.check(key)}"
        fixtures.own(with_another(fixtures.write_run(store.root / "done")), owner)
        page = open_page(browser, f"{url}?job=done", width, key=key)
        results = page.locator("#job-results")
        expect(results.locator(".qk-result h3")).to_have_text([fixtures.GGUF, OTHER])
        expect(results.locator(".qk-verdict").nth(1)).to_contain_text(
            "14.1 MB of 152.1 MB stay unused: the next larger type of token_embd.weight takes"
            " 52.4 MB more. Sizes worth asking for: 138.0 MB (the same file) or 190.5 MB."
        )
        with page.expect_download() as caught:
            results.get_by_role("link", name="All 5 files as one archive").click()
        assert caught.value.suggested_filename == "quantkit.zip"
        for label in ("ours, Q4_K_M", "ours, Q6_K"):
            expect(page.locator("#job-frontier .vega-embed svg")).to_contain_text(label)
        for fold in page.locator("#job-report summary").all():
            fold.click()
        tables = "all => all.map(e => [e.innerText.slice(0, 40), e.scrollWidth, e.clientWidth])"
        for text, inside, outside in page.locator("#job-report .qk-scroll").evaluate_all(tables):
            assert width < 1280 or inside <= outside, f"a table is wider than the page: {text}"
        page.screenshot(path=shots / f"family-{width}-light.png", full_page=True)

        page.get_by_role("button", name="Try it").click()
        chooser = page.get_by_label("File", exact=True)
        expect(chooser).to_have_value(fixtures.GGUF)
        chooser.focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        expect(chooser).to_have_value(OTHER)
        page.get_by_label("Prompt").fill("Who are you?")
        page.get_by_role("button", name="Ask the quantized model").click()
        expect(page.locator("#answer textarea")).to_have_value(f"I am {OTHER}.")
        expect(page.locator("#answer")).to_contain_text(OTHER)

        page.get_by_role("button", name="Publish to the Hugging Face Hub").click()
        collection = page.get_by_label("Collection")
        expect(collection).to_have_value("GGUFs by quantkit")
        collection.fill("")
        page.get_by_role("button", name="Share", exact=True).click()
        expect(page.locator("#share-link")).to_be_visible()
        page.wait_for_timeout(2500)  # a poll
        assert collection.input_value() == ""
        expect(chooser).to_have_value(OTHER)


UNSPENT = {
    "target": "152.1MB",
    "limit_bytes": 152_100_000,
    "n_bytes": 138_000_000,
    "searched": True,
    "unspent": {
        "limit_bytes": 152_100_000,
        "n_bytes": 138_000_000,
        "tensor": "token_embd.weight",
        "step_bytes": 52_428_800,
    },
}


@pytest.mark.slow
def test_times_stand_beside_the_profiles(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    """Those of this very model; arrows move on through them, and the focus stays."""
    from playwright.sync_api import expect

    with fixtures.serving(tmp_path / "runs", schedule=False) as (url, _, _visitors):
        page = open_page(browser, url)
        profiles = page.locator("#profile")
        expect(profiles).to_contain_text("Standard (recommended)")
        assert "about" not in profiles.inner_text()
        page.locator("#model input").fill("demo:smollm2-135m")
        page.locator("#model input").press("Enter")
        expect(profiles).to_contain_text("Standard (recommended) · about 57 min")
        expect(profiles).to_contain_text("with many users · about 2 h 0 min")
        page.get_by_label("Several sizes").check()
        expect(profiles).to_contain_text("Standard (recommended) · about 77 min")
        profiles.get_by_label("Standard (recommended)").focus()
        for _ in range(2):
            page.keyboard.press("ArrowUp")
            page.wait_for_timeout(1500)  # the preview has answered, and the times with it
        at = "document.activeElement.closest('#profile') && document.activeElement.value"
        assert page.evaluate(at) == "demo"
        expect(profiles.get_by_label("Demo:")).to_be_checked()


@pytest.mark.slow
def test_runs_of_a_key_open_in_the_page(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    """Beside the browser's own; a key that is none is refused, and nobody else sees more."""
    from playwright.sync_api import expect

    with fixtures.serving(tmp_path / "runs", schedule=False) as (url, store, visitors):
        key, own = visitors.new_key(), visitors.new_key()
        of_key, mine = (f"visitor:{visitors.check(k)}" for k in (key, own))
        fixtures.own(fixtures.write_run(store.root / "api"), of_key)
        fixtures.own(fixtures.write_run(store.root / "mine"), mine)
        page = open_page(browser, url, key=own)
        expect(page.locator("#runs .qk-jobs li")).to_have_count(1)
        page.get_by_role("button", name="Runs of an API key").click()
        field = page.locator("#key input")
        field.wait_for()
        page.wait_for_timeout(1500)  # Gradio gives it its value once more
        field.fill(key[:-1] + "x")
        page.get_by_role("button", name="Show its runs").click()
        expect(page.locator("#key-notice [role=alert]")).to_contain_text("That is not a key.")
        field.fill(key)
        page.get_by_role("button", name="Show its runs").click()
        expect(page.locator("#key-notice")).to_contain_text("1 run is in your list.")
        expect(page.locator("#runs .qk-jobs li")).to_have_count(2)
        expect(field).to_have_value("")
        page.locator("#runs a[href*=api]").click()
        expect(page.locator("#job-head")).to_contain_text("Finished")
        assert [run.id for run in store.runs(of_key)] == ["api"], "the key has its runs still"
        assert {run.id for run in store.runs(mine)} == {"api", "mine"}
        assert store.runs("visitor:nobody") == ()
        assert (
            key not in page.url and key.encode() not in (store.root / "api/job.json").read_bytes()
        )
