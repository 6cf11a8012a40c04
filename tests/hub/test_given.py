"""Files that a command line names: what they are called, and that they mean the same everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer, running_hub

from quantkit.cli import main
from quantkit.config import RunConfig, calibration
from quantkit.errors import UsageError
from quantkit.hub import given
from quantkit.hub.errors import ModelNotFound
from quantkit.hub.given import short_names
from quantkit.run.folder import read_json


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with running_hub(monkeypatch, tmp_path) as running:
        yield running


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["/a/x.gguf", "hf://o/n/y.gguf"], ["x.gguf", "y.gguf"]),
        (
            ["hf://bartowski/L-GGUF/x.gguf", "hf://unsloth/L-GGUF@main/x.gguf", "/z.gguf"],
            ["bartowski/L-GGUF/x.gguf", "unsloth/L-GGUF@main/x.gguf", "z.gguf"],
        ),
        (["/tmp/a/x.gguf", "/tmp/b/x.gguf"], ["a/x.gguf", "b/x.gguf"]),
    ],
)
def test_files_of_one_name(names: list[str], shown: list[str]) -> None:
    assert short_names(names) == shown


def test_paths_in_a_calibration_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.txt").write_text("x")
    (tmp_path / "a:b.jsonl").write_text("x")
    monkeypatch.chdir(tmp_path)
    said = f"docs:2,{tmp_path}/own.txt:0.5,{tmp_path}/a:b.jsonl"
    assert calibration.absolute("docs:2, own.txt:0.5,a:b.jsonl") == said
    assert [r.weight for r in calibration.parse_spec(said)] == [2, 0.5, 1]
    with pytest.raises(UsageError, match="no calibration text none.txt"):
        calibration.absolute("none.txt:2")


def test_what_is_missing_is_said_before_the_work(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--eval-text", "--tasks"):
        out = tmp_path / option
        code = main(["run", str(tiny_checkpoint), "--out", str(out), option, "none.txt"])
        assert code == 2 and "There is no file none.txt" in capsys.readouterr().err
        assert not out.exists()


def test_a_run_remembers_where_its_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    config = ["--eval-text", "own.txt", "--calibration", "own.txt", "--profile", "demo"]
    assert main(["run", "missing-model", "--out", "run", *config]) != 0
    found = RunConfig.from_json(read_json(tmp_path / "run" / "config.json"))
    assert (found.eval_text, found.calibration) == (str(tmp_path / "own.txt"),) * 2


def test_files_on_the_hub_are_looked_for(server: HubServer) -> None:
    """Before a run that would miss them at its end; models in parts are whole or not there."""
    whole = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    names = [*whole, "q/n-00001-of-00002.gguf", "x.gguf", "x-imatrix.gguf"]
    server.add_model("lab/m", {name: b"x" * (i + 1) for i, name in enumerate(names)})
    there = ["hf://lab/m/x.gguf", f"hf://lab/m/{whole[0]}", "/a/local.gguf"]
    assert given.check_there(there, None) is None
    for missing in ("y.gguf", "q/n-00001-of-00002.gguf"):
        with pytest.raises(UsageError, match="lab/m has no file"):
            given.check_there([*there, f"hf://lab/m/{missing}"], None)
    with pytest.raises(ModelNotFound):
        given.check_there(["hf://lab/none/x.gguf"], None)
    assert given.gguf_files("lab/m", None) == {whole[0]: 3, "x.gguf": 4}
    server.fail_next("/paths-info/", 503, times=50)
    assert given.check_there(there, None)


def test_a_model_in_parts_is_brought_whole(server: HubServer) -> None:
    """Of one commit, which the branch leaves in the meantime."""
    whole = ["q/m-00001-of-00002.gguf", "q/m-00002-of-00002.gguf"]
    server.add_model("lab/m", {name: name.encode() for name in whole})
    path = given.locate(f"hf://lab/m/{whole[0]}")
    assert path.read_text() == whole[0]
    assert (path.parent / "m-00002-of-00002.gguf").read_text() == whole[1]
