"""Publishing from the page: the button, the real client, and a Hub that fails in every way.

    pytest tests/server/test_app_publish.py

The browser is driven in the slow tests; the others ask the page's handlers.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import app_fixtures as fixtures
import pytest
from hub_server import ALICE, BOB, READER, HubServer, running_hub
from test_app_browser import browser, open_page, shots  # noqa: F401

from quantkit.errors import QuantkitError
from quantkit.run.folder import RunDir
from quantkit.server.runs.store import RunStore
from quantkit.server.web import previews
from quantkit.server.web.form_handlers import Client
from quantkit.server.web.handlers import Handlers
from quantkit.server.web.visitor import Visitors

ME = Client("visitor:alice", None, "1.2.3.4")
REPO = "alice/SmolLM2-GGUF"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    sleep = time.sleep
    with running_hub(monkeypatch, tmp_path) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("time.sleep", lambda seconds: sleep(min(seconds, 0.05)))
        server.collections["alice/mine-65f1"] = []
        yield server


@pytest.fixture
def handlers(tmp_path: Path, hub: HubServer) -> Handlers:
    store = RunStore(tmp_path / "runs")
    fixtures.own(fixtures.write_run(store.root / "done"), ME.owner)
    return Handlers(store, Visitors(b"k"), on_space=False, sign_in=False)


def others(hub: HubServer) -> None:
    """A repository with somebody's file and an older card."""
    hub.add_model(REPO, {"notes.txt": "mine", "README.md": "# Old\n\nwords\n"})


def test_what_would_change_in_a_new_repository(handlers: Handlers, hub: HubServer) -> None:
    html = handlers.compare("done", REPO, "private", "", ME, ALICE)
    assert "will be created, private" in html and "4 files are uploaded" in html
    assert html.count('<li class="new">') == 4 and "<pre" not in html
    assert not hub.asked("commit|repos/create|lfs|preupload"), "looking wrote something"


def test_what_a_gated_model_becomes(handlers: Handlers, hub: HubServer) -> None:
    """Private, and why; public for those who ask for it; and never by chance in a public place."""
    run = RunDir(handlers.store.root / "done")
    fetched = run.records()["fetch"]
    run.save_record(replace(fetched, summary={**fetched.summary, "closed": "gated"}))
    html = handlers.compare("done", REPO, "model", "", ME, ALICE)
    assert "will be created, private" in html and "Its model is gated" in html
    html = handlers.compare("done", REPO, "public", "", ME, ALICE)
    assert "will be created, public" in html and "gated" not in html
    others(hub)
    with pytest.raises(QuantkitError, match="is public, but"):
        handlers.compare("done", REPO, "model", "", ME, ALICE)
    handlers.publish("done", REPO, "public", "", ME, ALICE)
    config = json.loads((handlers.store.root / "done" / "config.json").read_text())
    assert (config["private"], config["public"]) == (False, True)


def test_what_would_change_in_an_old_one(handlers: Handlers, hub: HubServer) -> None:
    others(hub)
    html = handlers.compare("done", REPO, "model", "", ME, ALICE)
    assert "exists and is public" in html
    assert '<li class="changed"><b>~</b><span>README.md' in html
    assert '<li class="kept"><b> </b><span>notes.txt' in html
    assert "-# Old" in html and "+# SmolLM2-135M-Instruct-EVO-Q4_K_M" in html


def test_the_repository_of_the_last_time_is_proposed(handlers: Handlers, hub: HubServer) -> None:
    """In its field, and where that is empty; only a first time is named after the model."""
    assert handlers.shown("done", ME.owner)["repo"] == ""
    named = handlers.proposed("done", "", ALICE, ME)
    assert named == "alice/SmolLM2-135M-Instruct-GGUF"
    handlers.publish("done", "alice/custom", "model", "", ME, ALICE)
    assert handlers.shown("done", ME.owner)["repo"] == "alice/custom"
    assert handlers.proposed("done", " ", ALICE, ME) == "alice/custom"
    assert handlers.proposed("done", "alice/other", ALICE, ME) == "alice/other"


def test_a_second_time_nothing_changes(handlers: Handlers, hub: HubServer) -> None:
    from quantkit import hub as real

    real.publish(handlers.store.root / "done" / "9-publish" / "upload", REPO, ALICE)
    html = handlers.compare("done", REPO, "model", "", ME, ALICE)
    assert "nothing is uploaded" in html and html.count('<li class="same">') == 4


@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [
        ("hf_wrongSecretToken01", REPO, "does not accept this token"),
        (READER, REPO, "read-only"),
        (BOB, REPO, "cannot publish under alice"),
        ("", REPO, "needs a token"),
        (ALICE, "no repo at all", "is not a repository"),
        (ALICE, "alice/../bob", "is not a repository"),
        ("a\nb", REPO, "is not a token"),
    ],
)
def test_refusals(handlers: Handlers, hub: HubServer, token: str, repo: str, words: str) -> None:
    with pytest.raises(QuantkitError, match=words) as caught:
        handlers.compare("done", repo, "model", "", ME, token)
    assert not token or token not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "does not accept this token|only for people"),
        (403, "no permission"),
        (404, "no model|refused"),
        (409, "changed by someone else"),
        (429, "rate limit is reached"),
        (500, "problem of its own"),
        (503, "problem of its own"),
    ],
)
def test_every_status_is_a_sentence(
    handlers: Handlers, hub: HubServer, status: int, words: str
) -> None:
    hub.fail_next(r"/api/whoami", status, times=20)
    with pytest.raises(QuantkitError, match=words) as caught:
        handlers.compare("done", REPO, "model", "", ME, ALICE)
    assert str(caught.value).endswith(".") and ALICE not in str(caught.value)


def test_a_hub_that_does_not_answer(
    handlers: Handlers, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit.hub import client

    monkeypatch.setitem(client._SECONDS, "read", 0.2)
    hub.hang_next(r"/api/whoami", 1.0, times=5)
    with pytest.raises(QuantkitError, match="did not answer in time"):
        handlers.compare("done", REPO, "model", "", ME, ALICE)


def test_only_ones_own_runs_are_published(handlers: Handlers) -> None:
    stranger = Client("visitor:mallory", None, "5.6.7.8")
    with pytest.raises(QuantkitError, match="no such run"):
        handlers.compare("done", REPO, "model", "", stranger, ALICE)
    with pytest.raises(QuantkitError, match="no such run"):
        handlers.publish("done", REPO, "model", "", stranger, ALICE)


def test_a_collection_by_its_title_is_made_once(handlers: Handlers, hub: HubServer) -> None:
    """Of the repository's owner, private with it; what it would be is told before."""
    from quantkit import hub as ours

    title = "GGUFs by quantkit"
    html = handlers.compare("done", REPO, "model", title, ME, ALICE)
    assert f"your collection “{title}”, which is created if you have none" in html
    hub.add_model(REPO, {})
    hub.add_model("alice/Other-GGUF", {})
    for repo in (REPO, "alice/Other-GGUF", REPO):
        ours.add_to_collection(title, repo, ALICE, private=True)
    (slug,) = hub.titles
    assert hub.titles[slug] == title
    wanted = [{"id": repo, "type": "model"} for repo in (REPO, "alice/Other-GGUF")]
    assert hub.collections[slug] == wanted
    with pytest.raises(QuantkitError):
        ours.add_to_collection(title, "bob/Model-GGUF", ALICE)


@pytest.mark.parametrize("slug", ["x" * 60, "a\tb", "a/../b", "https://evil/x/y", "a/b?c", "a/b/c"])
def test_a_collection_is_one(handlers: Handlers, slug: str) -> None:
    with pytest.raises(QuantkitError, match="is not a collection"):
        handlers.publish("done", REPO, "model", slug, ME, ALICE)


def test_all_of_it_is_escaped() -> None:
    from quantkit.hub import Change, RepoChanges

    evil = "<img src=x onerror=alert(1)>"
    made = RepoChanges(evil, True, False, (Change(evil, 1, "new"),), ("---", "+++", f"+{evil}"))
    assert "<img" not in previews.changes(made)


@pytest.mark.slow
@pytest.mark.browser
def test_from_the_button_to_the_repository(
    browser,  # noqa: F811
    hub: HubServer,
    tmp_path: Path,
    shots: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """429, 503, a lost answer and a cut connection on the way: one commit, the same bytes."""
    from playwright.sync_api import expect

    others(hub)
    monkeypatch.setenv("QUANTKIT_TEST_SECONDS", "0.05")
    with fixtures.serving(tmp_path / "web") as (url, store, visitors):
        key = visitors.new_key()
        owner = f"visitor:{visitors.check(key)}"
        folder = fixtures.own(fixtures.write_run(store.root / "done"), owner)
        page = open_page(browser, url + "?job=done", key=key)
        page.get_by_role("button", name="Publish to the Hugging Face Hub").click()
        page.locator("#repo input, #repo textarea").fill(REPO)
        page.locator("#publish-token input").fill("hf_wrongSecretToken01")
        page.get_by_role("button", name="Preview upload").click()
        expect(page.locator("#changes [role=alert]")).to_contain_text("does not accept this token")
        expect(page.locator("#publish")).to_be_hidden()

        page.locator("#publish-token input").fill(ALICE)
        page.locator("#collection input, #collection textarea").fill("alice/mine-65f1")
        page.get_by_role("button", name="Preview upload").click()
        expect(page.locator("#changes")).to_contain_text("notes.txt")
        page.get_by_text("Changes of the model card").click()
        page.wait_for_timeout(300)
        page.screenshot(path=shots / "publish-1280-light.png", full_page=True)

        n_commits = len(hub.repos["model", REPO].commits)
        hub.fail_next(r"/commit/", 503)
        hub.fail_next(r"/info/lfs/objects/batch", 429, headers={"Retry-After": "1"})
        hub.cut_next(r"/lfs-upload/")
        hub.lose_next(r"/commit/")
        page.locator("#publish").click()
        expect(page.locator("#job-head")).to_contain_text("Published:", timeout=300_000)
        assert page.locator("#publish-token input").input_value() == ""
        expect(page.locator("#changes")).to_be_hidden()
        expect(page.locator("#repo input, #repo textarea")).to_have_value(REPO)

        repo = hub.repos["model", REPO]
        assert len(repo.commits) == n_commits + 1, "a commit was made twice"
        assert repo.head.files["notes.txt"].data == b"mine"
        upload = folder / "9-publish" / "upload"
        for path in upload.iterdir():
            assert repo.head.files[path.name].data == path.read_bytes(), path.name
        assert hub.collections["alice/mine-65f1"] == [{"id": REPO, "type": "model"}]
        for path in store.root.rglob("*"):
            assert not path.is_file() or ALICE.encode() not in path.read_bytes(), path

        # A second time changes nothing.
        page.locator("#publish-token input").fill(ALICE)
        page.get_by_role("button", name="Preview upload").click()
        expect(page.locator("#changes")).to_contain_text("nothing is uploaded")
        assert os.environ.get("HF_TOKEN") is None
