"""The tokenizer of calibrate: transformers' own, asked in a process that can do no harm."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_llama

from quantkit.calibration.tokenizer import Tokenizer
from quantkit.errors import QuantkitError
from quantkit.llamacpp.answering import Answering
from quantkit.model.blockwise import load_tokenizer
from quantkit.sandbox import untrusted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tokenizer") / "model", tokenizer="bpe")


@pytest.fixture(scope="module")
def both(folder: Path) -> Iterator[tuple[Any, Tokenizer]]:
    yield load_tokenizer(folder), Tokenizer(folder)


@given(text=st.text(max_size=200), special=st.booleans())
def test_ids_and_texts_are_those_of_transformers(
    both: tuple[Any, Tokenizer], text: str, special: bool
) -> None:
    theirs, ours = both
    text = text.encode("utf-8", "replace").decode()
    ids = theirs(text, add_special_tokens=special).input_ids
    assert ours(text, add_special_tokens=special).input_ids == ids
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_what_is_told_of_it(both: tuple[Any, Tokenizer]) -> None:
    theirs, ours = both
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template
    assert ours("a b", return_tensors="pt").input_ids.tolist() == [theirs("a b").input_ids]


@pytest.mark.parametrize("beside", ["folder", "code", "templates"])
def test_what_lies_beside_it(both: tuple[Any, Tokenizer], tmp_path: Path, beside: str) -> None:
    """A download's own folder, or code that the files name: the tokenizer is the same."""
    theirs, _ = both
    folder = tiny_llama(tmp_path / "model", tokenizer="bpe")
    if beside == "folder":
        (folder / ".cache/huggingface").mkdir(parents=True)
    elif beside == "templates":
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/tool_use.jinja").write_text("{{ messages }}")
    else:
        (folder / "tokenization_x.py").write_text("raise SystemExit")
        path = folder / "tokenizer_config.json"
        named = {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
        path.write_text(json.dumps({**json.loads(path.read_text()), **named}))
    before = set(Path(tempfile.gettempdir()).glob("quantkit-codeless-*"))
    tokenizer = Tokenizer(folder)
    assert tokenizer("a b").input_ids == theirs("a b").input_ids
    del tokenizer
    gc.collect()
    assert set(Path(tempfile.gettempdir()).glob("quantkit-codeless-*")) <= before


@pytest.mark.parametrize("broken", ['{"model": {"type": "BPE"}}', "[", '{"model": 3}'])
def test_one_that_cannot_be_loaded(folder: Path, tmp_path: Path, broken: str) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_text(broken)
    with pytest.raises(QuantkitError, match="tokenizer"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "answer", [{}, {"ids": [1]}, {"error": [], "remedy": ""}, "x", [1.5], [True], [-1], [2**40]]
)
def test_ids_that_are_none(
    both: tuple[Any, Tokenizer], answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer that has taken its process over may say anything."""
    monkeypatch.setattr(Answering, "ask", lambda self, _, shape: untrusted.typed(shape, answer))
    with pytest.raises(QuantkitError, match="not token ids|not asked for"):
        both[1]("text")


def test_a_process_that_is_gone(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    tokenizer._process.close()
    with pytest.raises((QuantkitError, OSError)):
        tokenizer("text")
