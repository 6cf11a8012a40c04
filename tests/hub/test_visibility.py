"""What is published is as closed as what it is made of, unless the user says otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import ALICE, HubServer, running_hub
from hub_store import tiny_model
from test_fetch import make_run
from test_lora import Q, files_of, pair, write_adapter
from tiny_models import tiny_llama

from quantkit.errors import QuantkitError
from quantkit.files import write_json
from quantkit.hub.visibility import closed, why_private
from quantkit.run.folder import StageRecord
from quantkit.run.outputs import Outputs
from quantkit.sources.snapshot import load_snapshot
from quantkit.stages import fetch, publish

TARGET = "alice/Out-GGUF"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with running_hub(monkeypatch, tmp_path) as running:
        monkeypatch.setenv("QUANTKIT_HF_TOKEN", ALICE)
        yield running


def fetched(tmp_path: Path, model: str, **asked: Any) -> Any:
    run = make_run(tmp_path / "run", model)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, publish=TARGET, **asked))
    fetch.Fetch().execute(run)
    for stage in ("stitch", "validate"):  # whose files are held against their hashes
        run.dir.save_record(StageRecord(stage, {}, (), 0.0, {}))
    write_json(run.artifacts.outputs, Outputs((), ()))
    return run


def is_published_privately(server: HubServer, run: Any, tmp_path: Path) -> bool:
    folder = tmp_path / "upload"
    folder.mkdir(exist_ok=True)
    (folder / "x-EVO-Q4_K_M.gguf").write_bytes(b"GGUF")
    publish._upload(run, folder, [])
    return server.repos["model", TARGET].private


@pytest.mark.parametrize(
    ("source", "asked", "wanted"),
    [
        ({}, {}, False),
        ({}, {"private": True}, True),
        ({"private": True}, {}, True),
        ({"private": True}, {"private": True}, True),
        ({"private": True}, {"public": True}, False),
        ({"gated": True}, {}, True),
        ({"gated": True}, {"public": True}, False),
    ],
)
def test_as_its_model(
    server: HubServer, tmp_path: Path, source: dict, asked: dict, wanted: bool
) -> None:
    server.add_model("alice/tiny", tiny_model(), **source)
    run = fetched(tmp_path, "alice/tiny", **asked)
    assert is_published_privately(server, run, tmp_path) == wanted
    notes = run.dir.events_path.read_text()
    assert ("published privately, as nothing else was asked for" in notes) == (wanted and not asked)


@pytest.mark.parametrize("which", ["lora", "base"])
def test_a_lora_and_its_base(server: HubServer, tmp_path: Path, which: str) -> None:
    base = tiny_llama(tmp_path / "base")
    server.add_model("alice/base", files_of(base), private=which == "base")
    adapter = write_adapter(tmp_path / "a", pair(Q, 64, 64), "alice/base")
    server.add_model("alice/lora", files_of(adapter), private=which == "lora")
    run = fetched(tmp_path, "alice/lora")
    assert load_snapshot(run.dir).info.base is not None
    assert closed(load_snapshot(run.dir).info) == "private"
    assert is_published_privately(server, run, tmp_path)


def test_a_model_that_was_closed_since(server: HubServer, tmp_path: Path) -> None:
    repo = server.add_model("alice/tiny", tiny_model())
    run = fetched(tmp_path, "alice/tiny")
    assert why_private(run.config, load_snapshot(run.dir).info) is None
    repo.private = True
    assert is_published_privately(server, run, tmp_path)


def test_a_snapshot_of_the_hubs_cache(server: HubServer, tmp_path: Path) -> None:
    """A private model that is given by its place in the cache."""
    server.add_model("alice/tiny", tiny_model(), private=True)
    folder = load_snapshot(fetched(tmp_path, "alice/tiny").dir).folder
    (tmp_path / "again").mkdir()
    run = fetched(tmp_path / "again", str(folder))
    assert load_snapshot(run.dir).info.local_path is not None
    assert is_published_privately(server, run, tmp_path)


def test_a_public_place_for_a_private_model_is_refused_before_the_work(
    server: HubServer, tmp_path: Path
) -> None:
    server.add_model("alice/tiny", tiny_model(), private=True)
    server.add_model(TARGET, {"README.md": "mine"})
    with pytest.raises(QuantkitError, match="is public, but") as error:
        fetched(tmp_path, "alice/tiny")
    assert "--public" in error.value.remedy
    asked = [r for r in server.requests if r.path.endswith("model.safetensors") and not r.range]
    assert not asked
