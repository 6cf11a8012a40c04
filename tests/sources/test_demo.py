"""The demo's checkpoint is made once. That it is right is the slow tests' business."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.sources import demo


def test_it_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_version", lambda: "1")
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path / "home"))
    made = []

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        made.append(folder)
        if len(made) == 1:
            raise RuntimeError("killed in the middle")

    monkeypatch.setattr(demo, "_make", make)
    with pytest.raises(RuntimeError):
        demo.make_checkpoint(tmp_path / "first")
    assert list((tmp_path / "home").glob("demo-*")) == []
    for name in ("second", "third"):
        demo.make_checkpoint(tmp_path / name)
        (tmp_path / name / "config.json").write_text("spoilt")  # a copy, not the kept file
    demo.make_checkpoint(tmp_path / "fourth")
    assert (tmp_path / "fourth" / "config.json").read_text() == "{}" and len(made) == 2


def test_what_a_killed_one_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_version", lambda: "1")
    monkeypatch.setattr(demo, "_make", Path.mkdir)
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path))
    left = tmp_path / "demo-made-by-another" / "checkpoint"
    left.mkdir(parents=True)
    demo.make_checkpoint(tmp_path / "first")
    assert [path.name for path in tmp_path.glob("demo-*")] == ["demo-1"]


def test_without_the_package_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import metadata

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(demo.QuantkitError, match="not installed"):
        demo.make_checkpoint(tmp_path)
