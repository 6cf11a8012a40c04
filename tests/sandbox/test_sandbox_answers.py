"""What the parent makes of answers that hostile code in the sandbox gave: a sentence, soon.

pytest tests/sandbox/test_sandbox_answers.py
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_gguf import write_llama

from evaluators.errors import EvaluationError
from evaluators.figures import Agreement
from evaluators.llama_runtime import Context, Model, Runtime
from quantkit.errors import QuantkitError
from quantkit.evidence import parity
from quantkit.gguf_file.read import GgufFile
from quantkit.llamacpp import chat, contexts, templates, tokens
from quantkit.llamacpp.converter import floor
from quantkit.llamacpp.converter import sandbox as converter_sandbox
from quantkit.planning import plan
from quantkit.server.previews import talk
from quantkit.sources import fit

ESCAPE = "\x1b[2J" * 10_000
RIGHT = {"wrong": [], "apart": [], "n_vocab": 5, "n_texts": 1, "ids": [1], "text": "plain text"}


@pytest.mark.parametrize(
    "changes",
    [
        {"n_vocab": "x"},
        {"n_vocab": float("inf")},
        {"wrong": "abc"},
        {"apart": [ESCAPE, 1]},
        {"ids": ["a"]},
        {"ids": [1.5]},
        {"text": {"a": 1}},
        {"more": 1},
        {"error": 5},
    ],
)
def test_tokens_that_cannot_be_read(changes: dict[str, Any]) -> None:
    check = tokens.judged({**RIGHT, **changes}).check
    assert not check.passed and check.about.startswith("not compared")


def test_words_of_tokens_are_plain() -> None:
    found = tokens.judged({**RIGHT, "apart": [ESCAPE], "ids": [1] * 10**5, "text": ESCAPE})
    for words in (found.check.about, found.text, *found.apart, *found.notes):
        assert words.isprintable() and len(words) <= 2000
    assert len(found.ids) == tokens.MOST_IDS
    assert tokens.judged({"error": ESCAPE}).check.about.isprintable()
    with pytest.raises(QuantkitError) as it:
        tokens.judged({**RIGHT, "wrong": [ESCAPE]})
    assert str(it.value).isprintable() and len(str(it.value)) < 3000


@pytest.mark.parametrize("said", [5, [5], {"a": 1}, "</s>"])
def test_ends_that_are_none(said: Any) -> None:
    with pytest.raises(QuantkitError, match="another kind than was asked for"):
        converter_sandbox._updated(converter_sandbox.Said(), {"missed_ends": said})


def test_a_number_of_blocks_costs_nothing() -> None:
    report = {
        **dict.fromkeys(("mismatched", "failed", "odd_types", "unread", "unread_targets"), []),
        **{"missing": ["blocks.3.x"], "blocks": "blocks", "n_blocks": 10**18, "head": ""},
        **{"activation": None, "tied": [], "widths": [], "model": "Model"},
    }
    with pytest.raises(QuantkitError, match=r"lacks blocks\.3\.x"):
        fit.judge(report, {}, {})


def test_words_of_an_oracle_are_plain() -> None:
    base: Any = SimpleNamespace(metadata={"general.architecture": "llama"})
    measured = Agreement(0.0, 0.0, 0.0, 1.0, 2)
    said = {"oracle": ESCAPE, "passed_over": [ESCAPE]}
    for found in ({**said, "error": ESCAPE}, said, {**said, "agreement": measured}):
        about = parity.judged(base, found).about
        assert about.isprintable() and len(about) < 5000
    with pytest.raises(QuantkitError) as it:
        parity.judged(base, {**said, "missing": [ESCAPE] * 10**5})
    assert str(it.value).isprintable() and len(str(it.value)) < 1000


@pytest.mark.parametrize("number", ["9" * 400, "1.2.3", "1e400"])
def test_sizes_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    log = f"size = {number} MiB ( 256 cells)\ncompute buffer size = {number} MiB"
    monkeypatch.setattr(contexts.sandbox, "call", lambda *_, **__: [log] * len(contexts._PROBES))
    base = GgufFile(write_llama(tmp_path / "a.gguf"))
    assert contexts.context_memory(base).note


class _Liar:
    """Answers one request after the other, whatever is asked."""

    answers: tuple[bytes, ...] = ()

    def __init__(
        self, descriptors: dict[str, int], readable: Sequence[Path], writable: Path | None
    ) -> None:
        requests, answers = os.dup(descriptors["requests"]), os.dup(descriptors["answers"])

        def answer() -> None:
            with open(requests, "rb") as asked, open(answers, "wb", buffering=0) as told:
                for _, line in zip(asked, self.answers, strict=False):
                    told.write(line + b"\n")

        self._thread = threading.Thread(target=answer)
        self._thread.start()

    def end(self) -> str:
        self._thread.join()
        return "lied"


OPENED = {"n_vocab": 9, "n_params": 9, "n_ctx_train": 9, "adds_bos": True, "bos": 1, "eos": 2}
OPENED["is_recurrent"] = False


def _value(value: Any) -> bytes:
    return json.dumps({"value": value}).encode()


@pytest.fixture
def lying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Model]:
    """A model whose process answers so."""
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))

    def opened(*answers: bytes) -> Model:
        monkeypatch.setattr(_Liar, "answers", answers)
        return Model(tmp_path / "a.gguf", Runtime(1, launch=_Liar))

    return opened


@pytest.mark.parametrize(
    "answer",
    [
        *(_value({**OPENED, "n_vocab": said}) for said in ("x", None, [], 0, -1, 2**24, 1e300)),
        b'{"value": {"n_vocab": Infinity}}',
        *map(_value, (None, 5, [], {})),
        b'{"error": 5}',
        b'{"error": ["only one"]}',
        b'{"error": [1, 2, 3]}',
        b"[" * 10**5,
        b"[]",
        b'{"value": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_file_opened_by_a_liar(lying: Callable[..., Model], answer: bytes) -> None:
    with pytest.raises(EvaluationError) as it:
        lying(answer)
    assert it.value.message.isprintable() and len(it.value.message) < 1000


@pytest.mark.parametrize(
    ("ask", "value"),
    [
        *((lambda m: m.tokenize("a"), v) for v in (5, "abc", [[1]], [1.5], [2**40], None, [True])),
        *((lambda m: m.ends(), v) for v in ([[1]], 5, [{}], None)),
    ],
)
def test_what_a_liar_answers(
    lying: Callable[..., Model], ask: Callable[[Model], Any], value: Any
) -> None:
    with lying(_value(OPENED), _value(value)) as model, pytest.raises(EvaluationError):
        ask(model)


def test_tokens_beyond_the_vocabulary(lying: Callable[..., Model]) -> None:
    """They would be rows outside of the logits."""
    with lying(_value(OPENED), _value(None), _value(None)) as model, Context(model, 8, 8, 8) as it:
        ids = np.array([9], np.int32)
        with pytest.raises(EvaluationError, match="outside the 9"):
            it.decode(ids, np.zeros(1, np.int32), np.ones(1, np.int8))


@pytest.mark.parametrize("said", [b"[" * 50_000, b"5", b"{}", b'{"text": [1]}', b'{"error": {}}'])
def test_a_template_that_answers_itself(monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    class Said:
        def __init__(self, job: Any) -> None:
            self._requests = os.dup(job.inherited[0])
            os.write(job.inherited[1], said + b"\n")

        def end(self) -> str:
            os.close(self._requests)
            return "lied"

    monkeypatch.setattr("quantkit.llamacpp.answering.Sandboxed", Said)
    tokenizer = SimpleNamespace(special_tokens_map={}, get_chat_template=lambda: "")
    try:
        template = chat.ChatTemplate(tokenizer)
        text = template.render([])
    except QuantkitError as error:
        assert str(error).isprintable()
    else:
        assert template._process is not None
        template._process.close()
        assert text == "[1]"


def test_an_answer_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is sent the whole of it with every part: it ends where an honest one would."""

    def stream(*_: Any, **__: Any) -> Iterator[str]:
        while True:
            yield "x" * 1000

    monkeypatch.setattr(talk.sandbox, "stream", stream)
    path = tmp_path / "a"
    path.touch()
    started = time.monotonic()
    *_, last = talk.say(path, [])
    assert len(last) <= 100 * talk.MAX_TOKENS and time.monotonic() - started < 30


def test_links_of_a_model_show_nothing(tmp_path: Path) -> None:
    """A clone keeps a stranger's links: what they lead to is not shown to what reads the model."""
    secrets, model = tmp_path / "secrets", tmp_path / "model"
    secrets.mkdir()
    model.mkdir()
    (secrets / "token").write_text("hf_secret")
    (model / "notes").symlink_to(secrets / "token")
    (model / "root").symlink_to("/etc")
    assert templates.readable(model) == (model.resolve(),)
    # In the Hub's cache every file is a link, to one folder.
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b/snapshots/1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "1").write_text("{}")
    (snapshot / "config.json").symlink_to(blobs / "1")
    (snapshot / "notes").symlink_to(secrets / "token")
    assert set(templates.readable(snapshot)) == {blobs.resolve(), snapshot.resolve()}


def test_code_is_looked_for_at_any_depth(tmp_path: Path) -> None:
    """In a folder below, and a file in a closed folder."""
    inner = tmp_path / "package" / "inner"
    inner.mkdir(parents=True)
    assert floor.writable_code([str(tmp_path / "package")], "/proc") == str(tmp_path / "package")
    assert floor.writable_code([str(tmp_path / "none")], "/proc") is None
    assert floor.writable_code([], str(tmp_path)) == str(tmp_path)
    assert not list(tmp_path.glob("**/quantkit-probe-*"))


def test_what_the_converter_wrote_is_a_strangers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before llama.cpp reads it outside the sandbox, for types, it is looked at."""
    asked: list[Path] = []
    monkeypatch.setattr(plan, "quantizable_tensors", lambda path: asked.append(path) or set())
    base = GgufFile(write_llama(tmp_path / "a.gguf"))
    assert plan.specs_of(base) and asked
    for name, value in (("llama.block_count", "two"), ("llama.context_length", [1])):
        base = GgufFile(tmp_path / "a.gguf")
        base.fields[name] = SimpleNamespace(value=value)  # type: ignore[index]
        with pytest.raises(QuantkitError, match="no whole number"):
            plan.specs_of(base)
        if "context" in name:
            with pytest.raises(QuantkitError, match="which context length"):
                base.context_length  # noqa: B018
    assert len(asked) == 1
