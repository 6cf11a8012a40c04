"""Templates, token splits, scores of shared prefixes, resuming and flips."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_fixtures import (
    ONE,
    SPEC,
    TinyFiles,
    byte_ids,
    log_softmax,
    reference_logits,
    run_json,
    tiny,
    write_tiny,
    write_tiny_mamba,
)

from evaluators import choice_items, pair_scores, zeroshot
from evaluators.choice_items import Item, TaskItems, shared_context
from evaluators.errors import EvaluationError
from evaluators.llama_runtime import Context, Model
from evaluators.logprobs import RowWorkers
from evaluators.pair_scores import Pair, encode_pair, score_items, score_pairs

run = partial(zeroshot.run, runtime=ONE)

__all__ = ["run_json", "tiny"]  # fixtures: used by name


def task_item(name: str, row: Mapping[str, Any]) -> Item:
    return choice_items.TASKS[name].item(row)


# Expected strings below are lm-evaluation-harness 0.4.13's prompts for these very rows.


def test_piqa_template_keeps_the_spaces_of_the_row() -> None:
    row = {"goal": "dresser", "sol1": "use a pin ", "sol2": "finish, with  pin", "label": 0}
    item = task_item("piqa", row)
    assert item.contexts == ("Question: dresser\nAnswer:",) * 2
    assert item.continuations == (" use a pin ", " finish, with  pin")
    assert item.n_chars == (10, 17)


def test_our_own_items_are_sound() -> None:
    everyday = choice_items.load("everyday")
    assert len(everyday.items) == 60
    assert len({item.contexts[0] for item in everyday.items}) == 60
    assert everyday.metrics == ("acc", "acc_norm")
    for item in everyday.items:
        assert 2 <= len(item.continuations) <= 4
        assert len(set(item.continuations)) == len(item.continuations)
    # the place of the right answer gives nothing away
    for n_choices in (2, 3):
        gold = [item.gold for item in everyday.items if len(item.continuations) == n_choices]
        counts = np.bincount(gold, minlength=n_choices)
        assert counts.max() - counts.min() <= 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"context": "Q:", "choices": ["yes", " "], "gold": 0}, "Choice 1 is empty"),
        ({"context": "Q:", "choices": ["yes", ""], "gold": 0}, "Choice 1 is empty"),
        ({"context": "Q:", "choices": ["yes"], "gold": 0}, "It has 1 choices"),
        ({"context": "Q:", "choices": "yes", "gold": 0}, "list of strings"),
        ({"context": "Q:", "choices": ["yes", 3], "gold": 0}, "list of strings"),
        ({"context": "Q:", "choices": ["yes", "no"], "gold": 2}, "gold answer 2 is not one"),
        ({"context": "Q:", "choices": ["yes", "no"], "gold": -1}, "gold answer -1 is not one"),
        ({"context": "Q:", "choices": ["yes", "no"], "gold": None}, "malformed"),
        ({"context": "Q:", "choices": ["yes", "no"]}, "no usable 'gold'"),
        ({"context": None, "choices": ["yes", "no"], "gold": 0}, "context must be a string"),
    ],
)
def test_malformed_items_are_named(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    good = {"context": "Q:", "choices": ["yes", "no"], "gold": 0}
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    with pytest.raises(EvaluationError, match=reason) as caught:
        choice_items.load("choices", path)
    assert "Item 1 of" in caught.value.message
    assert len(choice_items.load("choices", path, limit=1).items) == 1


@pytest.mark.parametrize("content", ["[1]\n", "{nope\n", ""])
def test_files_that_hold_no_items(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(EvaluationError, match="not a JSON object|not JSON|no items"):
        choice_items.load("choices", path)


def test_labels_beside_the_items(tmp_path: Path) -> None:
    data, labels = tmp_path / "valid.jsonl", tmp_path / "valid-labels.lst"
    rows = [{"goal": f"g{i}", "sol1": "a\u2028b", "sol2": "c"} for i in range(3)]
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    labels.write_text("1\n0\n1\n")
    loaded = choice_items.load("piqa", data, labels)
    assert [item.gold for item in loaded.items] == [1, 0, 1]
    labels.write_text("1\n0\n")
    with pytest.raises(EvaluationError, match="2 labels for the 3 items"):
        choice_items.load("piqa", data, labels)
    with pytest.raises(EvaluationError, match="no usable 'label'"):
        choice_items.load("piqa", data)
    with pytest.raises(EvaluationError, match="needs a file of items"):
        choice_items.load("piqa", labels=labels)


def test_hub_rows_go_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def rows(*request: Any) -> list[dict[str, Any]]:
        asked.append(request)
        return [{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}] * 5

    monkeypatch.setattr(choice_items, "load_dataset_rows", rows)
    loaded = choice_items.load("piqa", limit=3)
    assert asked == [("baber/piqa", None, "validation")]
    assert len(loaded.items) == 3 and loaded.source == "baber/piqa"


def split(model: Model, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The tokens of context and continuation."""
    pair = encode_pair(model, context, continuation)
    n_context = len(pair.inputs) - len(pair.targets) + 1
    assert pair.inputs[n_context:].tolist() == pair.targets[:-1].tolist()
    return pair.inputs[:n_context].tolist(), pair.targets.tolist()


def test_token_split(tiny: TinyFiles) -> None:
    with Model(tiny.base, ONE) as model:
        head, tail = split(model, "zz: 1", " q")
        assert head == [1, *byte_ids("zz: 1")]
        assert tail == byte_ids(" q")[3:].tolist()
        # spaces at the end of a context belong to the continuation
        moved_head, moved_tail = split(model, "zz: 1  ", "q")
        assert moved_head == head
        assert moved_tail == byte_ids("  q")[3:].tolist()
        # without a context the model starts from BOS
        empty_head, empty_tail = split(model, "", " q")
        assert empty_head == [1]
        assert len(empty_tail) > 0 and empty_tail[0] != 1


def test_a_merge_over_the_boundary_follows_the_harness(tiny: TinyFiles) -> None:
    # the vocabulary has " do" and " dog" but not "g": the context's last token changes
    with Model(tiny.base, ONE) as model:
        head, tail = split(model, "zz do", "g 123456789")
        whole = model.tokenize("zz dog 123456789")
        assert head[:-1] == whole[: len(head) - 1].tolist()
        assert head[-1] != whole[len(head) - 1]
        assert tail == whole[len(head) :].tolist() == byte_ids(" 123456789")[3:].tolist()
        with pytest.raises(EvaluationError, match="no token to score"):
            encode_pair(model, "zz do", "g")


def reference_sums(item: Item) -> list[float]:
    """Sum of log p of each choice, one sequence at a time in numpy."""
    sums = []
    for context, continuation in zip(item.contexts, item.continuations, strict=True):
        head = np.array([1, *byte_ids(context)])
        whole = np.array([1, *byte_ids(context + continuation)])
        logp = log_softmax(reference_logits(SPEC, whole))
        at = np.arange(len(head) - 1, len(whole) - 1)
        sums.append(float(logp[at, whole[at + 1]].sum()))
    return sums


ITEMS = [
    shared_context("Question: 12?\nAnswer:", ["qq", "q", "zzz zz", "qqx"], 0),
    Item(("xy 1", "xy 22"), (" zq.", " zq."), (3, 3), 1),
    shared_context("z", ["q" * 60, "x" * 3], 1),
    *[shared_context(f"{i}{i}: z", [f"q{i}", f"x{i}", f"z{i}y"], i % 3) for i in range(24)],
]


@pytest.mark.parametrize("share", [True, False])
def test_scores_equal_separate_sequences(tiny: TinyFiles, share: bool) -> None:
    scores: dict[int, list[float]] = {}
    with Model(tiny.base, ONE) as model, RowWorkers(model.n_vocab, 1) as workers:
        score_items(model, ITEMS, workers, scores.__setitem__, share)
    assert sorted(scores) == list(range(len(ITEMS)))
    for i, item in enumerate(ITEMS):
        assert scores[i] == pytest.approx(reference_sums(item), rel=2e-3)


def test_a_recurrent_model_gets_every_choice_in_full(tmp_path: Path) -> None:
    together: dict[int, list[float]] = {}
    alone: dict[int, list[float]] = {}
    mamba = write_tiny_mamba(tmp_path / "mamba.gguf", SPEC)
    with Model(mamba, ONE) as model, RowWorkers(model.n_vocab, 1) as workers:
        assert model.is_recurrent
        score_items(model, ITEMS[:12], workers, together.__setitem__)
        for i, item in enumerate(ITEMS[:12]):  # each choice is the only sequence of its batch
            for j in range(len(item.continuations)):
                same = Item((item.contexts[j],) * 2, (item.continuations[j],) * 2, (1, 1), 0)
                score_items(
                    model, [same], workers, lambda _, s, i=i: alone.setdefault(i, []).append(s[0])
                )
    for i in range(12):
        assert together[i] == pytest.approx(alone[i], rel=1e-4)
    assert len({tuple(np.round(values, 1)) for values in together.values()}) == 12


class Decoded:
    """What contexts were asked to decode."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n_tokens: list[int] = []
        self.n_rows: list[int] = []
        original = Context.decode

        def spy(context: Context, *arguments: Any) -> Any:
            self.n_tokens.append(len(arguments[0]))
            self.n_rows.append(int(arguments[2].sum()))
            return original(context, *arguments)

        monkeypatch.setattr(Context, "decode", spy)


def test_prefixes_are_decoded_once(tiny: TinyFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = [
        Item(("The dog saw 12 and x", "The dog saw 12 and zz"), (ending, ending), (2, 2), 0)
        for ending in (" qq.", " 77.")
    ]
    decoded = Decoded(monkeypatch)
    with Model(tiny.base, ONE) as model, RowWorkers(model.n_vocab, 1) as workers:
        for share in (True, False):
            score_items(model, twins, workers, lambda *_: None, share)
        pairs = [
            encode_pair(model, *texts)
            for item in twins
            for texts in zip(item.contexts, item.continuations, strict=True)
        ]
    sequences = [pair.inputs.tolist() for pair in pairs]
    prefixes = {tuple(ids[:n]) for ids in sequences for n in range(1, len(ids) + 1)}
    n_all = sum(map(len, sequences))
    assert decoded.n_tokens == [len(prefixes), n_all] and len(prefixes) < n_all / 2


def test_what_is_long_and_shared_is_computed_step_by_step(
    tiny: TinyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pack may be of several steps where sequences share more than they add."""
    monkeypatch.setattr(pair_scores, "MAX_STEP", 64)
    many = [shared_context("zq xy. " * 20 + f"{i}", [f" q{i}", " zz"], 0) for i in range(30)]
    decoded = Decoded(monkeypatch)
    scores: dict[int, list[float]] = {}
    with Model(tiny.base, ONE) as model, RowWorkers(model.n_vocab, 1) as workers:
        score_items(model, many, workers, scores.__setitem__)
        n_inputs = len(encode_pair(model, many[0].contexts[0], " q0").inputs)
    assert n_inputs > 2 * 64 and max(decoded.n_tokens) == 64
    assert sum(decoded.n_tokens) < n_inputs + 30 * 24
    for i in (0, 13, 29):
        assert scores[i] == pytest.approx(reference_sums(many[i]), rel=2e-3)


def test_several_batches_are_needed_and_none_is_too_large(
    tiny: TinyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_scores, "_OUTPUT_BYTES", 4 * SPEC.n_vocab * 20)
    decoded = Decoded(monkeypatch)
    scores: dict[int, list[float]] = {}
    with Model(tiny.base, ONE) as model, RowWorkers(model.n_vocab, 1) as workers:
        score_items(model, ITEMS, workers, scores.__setitem__)
    assert len(decoded.n_rows) > 3 and max(decoded.n_rows) <= 20
    assert sorted(scores) == list(range(len(ITEMS)))
    assert scores[2] == pytest.approx(reference_sums(ITEMS[2]), rel=2e-3)


def test_whether_greedy_decoding_would_have_said_it(tiny: TinyFiles) -> None:
    whole = np.array([1, *byte_ids("The dog saw 12")])
    best = reference_logits(SPEC, whole)[-1].argsort()[::-1].astype(np.int32)
    pairs = [Pair.of(whole, best[:1]), Pair.of(whole, best[1:2])]
    found: dict[int, Any] = {}
    with Model(tiny.base, ONE) as model, RowWorkers(model.n_vocab, 1) as workers:
        score_pairs(model, pairs, workers, found.__setitem__)
    assert found[0].is_greedy and not found[1].is_greedy
    assert found[0].log_p > found[1].log_p


def test_items_longer_than_the_model(tiny: TinyFiles) -> None:
    item = shared_context("z" * 300, ["q", "x"], 0)
    with pytest.raises(EvaluationError, match="longer than the 256"):
        run(tiny.base, TaskItems("long", (item,), ("acc",), "test"))


def test_accuracy_by_sum_and_by_characters(tiny: TinyFiles) -> None:
    items = TaskItems("t", tuple(ITEMS), ("acc", "acc_norm"), "test")
    result = run(tiny.base, items)
    sums = [reference_sums(item) for item in ITEMS]
    acc = [int(np.argmax(values)) for values in sums]
    norm = [
        int(np.argmax(np.array(values) / np.array(item.n_chars)))
        for values, item in zip(sums, ITEMS, strict=True)
    ]
    assert list(result.picks["acc"]) == acc and list(result.picks["acc_norm"]) == norm
    assert acc != norm
    right = np.array(acc) == [item.gold for item in ITEMS]
    assert result.accuracy["acc"].value == pytest.approx(right.mean())
    assert result.accuracy["acc"].stderr == pytest.approx(right.std(ddof=1) / np.sqrt(len(ITEMS)))


def test_flips_count_every_changed_pick(tiny: TinyFiles, tmp_path: Path) -> None:
    items = TaskItems("t", tuple(ITEMS), ("acc",), "test")
    ruined = write_tiny(tmp_path / "ruined.gguf", replace(SPEC, noise=0.5))
    base, other = run(tiny.base, items), run(ruined, items)
    flips = zeroshot.answer_flips(other, base)["acc"]
    changed = [a != b for a, b in zip(other.picks["acc"], base.picks["acc"], strict=True)]
    assert flips.n == sum(changed) > 0
    assert flips.fraction == pytest.approx(flips.n / len(ITEMS))
    gain = other.accuracy["acc"].value - base.accuracy["acc"].value
    assert flips.gained - flips.lost == round(gain * len(ITEMS))
    assert zeroshot.answer_flips(base, base)["acc"].n == 0
    fewer = TaskItems("t", tuple(ITEMS[:5]), ("acc",), "test")
    with pytest.raises(EvaluationError, match="same items"):
        zeroshot.answer_flips(run(tiny.base, fewer), base)


def test_a_rerun_scores_only_what_is_missing(
    tiny: TinyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = TaskItems("t", tuple(ITEMS), ("acc",), "test")
    out = tmp_path / "scores.jsonl"
    run(tiny.noisy, items, out)  # another model's lines in the same file do not count
    n_other = len(out.read_text().splitlines())
    whole = run(tiny.base, items, out)
    lines = out.read_bytes().splitlines(keepends=True)
    assert len(lines) == n_other + len(ITEMS)
    # a run that died in the middle of a line
    out.write_bytes(b"".join(lines[: n_other + 10]) + lines[n_other + 10][:7])
    scored: list[int] = []
    original = zeroshot.score_items

    def spy(model: Any, todo: Any, *rest: Any) -> None:
        scored.append(len(todo))
        original(model, todo, *rest)

    monkeypatch.setattr(zeroshot, "score_items", spy)
    again = run(tiny.base, items, out)
    assert scored == [len(ITEMS) - 10]
    assert again.picks == whole.picks
    assert np.allclose(np.concatenate(again.scores), np.concatenate(whole.scores), rtol=1e-3)
    run(tiny.base, items, out)
    assert scored == [len(ITEMS) - 10]  # nothing was left to score
    assert len(out.read_bytes().splitlines()) == n_other + len(ITEMS)


def test_an_out_file_of_something_else_is_refused(tiny: TinyFiles, tmp_path: Path) -> None:
    out = tmp_path / "notes.jsonl"
    out.write_text('{"hello": 1}\n')
    with pytest.raises(EvaluationError, match="something other"):
        run(tiny.base, TaskItems("t", tuple(ITEMS[:2]), ("acc",), "test"), out)


def test_command(tiny: TinyFiles, tmp_path: Path, run_json: Callable[..., dict[str, Any]]) -> None:
    data = tmp_path / "mine.jsonl"
    rows = [{"context": f"{i}:", "choices": ["q", "zz", "x"], "gold": i % 3} for i in range(9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["--task", "choices", "--data", data, "--base", tiny.base, "--limit", 7]
    result = run_json(zeroshot.main, tiny.noisy, *settings)
    task = result["tasks"]["mine"]
    assert task["n_items"] == task["acc"]["n"] == 7
    assert set(task["acc"]) == {"value", "stderr", "n"}
    assert set(task["flips"]["acc"]) == {"n", "fraction", "gained", "lost", "p_value"}
    assert result["average_acc"] == task["acc"]["value"]
    assert zeroshot.main([str(tiny.base), "--task", "choices"]) == 1  # needs a file
    two_tasks = ["--task", "choices", "--task", "piqa", "--data", str(data)]
    assert zeroshot.main([str(tiny.base), *two_tasks]) == 1


def test_command_table(tiny: TinyFiles, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--task", "everyday", "--limit", "4", "--base", str(tiny.base), "--threads", "1"]
    assert zeroshot.main([str(tiny.noisy), *options, "--table"]) == 0
    out = capsys.readouterr().out
    assert "everyday acc_norm" in out and "flips" in out
