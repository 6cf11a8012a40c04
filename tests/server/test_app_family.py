"""Several sizes through the page: one run, a download and its figures for every file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_app import ROOT, _app
from test_app_browser import browser, fill_advanced, open_page, pytestmark  # noqa: F401


@pytest.mark.slow
def test_a_family(browser, tiny_checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    from playwright.sync_api import expect

    given = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    with _app(ROOT, tmp_path / "runs", False, given) as url:
        page = open_page(browser, url)
        model = page.locator("#model input")
        model.fill(str(tiny_checkpoint))
        model.press("Enter")
        page.get_by_text("Several sizes").click()
        page.locator("#profile").get_by_label("Demo:").check()
        fill_advanced(page, "Calibration text", "docs,code")
        page.get_by_role("button", name="Start").click()
        page.wait_for_url(re.compile(r"\?job=[\w-]{20,}"))
        expect(page.locator("#job-head")).to_contain_text("Finished", timeout=1_800_000)
        expect(page.locator(".qk-download")).to_have_count(3)
        for label in ("Q3_K_M", "Q4_K_M", "Q5_K_M"):
            name = f"Tiny-Llama-EVO-{label}.gguf"
            page.locator("#job-tensor-map select").select_option(name)
            expect(page.locator("#job-frontier")).to_contain_text(f"ours, {label}")
            expect(page.locator("#job-domains")).to_contain_text(f"ours, {label}")
