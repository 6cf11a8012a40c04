"""The whole way in a real browser: from typing a model's name to the published repository.

    pytest tests/server/test_app_whole.py

Nothing is replaced: `python app.py`, its workers, the pipeline, llama.cpp and huggingface_hub are
what a user runs; only the Hub is the protocol server of these tests.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import ALICE, SECRETS, HubServer
from huggingface_hub import ModelCard
from test_app import ROOT, _app
from test_app_browser import browser, fill_advanced, open_page, pytestmark, shots  # noqa: F401

from quantkit.gguf_file.read import GgufFile

MODEL, REPO = "alice/Tiny-Llama-1M", "alice/Tiny-Llama-1M-GGUF"
CARD = "---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Tiny\n"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(cdn=True) as running:
        running.add_user(ALICE, "alice")
        yield running


@pytest.mark.slow
def test_from_the_name_to_the_published_repository(
    browser,  # noqa: F811
    hub: HubServer,
    tiny_checkpoint: Path,
    tmp_path: Path,
    shots: Path,  # noqa: F811
) -> None:
    from playwright.sync_api import expect

    files: dict[str, bytes | str | Path] = {p.name: p for p in tiny_checkpoint.iterdir()}
    about = {"license": "apache-2.0", "language": ["en"]}  # the Hub reads it out of the card
    files["README.md"] = CARD
    hub.add_model(MODEL, files, pipeline_tag="text-generation", cardData=about)
    runs = tmp_path / "runs"
    given = {**hub.env, "HF_HOME": str(tmp_path / "hf")}
    with _app(ROOT, runs, False, given) as url:
        page = open_page(browser, url)
        expect(page.locator("#runs")).to_contain_text("No runs yet")
        model = page.locator("#model input")
        model.click()
        model.press_sequentially("tiny-llama", delay=30)
        found = page.get_by_role("option", name=MODEL)
        expect(found).to_be_visible()  # live, from the Hub
        found.click()

        # Before anything runs: what it is, what it takes.
        expect(page.locator("#plan")).to_contain_text("LlamaForCausalLM")
        expect(page.locator("#plan")).to_contain_text("apache-2.0")
        expect(page.locator("#plan")).to_contain_text("Which size?", timeout=300_000)
        page.get_by_text("Which size?").click()
        page.screenshot(path=shots / "preview-1280-light.png", full_page=True)
        page.locator("#profile").get_by_label("Demo:").check()
        fill_advanced(page, "Calibration text", "builtin")
        page.get_by_role("button", name="Start").click()

        page.wait_for_url(re.compile(r"\?job=[\w-]{20,}"))
        expect(page.locator("#job-head")).to_contain_text("Finished", timeout=1_800_000)
        expect(page.locator("#job-results")).to_contain_text("mean KL divergence")
        expect(page.locator("#job-report")).to_contain_text("full precision")
        with page.expect_download() as caught:
            page.locator(".qk-download").first.click()
        downloaded = Path(caught.value.path())
        GgufFile(downloaded)

        page.get_by_role("button", name="Publish to the Hugging Face Hub").click()
        page.locator("#repo input, #repo textarea").fill(REPO)
        page.locator("#publish-token input").fill(ALICE)
        page.get_by_role("button", name="Preview upload").click()
        expect(page.locator("#changes")).to_contain_text("will be created")
        page.locator("#publish").click()
        expect(page.locator("#job-head")).to_contain_text("Published:", timeout=300_000)

    repo = hub.repos["model", REPO]
    assert len(repo.commits) == 2  # the Hub's own first one, and everything
    name = caught.value.suggested_filename
    assert repo.head.files[name].sha256 == hashlib.sha256(downloaded.read_bytes()).hexdigest()
    card = ModelCard(repo.head.files["README.md"].data.decode())
    assert (card.data.base_model, card.data.license) == (MODEL, "apache-2.0")
    assert f"{REPO}/resolve/main/{name}" in card.text
    for path in runs.rglob("*"):
        told = path.read_bytes() if path.is_file() else b""
        assert not any(secret.encode() in told for secret in SECRETS), path
