"""Greedy answers of two files beside each other, against a numpy model; how they are asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
import pytest
from eval_fixtures import (
    NOISY,
    ONE,
    SPEC,
    TinyFiles,
    TinySpec,
    byte_ids,
    reference_logits,
    run_json,
    tiny,
    write_tiny,
)

from evaluators import conversations, generation, greedy
from evaluators.beside import Asked, Reply, compare_replies
from evaluators.chat import Chat, Conversation
from evaluators.conversations import Prompt
from evaluators.errors import EvaluationError
from evaluators.greedy import Answer
from evaluators.llama_runtime import Model

__all__ = ["run_json", "tiny"]  # fixtures: used by name

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
ENOUGH = TinySpec(n_ctx_train=8192, template=CHATML)
PROMPTS = [byte_ids(text) for text in ("xyz: 42", "qq", "17!" * 9, "w", "zzzz?", "k" * 40, "", "9")]


def by_hand(spec: TinySpec, prompt: Sequence[int], n: int) -> tuple[list[int], float]:
    """Greedy by the numpy model, and how near the nearest tie was."""
    ids, margin = list(prompt), np.inf
    for _ in range(n):
        row = reference_logits(spec, np.array(ids))[-1]
        first, second = np.sort(row)[[-1, -2]]
        margin = min(margin, first - second)
        ids.append(int(row.argmax()))
        if ids[-1] == 2:
            break
    return ids[len(prompt) :], float(margin)


def test_answers_are_those_of_an_independent_model(tiny: TinyFiles) -> None:
    with Model(tiny.base, ONE) as model:
        found = greedy.answer_all(model, PROMPTS, 10)
        chosen = greedy.choices(model, PROMPTS, found)
    n_sure = 0
    for prompt, answer, ids in zip(PROMPTS, found, chosen, strict=True):
        expected, margin = by_hand(SPEC, prompt.tolist(), 10)
        if margin > 0.02:  # keys and values are 16-bit floats
            n_sure += 1
            assert list(answer.tokens) == expected == ids.tolist()
        assert answer.ended == (answer.tokens[-1] == 2)
    assert n_sure > 4


def test_places_change_nothing(tiny: TinyFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, or side by side with places that are taken again."""
    calls: list[tuple[int, int]] = []
    with Model(tiny.base, ONE) as model:
        together = greedy.answer_all(model, PROMPTS, 12, lambda *call: calls.append(call))
        for n in (4, 8):
            monkeypatch.setattr(greedy, "_SIDE_BY_SIDE", n)
            assert greedy.answer_all(model, PROMPTS, 12) == together
        monkeypatch.setattr(greedy, "rows_are_independent", lambda *_: False)
        assert greedy.answer_all(model, PROMPTS, 12) == together, "one after the other"
        assert greedy.answer_all(model, [], 12) == []
    assert calls[-1] == (len(PROMPTS), len(PROMPTS))
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_what_else_is_asked_changes_nothing(tiny: TinyFiles, tmp_path: Path) -> None:
    """Of a quantized file, whose rows llama.cpp sums up by fours where it can."""
    path = tmp_path / "q4.gguf"
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = lib.LLAMA_FTYPE_MOSTLY_Q4_0, 1
    assert lib.llama_model_quantize(os.fsencode(tiny.base), os.fsencode(path), params) == 0
    more = [*PROMPTS, *(byte_ids(text) for text in ("hm", "y" * 9, "12", "zx"))]
    with Model(path, ONE) as model:
        every = greedy.answer_all(model, more, 30)
        assert greedy.answer_all(model, more[::-1], 30) == every[::-1]
        assert greedy.answer_all(model, more[2:11], 30) == every[2:11]


class Leaky(greedy.Context):
    """Rows of a batch that change with the one before, as K-quants' do on some processors."""

    def decode(self, *arguments: Any) -> Any:
        rows = super().decode(*arguments)
        if len(rows) > 1:
            rows += 1e-6 * np.roll(rows, 1, axis=0)
        return rows


def test_rows_that_change_with_their_neighbors_are_found(
    tiny: TinyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Model(tiny.base, ONE) as model:
        assert greedy.rows_are_independent(model, PROMPTS)
        alone = [greedy.answer_all(model, [ids], 12)[0] for ids in PROMPTS]
        monkeypatch.setattr(greedy, "Context", Leaky)
        assert not greedy.rows_are_independent(model, PROMPTS)
        assert greedy.answer_all(model, PROMPTS, 12) == alone


def test_an_answer_ends_with_its_token(tmp_path: Path) -> None:
    """A model that says the end token first, whatever it is asked."""
    from eval_fixtures import weights

    tensors = weights(SPEC)
    tensors["output.weight"][:] = 0
    mean = tensors["output_norm.weight"]
    tensors["output_norm.weight"] = np.zeros_like(mean)
    path = write_tiny(tmp_path / "first.gguf", SPEC, tensors)  # all equal: the first token, 0
    with Model(path, ONE) as model:
        assert greedy.answer_all(model, PROMPTS[:2], 3) == [Answer((0, 0, 0), False)] * 2
        model.ends = lambda: frozenset({0})  # type: ignore[method-assign]
        assert greedy.answer_all(model, PROMPTS[:2], 3) == [Answer((0,), True)] * 2


def test_what_cannot_be_answered(tiny: TinyFiles) -> None:
    with Model(tiny.base, ONE) as model:
        with pytest.raises(EvaluationError, match="longer than the 256"):
            greedy.answer_all(model, [np.full(250, 5, np.int32)], 10)
        with pytest.raises(EvaluationError, match="no tokens"):
            greedy.answer_all(model, [np.empty(0, np.int32)], 10)
        with pytest.raises(EvaluationError, match="outside"):
            greedy.answer_all(model, [np.array([5000], np.int32)], 10)


def test_logits_that_are_no_numbers(tmp_path: Path) -> None:
    from eval_fixtures import weights

    tensors = weights(SPEC)
    tensors["blk.1.ffn_up.weight"][:] = np.nan
    path = write_tiny(tmp_path / "nan.gguf", SPEC, tensors)
    with Model(path, ONE) as model, pytest.raises(EvaluationError, match="not finite"):
        greedy.answer_all(model, PROMPTS[:1], 3)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    noisy = replace(NOISY, n_ctx_train=8192, template=CHATML)
    return write_tiny(folder / "base.gguf", ENOUGH), write_tiny(folder / "noisy.gguf", noisy)


SHORT = [
    one
    for one in conversations.prompts()
    if one.name in ("ice", "timer", "contact-json", "tea", "pogoda", "plantas")
]


def test_two_files_beside_each_other(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = generation.ask(pair[0], SHORT, 8, ONE)
    assert (asked.asked, asked.reason, asked.n_left_out) == ("chat template", "", 0)
    base = generation.answers(pair[0], asked, tmp_path, ONE)
    same = generation.measure(base, pair[0], tmp_path, ONE)
    assert same.answers.identical.n_yes == 6 and same.answers.identical.ci95[0] < 0.7
    assert same.answers.agreement.value == same.answers.length.value == 1.0
    calls: list[tuple[int, int]] = []
    other = generation.measure(base, pair[1], tmp_path, ONE, lambda *call: calls.append(call))
    found = other.answers
    assert calls[-1] == (12, 12)
    assert found.identical.n_yes < 6 and 0.1 < found.agreement.value < 1
    assert found.n_tokens == sum(len(theirs.answer.tokens) for _, theirs in other.replies)
    assert found.tool_calls is not None and found.json is not None and found.thinking is None
    assert found.tool_calls.base.n == 1 and found.same_calls is None, "no call by chance"
    assert other.n_bytes == pair[1].stat().st_size
    # The same again needs neither file; a damaged store is made again.
    monkeypatch.setattr(generation.greedy, "answer_all", None)
    assert generation.measure(base, pair[1], tmp_path, ONE).answers == found
    monkeypatch.undo()
    for kept in tmp_path.glob("noisy.*.answers"):
        kept.write_text('[[[1], true, "x"]]')
    assert generation.measure(base, pair[1], tmp_path, ONE).answers == found


def test_another_vocabulary_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    small = write_tiny(tmp_path / "small.gguf", replace(ENOUGH, n_vocab=310))
    asked = generation.ask(pair[0], conversations.prompts(limit=1), 4, ONE)
    ids = tuple(np.append(ids, 315).astype(np.int32) for ids in asked.ids)
    base = generation.answers(pair[0], replace(asked, ids=ids), None, ONE)
    with pytest.raises(EvaluationError, match="outside"):
        generation.measure(base, small, None, ONE)


def test_prompts_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "short.gguf", replace(ENOUGH, n_ctx_train=256))
    asked = generation.ask(path, conversations.prompts(), 8, ONE)
    assert 0 < len(asked.ids) < 40 and asked.n_left_out == 40 - len(asked.ids)
    assert max(map(len, asked.ids)) <= 248
    with pytest.raises(EvaluationError, match="No prompt can be given"):
        generation.ask(path, conversations.prompts(), 255, ONE)


def reply(tokens: Sequence[int], text: str = "", ended: bool = False) -> Reply:
    return Reply(Answer(tuple(tokens), ended), text)


def prompt(**options: Any) -> Prompt:
    talk = Conversation(({"role": "user", "content": "?"},), options.pop("tools", {}))
    return Prompt("p", "chat", "en", talk, options.pop("json_keys", None))


def test_the_figures_of_known_answers() -> None:
    tools = {"f": {"properties": {"x": {"type": "integer"}}, "required": ["x"]}}
    call = '<tool_call>{"name": "f", "arguments": {"x": %s}}</tool_call>'
    rows = [
        (prompt(), reply(range(30), ended=True), reply(range(30), ended=True)),
        (prompt(), reply(range(10), ended=True), reply([0, 1, 2, *[7] * 27])),
        (prompt(json_keys=("a",)), reply([1], '{"a": 1}', True), reply([1], '{"b": 1}', True)),
        (prompt(tools=tools), reply([1, 2], call % 1, True), reply([1, 3], call % "1.0", True)),
        (prompt(tools=tools), reply([1, 2], call % 1, True), reply([1, 3], call % 2, True)),
        (prompt(tools=tools), reply([1, 2], call % 1, True), reply([1, 3], call % '"1"', True)),
        (prompt(), reply([1], "<think>aaaa</think>b", True), reply([1], "<think>aaaaaaaa")),
    ]
    prompts = tuple(row[0] for row in rows)
    ids = tuple(np.array([1], np.int32) for _ in rows)
    asked = Asked(prompts, ids, ("",) * len(rows), 30, "chat template", "", 0)
    found = compare_replies(asked, [row[1:] for row in rows], (30, 10, 1, 2, 2, 2, 0))
    assert found.identical.n_yes == 3
    assert found.before_difference.value == (30 + 3 + 1 + 1 + 1 + 1 + 1) / 7
    assert found.length.value == (30 + 30 + 1 + 6 + 1) / (30 + 10 + 1 + 6 + 1)
    assert found.unfinished.base.n_yes == 0 and found.unfinished.file.n_yes == 2
    assert found.unfinished.p_value == 0.5, "two of two by a coin"
    assert (found.loops.base.n_yes, found.loops.file.n_yes) == (0, 1)
    assert found.json is not None and (found.json.base.n_yes, found.json.file.n_yes) == (1, 0)
    assert found.tool_calls is not None and found.tool_calls.base.n_yes == 3
    assert found.tool_calls.file.n_yes == 2, "text is no integer"
    assert found.same_calls is not None and (found.same_calls.n_yes, found.same_calls.n) == (1, 3)
    assert found.thinking is not None and found.thinking.length.value == 2.0
    assert found.thinking.finished.base.n_yes == 1 and found.thinking.finished.file.n_yes == 0


TALK = Conversation(
    (
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
        {"role": "tool", "name": "f", "content": "2"},
    ),
    {"f": {"properties": {"x": {"type": "integer"}}}},
)


def text_through(template: str | None, tmp_path: Path, talk: Conversation = TALK) -> str:
    path = write_tiny(tmp_path / "model.gguf", replace(ENOUGH, template=template))
    with Model(path, ONE) as model:
        return Chat(model).prompt_text(talk, thinks=True)


def test_tools_are_given_as_the_template_takes_them(tmp_path: Path) -> None:
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ ARG }}){% endfor %}"
    for argument in ("c.function.arguments | tojson", "'' + c.function.arguments"):
        made = WITH_TOOLS.replace("{{ m.content }}", "{{ m.content }}" + calls)
        said = text_through(made.replace("ARG", argument), tmp_path)
        assert 'f({"x": 1})' in said and said.startswith('[{"type": "function"')
        assert "<|tool|>2" in said and said.endswith("<|assistant|>")
    said = text_through(CHATML, tmp_path)
    assert said.startswith("<|system|>Be kind.\n\nYou can call") and '"name": "f"' in said
    assert '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>' in said
    assert "<tool_response>\n2\n</tool_response>" in said


def test_a_template_without_a_system_message(tmp_path: Path) -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    said = text_through(refuses + CHATML, tmp_path)
    assert said.startswith("<|user|>Be kind.\n\nYou can call") and "\n\nHi\n" in said


def test_no_template_is_plain_text(tmp_path: Path) -> None:
    hello = Conversation(({"role": "user", "content": "Hi"},), {})
    assert text_through(None, tmp_path, hello) == "User: Hi\n\nAssistant:"
    broken = "{{ raise_exception('out of order') }}"
    path = write_tiny(tmp_path / "broken.gguf", replace(ENOUGH, template=broken))
    asked = generation.ask(path, conversations.prompts(limit=2), 4, ONE)
    assert asked.asked == "plain text" and "out of order" in asked.reason


def test_a_template_that_ends_the_process_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluators.llama_runtime._RENDER_SECONDS", 1.0)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    path = write_tiny(tmp_path / "endless.gguf", replace(ENOUGH, template=endless))
    asked = generation.ask(path, conversations.prompts(limit=2), 4, ONE)
    assert asked.asked == "plain text" and "did not answer" in asked.reason


def test_thinking_is_switched_on(tmp_path: Path) -> None:
    switch = CHATML + "{% if enable_thinking %}<think>{% else %}<think></think>{% endif %}"
    hello = Conversation(({"role": "user", "content": "Hi"},), {})
    assert text_through(switch, tmp_path, hello).endswith("<|assistant|><think>")
    path = tmp_path / "model.gguf"
    asked = generation.ask(path, conversations.prompts(limit=2), 4, ONE)
    assert asked.begun == ("<think>", "<think>"), "the answer goes on within a thought"


def test_bos_is_there_once(tmp_path: Path) -> None:
    for template in (CHATML, "{{ bos_token }}" + CHATML):
        path = write_tiny(tmp_path / "bos.gguf", replace(ENOUGH, template=template))
        ids = generation.ask(path, conversations.prompts(limit=1), 4, ONE).ids[0]
        assert (ids == 1).sum() == 1 and ids[0] == 1


def test_prompts_of_the_package_and_of_files(tmp_path: Path) -> None:
    found = conversations.prompts()
    assert len(found) == 40 == len({one.name for one in found})
    kinds = {one.kind for one in found}
    assert kinds == {"chat", "code", "arithmetic", "json", "tools", "long"}
    assert {one.kind for one in found[:12]} == kinds
    assert len({one.language for one in found}) == 9
    assert all(len(one.talk.tools) >= 2 for one in found if one.kind == "tools")
    path = tmp_path / "mine.jsonl"
    tools = {"f": {"properties": {}}}
    rows = [{"messages": [{"role": "user", "content": "?"}], "tools": tools, "json_keys": []}]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (mine,) = conversations.prompts(path)
    assert (mine.name, mine.json_keys, dict(mine.talk.tools)) == ("line 1", (), tools)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("[]", "not an object"),
        ("{}", "no messages"),
        ('{"messages": [{"role": "god", "content": ""}]}', "no role"),
        ('{"messages": [{"role": "user", "content": 3}]}', "no text"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "nothing to answer"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": ["nope"]}', "no tool 'nope'"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}', "no tool"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": 3}', "neither"),
        ('{"messages": [{"role": "user", "content": "x"}], "json_keys": "a"}', "json_keys"),
        ('{"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}', "tool_calls"),
    ],
)
def test_prompts_that_cannot_be_used(line: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line)
    with pytest.raises(EvaluationError, match=why):
        conversations.prompts(path)


def test_the_command(
    pair: tuple[Path, Path],
    tmp_path: Path,
    run_json: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"messages": [{"role": "user", "content": said}]} for said in ("Hi", "1 + 1?", "qqq")]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows]))
    options = ["--prompts", str(path), "--limit", "3", "--tokens", "5"]
    found = run_json(generation.main, *pair, *options, "--texts")
    assert found["n_prompts"] == 3 and len(found["texts"]) == 3
    assert found["identical"]["n"] == 3 and found["asked"] == "chat template"
    options += ["--threads", "1", "--table"]
    assert generation.main([str(pair[0]), str(pair[0]), str(pair[1]), *options]) == 0
    said = capsys.readouterr().out
    assert "same answer" in said and "3/3 (44 to 100 %)" in said
