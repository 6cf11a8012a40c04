"""Strangers' words on a terminal, names that no record can hold, a terminal's words elsewhere."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterator
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
from quantkit.server.web import words

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


# A message is for everybody; only a remedy may speak to a terminal, and `words` says it for others.

# What only a command reaches: at a terminal, or before a server listens.
AT_A_TERMINAL = (
    *("cli", "rebuild", "pipeline", "planning", "verifying", "ranks", "checks", "run/terminal"),
    *("server/web/origin", "server/web/listen", "server/runs/store"),
)


def literals(node: ast.expr) -> Iterator[str]:
    """The texts that an argument can be, with X for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(v.value) if isinstance(v, ast.Constant) else "X" for v in node.values)
    elif isinstance(node, ast.IfExp):
        yield from (*literals(node.body), *literals(node.orelse))
    elif isinstance(node, ast.BinOp):
        ends = list(literals(node.right)) or [""]
        yield from (start + end for start in literals(node.left) for end in ends)


def told() -> Iterator[tuple[str, str, list[str]]]:
    """Module, message and remedies of every error and event that stands in the code."""
    root = Path(words.__file__).parents[2]
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root).with_suffix("").as_posix()
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = getattr(call.func, "id", getattr(call.func, "attr", ""))
            first = 2 if name == "emit" else 1 if name == "Refused" else 0
            if name.endswith(("Error", "Token", "NotFound", "Off", "Refused", "emit", "_say")):
                said, *more = call.args[first:] or [call.args[0]]
                remedies = [text for arg in more for text in literals(arg)]
                yield from ((module, message, remedies) for message in literals(said))


def test_only_remedies_speak_to_a_terminal() -> None:
    found = list(told())
    assert len(found) > 300
    for module, message, _ in found:
        if not module.startswith(AT_A_TERMINAL):
            about = message.replace("local folder", "folder")  # that was given is no advice
            assert not words.TERMINAL.search(about), f"{module}: {message}"


@pytest.mark.parametrize("reader", [words.of_page(True, True), words.of_api(True)])
def test_what_is_left_of_a_remedy_is_sentences(reader: words.Audience) -> None:
    remedies = {text for _, _, texts in told() for text in texts if words.TERMINAL.search(text)}
    assert len(remedies) > 40
    for remedy in remedies:
        said = reader.words(remedy)
        assert said[0].isupper() and said.endswith((".", "X")), (remedy, said)
        assert not words.TERMINAL.search(said) and " or which" not in said, (remedy, said)
