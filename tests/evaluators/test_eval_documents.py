"""KL on documents: what is scored, against a numpy model, by domain, with documents as the unit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_fixtures import (
    NOISY,
    ONE,
    TEXT,
    TinySpec,
    log_softmax,
    reference_logits,
    run_json,
    write_tiny,
)

from evaluators import conversations, document_kl, kl
from evaluators.chat import Chat, Conversation
from evaluators.conversations import Dialogue
from evaluators.document_kl import DocumentLogits
from evaluators.documents import Documents, gather
from evaluators.errors import EvaluationError
from evaluators.llama_runtime import Model

__all__ = ["run_json"]  # a fixture: used by name

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}"
    "{{ eos_token }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BASE = TinySpec(n_ctx_train=4096, template=CHATML)


def talk(*said: str, tools: dict[str, Any] | None = None) -> Conversation:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    return Conversation(tuple(messages), tools or {})


TALKS = [
    Dialogue("chat", None, talk("Hi", "xyz 42!")),
    Dialogue("chat", None, talk("Hi", "w1", "and?", "qqq")),
    Dialogue("German", "languages", talk("Na?", "Gut, 7 x 7.")),
    Dialogue("Thai", "languages", talk("?", "z" * 30)),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    noisy = replace(NOISY, n_ctx_train=4096, template=CHATML)
    return write_tiny(folder / "base.gguf", BASE), write_tiny(folder / "noisy.gguf", noisy)


def text_of(path: Path, ids: np.ndarray) -> str:
    with Model(path, ONE) as model:
        # The tiny vocabulary has no piece for a space, but its three bytes.
        return model.text_of(ids.tolist(), special=True).replace("\u2581", " ")


def test_the_last_answer_is_scored_and_its_end(pair: tuple[Path, Path]) -> None:
    found = gather(pair[0], TALKS, runtime=ONE)
    assert (found.asked, found.reason, found.left_out) == ("chat template", "", {})
    second = found.documents[1]
    assert text_of(pair[0], second.ids[second.first + 1 :]) == "qqq</s>"
    before = text_of(pair[0], second.ids[: second.first + 1])
    assert before.endswith("<|user|>and?<|assistant|>") and "w1</s>" in before
    assert second.n_scored == len(second.ids) - 1 - second.first
    assert second.ids[0] == 1 and second.ids[-1] == 2


def test_kl_equals_two_independent_models(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = gather(pair[0], TALKS, TEXT, [32, 4096], ONE)
    assert list(found.left_out) == ["4,096 tokens"] or found.documents[-1].domain == "4,096 tokens"
    short = replace(found, documents=found.documents[:5])
    with DocumentLogits.compute(pair[0], short, tmp_path, ONE) as base:
        result = document_kl.measure(base, pair[1], ONE)
    for one, score in zip(short.documents, result.scores, strict=True):
        rows = slice(one.first, len(one.ids) - 1)
        p, q = (log_softmax(reference_logits(s, one.ids))[rows] for s in (BASE, NOISY))
        expected = (np.exp(p) * (p - q)).sum(axis=1)
        assert score.kl == pytest.approx(expected, rel=0.02, abs=2e-3)
        sure = np.abs(np.diff(np.sort(q)[:, -2:])).ravel() > 0.02
        same = p.argmax(axis=1) == q.argmax(axis=1)
        assert (score.same_top == same)[sure].all()
    assert list(result.domains) == ["chat", "German", "Thai", "32 tokens", "languages", "all"]
    every = np.concatenate([score.kl for score in result.scores[:4]])
    together = result.domains["all"]
    assert together.n_tokens == every.size and together.kl.n == 4
    assert together.kl.value == pytest.approx(every.mean())
    assert together.median.value == pytest.approx(np.median(every))
    assert together.max == every.max() > 0.05
    assert together.kl.ci95 is not None and together.kl.ci95[0] < every.mean() < together.kl.ci95[1]
    assert result.domains["chat"].kl.ci95 is None, "two documents have no interval"
    assert result.domains["languages"].kl.n == 2 and together.kl.is_rough


def test_a_file_has_no_divergence_from_itself(pair: tuple[Path, Path]) -> None:
    with DocumentLogits.compute(pair[0], gather(pair[0], TALKS, runtime=ONE), None, ONE) as base:
        result = document_kl.measure(base, pair[0], ONE)
        floor = document_kl.measure_weights(base, pair[0], None, ONE)
    assert abs(result.domains["all"].kl.value) < 1e-6 and result.domains["all"].top1.value == 1
    # What F16 takes from weights and activations of this very model
    assert 1e-8 < floor.domains["all"].kl.value < 1e-3


def test_stores_are_used_again(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = gather(pair[0], TALKS, runtime=ONE)
    calls: list[tuple[int, int]] = []
    DocumentLogits.compute(pair[0], found, tmp_path, ONE, lambda *c: calls.append(c)).close()
    assert calls == [(i, 4) for i in range(1, 5)]
    monkeypatch.setattr(document_kl, "_decoded", None)
    DocumentLogits.compute(pair[0], found, tmp_path, ONE).close()
    fewer = replace(found, documents=found.documents[:3])
    with pytest.raises(TypeError):
        DocumentLogits.compute(pair[0], fewer, tmp_path, ONE)
    (store,) = tmp_path.glob("*.document-logits")
    store.write_bytes(store.read_bytes()[:-1])
    with pytest.raises(EvaluationError, match="incomplete"):
        DocumentLogits.compute(pair[0], found, tmp_path, ONE)


def test_contexts_are_made_for_what_follows(pair: tuple[Path, Path]) -> None:
    """Long ones after short ones and before them: the figures of a document are its own."""
    found = gather(pair[0], TALKS, TEXT, [2048, 64], ONE)
    with DocumentLogits.compute(pair[0], found, None, ONE) as base:
        forward = document_kl.measure(base, pair[1], ONE)
    turned = replace(found, documents=found.documents[::-1])
    with DocumentLogits.compute(pair[0], turned, None, ONE) as base:
        backward = document_kl.measure(base, pair[1], ONE)
    for a, b in zip(forward.scores, backward.scores[::-1], strict=True):
        assert a.kl == pytest.approx(b.kl, rel=1e-3, abs=1e-6)


def test_long_documents_are_scored_at_their_end(pair: tuple[Path, Path]) -> None:
    found = gather(pair[0], [], TEXT, [1024, 2048, 8192], ONE)
    assert found.left_out == {"8,192 tokens": "The model was trained for 4,096 tokens."}
    assert {(len(d.ids), d.first, d.n_scored) for d in found.documents} == {
        (1024, 512, 511),
        (2048, 1535, 512),
    }
    assert all(d.ids[0] == 1 for d in found.documents)
    short = gather(pair[0], TALKS, "too short", [1024], ONE)
    assert short.left_out["1,024 tokens"].startswith("The text has")
    with pytest.raises(EvaluationError, match="No document"):
        gather(pair[0], [], "too short", [1024], ONE)


def test_another_model_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other.gguf", replace(BASE, n_vocab=321))
    with DocumentLogits.compute(pair[0], gather(pair[0], TALKS, runtime=ONE), None, ONE) as base:
        with pytest.raises(EvaluationError, match="321 tokens in its vocabulary"):
            document_kl.measure(base, other, ONE)


CALL = Conversation(
    (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
    ),
    {"f": {"properties": {"x": {"type": "integer"}}}},
)


@pytest.mark.parametrize(
    ("template", "reply"),
    [
        (
            CHATML.replace(
                "{{ m.content }}", "{{ m.content }}{{ m.tool_calls[0].function if m.tool_calls }}"
            ).replace("{% for", "{{ tools | tojson if tools }}{% for", 1),
            "{'name': 'f', 'arguments': {'x': 1}}</s>",
        ),
        (CHATML, '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call></s>'),
        ("{{ messages[0].content }}?", ""),  # renders no answers
    ],
    ids=["its own calls", "no tools", "no answers"],
)
def test_a_reply_is_rendered_as_it_would_be_said(template: str, reply: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "model.gguf", replace(BASE, template=template))
    with Model(path, ONE) as model:
        before, found = Chat(model).with_reply(CALL)
        said = model.text_of(found.tolist(), special=True).replace("\u2581", " ")
    assert said == reply if reply else '<tool_call>\n{"name": "f"' in said
    assert len(before) > 2


def test_plain_text_where_there_is_no_template(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "plain.gguf", replace(BASE, template=None))
    found = gather(path, TALKS[:1], runtime=ONE)
    assert found.asked == "plain text"
    one = found.documents[0]
    assert text_of(path, one.ids[1:]).strip() == "User: Hi\n\nAssistant: xyz 42!"


def test_conversations_of_the_package() -> None:
    found = conversations.dialogues()
    domains = {one.domain for one in found}
    assert {"chat", "code", "tools", "mathematics"} < domains
    assert len({one.domain for one in found if one.group == "languages"}) == 8
    assert len(conversations.dialogues(limit=1)) == len(domains) == 12
    assert len({str(one.talk.messages[-1]) + str(one.talk.messages[0]) for one in found}) > 50


def test_a_conversation_without_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "x"}]}')
    with pytest.raises(EvaluationError, match="not an assistant's answer"):
        conversations.dialogues(path)
    path.write_text("\n")
    with pytest.raises(EvaluationError, match="no conversations"):
        conversations.dialogues(path)


ROWS = [
    {"domain": domain, "group": group, "messages": list(talk("Hi", said).messages)}
    for domain, group, said in (
        ("chat", None, "xyz 42!"),
        ("chat", None, "not the first"),
        ("Thai", "languages", "qqq"),
    )
]


def test_the_command(
    pair: tuple[Path, Path],
    tmp_path: Path,
    run_json: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = ["--domains", "--documents", "1", "--long", "64,8192", "--weight-kl"]
    options += ["--conversations", str(path)]
    found = run_json(kl.main, *pair, *options)
    (row,) = found["files"]
    assert set(row["domains"]) == set(row["weight_domains"]) == set(found["floor"])
    assert list(row["domains"]) == ["chat", "Thai", "64 tokens", "languages", "all"]
    assert row["domains"]["all"]["kl"]["n"] == 2 and found["n_documents"] == 3
    assert found["floor"]["all"]["kl"]["value"] < row["domains"]["all"]["kl"]["value"]
    assert list(found["left_out"]) == ["8,192 tokens"]
    assert kl.main([*map(str, pair), *options, "--threads", "1", "--table"]) == 0
    said = capsys.readouterr().out
    assert "floor" in said and "8,192 tokens left out" in said
    assert kl.main([*map(str, pair), "--domains", "--text", str(tmp_path)]) == 1
    assert "brings its own texts" in capsys.readouterr().err


def test_what_is_measured_is_named_by_its_tokens(pair: tuple[Path, Path]) -> None:
    found = gather(pair[0], TALKS, runtime=ONE)
    moved = [replace(one, first=one.first - 1) for one in found.documents]
    others = {found.sha256(), replace(found, documents=tuple(moved)).sha256()}
    others.add(Documents(found.documents[1:], "", "", {}).sha256())
    assert len(others) == 3 and found.sha256() == gather(pair[0], TALKS, runtime=ONE).sha256()
