"""Strangers' words on a terminal, and names that no record can hold."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from commands import quantkit
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_llama

from quantkit import hub, sources
from quantkit.cli import main
from quantkit.errors import QuantkitError, printable
from quantkit.evidence.escaping import markdown
from quantkit.run.events import Event
from quantkit.run.terminal import Printer

STEERING = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp\r\nfailed: all"


@given(st.text())
def test_nothing_steers_a_terminal(text: str) -> None:
    shown = printable(text, "")
    assert shown.isprintable()
    shown.encode()
    assert printable("größer 日本語") == "größer 日本語"
    assert not set(markdown(text)) & set("<>[]*`|\\@~\n")


def test_events_and_plans(capsys: pytest.CaptureFixture[str]) -> None:
    Printer()(Event(0.0, "fetch", "note", f"license {STEERING}", {}))
    said = capsys.readouterr().err
    assert "\\u001b]0;owned\\u0007" in said and "\\u009b31m" in said and "\\u202egnp" in said
    assert len(said.splitlines()) == 1 and said.strip().isprintable()
    assert main(["plan", f"x/{STEERING}"]) == 2
    assert capsys.readouterr().err.rstrip("\n").isprintable()


@pytest.mark.slow
def test_a_license_in_a_plan(tmp_path: Path, offline: dict[str, str]) -> None:
    folder = tiny_llama(tmp_path / "tiny")
    (folder / "README.md").write_text(f"---\nlicense: {json.dumps(STEERING)}\n---\n")
    answer = quantkit("plan", folder, "--calibration", "docs", env=offline)
    assert answer.code == 0, answer.err
    assert "owned" in answer.out
    assert all(line.isprintable() for line in (answer.out + answer.err).splitlines())


def test_names_that_are_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that are no UTF-8 ended as a traceback where they were written down."""
    monkeypatch.chdir(tmp_path)
    bad = os.fsdecode(b"na\xefve.txt")
    Path(bad).write_text("some text")
    Path(bad + "-folder").mkdir()
    model = str(tiny_llama(tmp_path / "tiny"))
    for command in (
        ["plan", model, "--calibration", bad],
        ["plan", model, "--eval-text", bad],
        ["plan", f"{bad}-folder"],
        ["run", model, "--out", bad + "-run"],
    ):
        assert main(command) == 2, command
        said = capsys.readouterr().err
        assert "Traceback" not in said
        said.encode()
    (tmp_path / "tiny" / bad).write_text("a license, perhaps")
    assert bad not in {file.path for file in sources.inspect(hub.parse_reference(model)).files}


def test_a_link_to_such_a_name(tmp_path: Path) -> None:
    real = tmp_path / os.fsdecode(b"m\xff")
    tiny_llama(real)
    (tmp_path / "link").symlink_to(real)
    with pytest.raises(QuantkitError, match="cannot be shown"):
        hub.parse_reference(str(tmp_path / "link"))
