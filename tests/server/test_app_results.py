"""A finished run on its page: a file in parts is one file, and its commands say what they need.

pytest tests/server/test_app_results.py
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import app_fixtures as fixtures
import pytest

from quantkit.run.artifacts import NAMES
from quantkit.run.events import EventLog
from quantkit.run.folder import RunDir
from quantkit.server.executors.protocol import RemoteState
from quantkit.server.previews import talk
from quantkit.server.runs.record import load_record, save_record
from quantkit.server.runs.store import RunStore
from quantkit.server.runs.view import RunView
from quantkit.server.web import results, view
from quantkit.server.web.form_handlers import Client
from quantkit.server.web.handlers import Handlers
from quantkit.server.web.visitor import Visitors

ME = Client("visitor:me", None, "1.2.3.4")
STEM = fixtures.GGUF.removesuffix(".gguf")
PARTS = [f"{STEM}-0000{i}-of-00002.gguf" for i in (1, 2)]


@pytest.fixture
def handlers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Handlers:
    """A page of a run that made one file in two parts."""
    made = fixtures.make_report()
    made["outputs"][0] |= {
        "label": "Q4_K_M",
        "parts": [{"name": name, "n_bytes": 500, "sha256": "ab" * 32} for name in PARTS],
    }
    monkeypatch.setattr(fixtures, "make_report", lambda: made)
    store = RunStore(tmp_path / "runs")
    folder = fixtures.own(fixtures.write_run(store.root / "done"), ME.owner)
    run = RunDir(folder)
    upload = folder / "9-publish" / "upload"
    for name in PARTS:
        (upload / name).write_bytes(b"GGUF" + bytes(500))
    (upload / fixtures.GGUF).unlink()
    described = tuple(run.describe(path) for path in sorted(upload.iterdir()))
    run.save_record(dataclasses.replace(run.records()["publish"], outputs=described))
    return Handlers(store, Visitors(b"k"), on_space=False, sign_in=False)


def view_of(handlers: Handlers, **fields: Any) -> RunView:
    return dataclasses.replace(handlers.store.view("done", ME.owner), **fields)


def test_a_file_in_parts_is_one_file(handlers: Handlers) -> None:
    run = view_of(handlers)
    assert run.tried == (PARTS[0],) and [file.n_bytes for file in run.models] == [1008]
    shown = handlers.shown("done", ME.owner)
    assert shown["tried"] == PARTS[0] and shown["can_try"]
    assert shown["collection"] == "", "one file is no family"
    html = str(shown["results"])
    for i, name in enumerate(PARTS, 1):
        assert f'download="{name}">Download part {i}<small>' in html
    path = handlers.store.root / "done" / "9-publish" / "upload" / PARTS[0]
    assert f"llama-server -m {path}<" in html and "llama-gguf-split --merge" in html


def test_a_part_that_is_not_here_is_not_half_a_file(handlers: Handlers) -> None:
    (handlers.store.root / "done" / "9-publish" / "upload" / PARTS[1]).unlink()
    store = RunStore(handlers.store.root)
    run = store.view("done", ME.owner)
    assert not run.can_try and run.tried == ()
    html = results.results(run)
    assert "Run it" not in html and "qk-download" not in html


def test_all_parts_can_be_read_by_what_answers(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def stream(_: str, arguments: Mapping[str, Any], **options: Any) -> Iterator[str]:
        given.update(options, **arguments)
        yield "yes"

    fake = SimpleNamespace(Limits=talk.sandbox.Limits, Crashed=RuntimeError, stream=stream)
    monkeypatch.setattr(talk, "sandbox", fake)
    assert list(handlers.talk("done", PARTS[0], "hello", False, ME)) == ["yes"]
    assert [path.name for path in given["readable"]] == PARTS
    assert Path(given["path"]).name == PARTS[0]


@pytest.mark.parametrize("is_private", [True, False, None])
def test_what_a_private_repository_needs_is_said(
    handlers: Handlers, is_private: bool | None
) -> None:
    url = "https://huggingface.co/alice/M-GGUF"
    html = results.results(view_of(handlers, published_url=url, repo_is_private=is_private))
    assert "llama-server -hf alice/M-GGUF:Q4_K_M" in html
    assert ("The repository is private. Ollama needs its key" in html) == (is_private is True)


def test_a_list_tells_runs_of_one_model_apart(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs")
    handlers = Handlers(store, Visitors(b"k"), on_space=False, sign_in=False)
    planned = dict.fromkeys(NAMES, 600.0)
    running = fixtures.write_run(store.root / "new", until="quantize", share=0.1, outcome=None)
    fixtures.alive(running, str(ME.owner), os.getpid())
    record = load_record(running)
    assert record is not None
    save_record(running, dataclasses.replace(record, stage_seconds=planned))
    done = fixtures.write_run(store.root / "old", outcome=None)
    EventLog(done / "events.jsonl").emit("publish", "finished", url="https://huggingface.co/a/b")
    EventLog(done / "events.jsonl").emit(None, "finished", "all stages are done")
    fixtures.own(done, ME.owner)
    new, old = sorted(handlers.run_list(ME.owner).split("<li>")[1:], key=lambda row: "old" in row)
    assert "like Q4_K_M" in new and "quantize 10 % · about" in new and " left" in new
    assert "like Q4_K_M" in old and " · published" in old and "published" not in new


@pytest.mark.parametrize(
    ("state", "stage", "words"),
    [
        ("running", "RUNNING", "stopped after 3 h at the latest · $0.14 so far"),
        ("interrupted", "RUNNING", "at the latest · $0.14 when it was last heard of"),
        ("finished", "RUNNING", "$0.14 in all"),
        ("failed", "ERROR", "$0.14 in all"),
    ],
)
def test_a_job_that_is_over_has_no_limit_ahead(
    handlers: Handlers, state: str, stage: str, words: str
) -> None:
    remote = RemoteState("1", "https://x", "t4-small", stage, 60.0, 0.14)
    about = {"executor": "hf_jobs", "is_remote": True, "machine": "t4-small", "hours": 3}
    head = view.head(view_of(handlers, state=state, remote=remote, **about))
    assert words in head and ("at the latest" in head) == ("in all" not in head)


def test_one_file_is_one_file(handlers: Handlers) -> None:
    run = view_of(handlers)
    assert "<summary>1 file</summary>" in view.files(view_of(handlers, files=run.files[:1]))
    assert "<summary>2 files</summary>" in view.files(view_of(handlers, files=run.files[:2]))
