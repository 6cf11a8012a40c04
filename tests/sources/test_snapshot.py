"""Where another rank finds the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from quantkit import hub
from quantkit.errors import QuantkitError
from quantkit.sources.snapshot import Place


def test_a_rank_finds_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the same path, else at its commit in this machine's cache, else it says what to do."""
    there, cache = tmp_path / "there", tmp_path / "cache"
    monkeypatch.setattr(hub, "cached_snapshot", lambda repo, sha: cache / repo / sha)
    place = Place(str(there), {"config.json": 2, "a/x.safetensors": 3}, "me/model", "abc")
    with pytest.raises(QuantkitError, match="does not have the model's files") as raised:
        place.find()
    assert "hf download me/model --revision abc" in raised.value.remedy
    for folder in (cache / "me" / "model" / "abc", there):
        (folder / "a").mkdir(parents=True)
        (folder / "config.json").write_text("{}", "utf-8")
        (folder / "a" / "x.safetensors").write_text("123", "utf-8")
        assert place.find() == folder
    (there / "config.json").write_text("{} ", "utf-8")  # another file of that name
    assert place.find() == cache / "me" / "model" / "abc"
    local = dataclasses.replace(place, repo=None)
    with pytest.raises(QuantkitError, match=str(there)) as raised:
        local.find()
    assert "on a disk that all machines share" in raised.value.remedy
