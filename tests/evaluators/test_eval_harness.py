"""Our model for lm-evaluation-harness: the numbers are those of numpy, and on a real model those of
the harness's own model for transformers.
"""

from __future__ import annotations

from dataclasses import replace
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
    tiny,
    write_tiny,
)

pytest.importorskip("lm_eval", reason="the extra `tasks` is not installed")

from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows

from evaluators import choice_items
from evaluators.errors import EvaluationError
from evaluators.harness import GgufLM, generation_settings
from evaluators.llama_runtime import Model

__all__ = ["tiny"]  # a fixture: used by name


def ask(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, i, ("made up", i, 1)) for i, one in enumerate(arguments)]


def reference(context: str, continuation: str) -> tuple[float, bool]:
    """Sum of log p and whether each token is the most likely one, in numpy."""
    head = np.array([1, *byte_ids(context)]) if context else np.array([1])
    whole = np.array([1, *byte_ids(context + continuation)])
    logp = log_softmax(reference_logits(SPEC, whole))
    at = np.arange(len(head) - 1, len(whole) - 1)
    wanted = whole[at + 1]
    return float(logp[at, wanted].sum()), bool((logp[at].argmax(1) == wanted).all())


def test_loglikelihood(tiny: TinyFiles) -> None:
    pairs = [("Question: 12?\nAnswer:", " qq"), ("Question: 12?\nAnswer:", " zzx"), ("zq", "x")]
    pairs += [(f"{i} zq {i * i}:", f" x{i}") for i in range(30)]
    with Model(tiny.base, ONE) as model:
        lm = GgufLM(model)
        found = lm.loglikelihood(ask("loglikelihood", *pairs, pairs[0]))
        best = chr(int(reference_logits(SPEC, np.array([1, *byte_ids("zq")]))[-1][3:131].argmax()))
        [(_, greedy), (_, other)] = lm.loglikelihood(
            ask("loglikelihood", ("zq", best), ("zq", "\x01" if best != "\x01" else "\x02"))
        )
    assert found[-1] == found[0]  # one and the same request
    for (log_p, is_greedy), pair in zip(found, pairs, strict=False):
        wanted, wanted_greedy = reference(*pair)
        assert log_p == pytest.approx(wanted, rel=2e-3)
        assert is_greedy == wanted_greedy
    assert not other
    assert greedy == reference("zq", best)[1]


def test_rolling_windows_are_the_harness_s(tiny: TinyFiles) -> None:
    text = "zq xy 1 " * 60
    ids = [1, *byte_ids(text).tolist()]
    assert len(ids) > 2 * SPEC.n_ctx_train
    wanted = 0.0
    for inputs, targets in get_rolling_token_windows(ids, 1, SPEC.n_ctx_train, 1):
        logp = log_softmax(reference_logits(SPEC, np.array(inputs)))[-len(targets) :]
        wanted += float(logp[np.arange(len(targets)), targets].sum())
    with Model(tiny.base, ONE) as model:
        [found] = GgufLM(model).loglikelihood_rolling(ask("loglikelihood_rolling", (text,)))
    assert found == pytest.approx(wanted, rel=2e-3)


def test_generate_until_stops_where_it_is_told(tiny: TinyFiles) -> None:
    settings = {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 10, "temperature": 0.0}
    with Model(tiny.base, ONE) as model:
        lm = GgufLM(model)
        [whole] = lm.generate_until(ask("generate_until", ("zq xy", settings)))
        stop = whole[len(whole) // 2]
        [cut] = lm.generate_until(ask("generate_until", ("zq xy", {**settings, "until": stop})))
    assert lm.unfinished == 1
    assert whole and cut == whole[: whole.index(stop)]


def test_repeats_that_are_drawn_differ(tiny: TinyFiles) -> None:
    drawn = {"until": [], "do_sample": True, "temperature": 1.5, "max_gen_toks": 8}
    greedy = {"until": [], "do_sample": False, "max_gen_toks": 8}
    with Model(tiny.base, ONE) as model:
        lm = GgufLM(model)
        several = lm.generate_until(ask("generate_until", *[("zq", drawn)] * 3))
        again = lm.generate_until(ask("generate_until", *[("zq", drawn)] * 3))
        same = lm.generate_until(ask("generate_until", *[("zq", greedy)] * 3))
    assert len(set(several)) == 3 and several == again
    assert len(set(same)) == 1


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, (256, (), 0.0)),
        ({"until": "x", "max_new_tokens": 3}, (3, ("x",), 0.0)),
        ({"until": ["a", ""], "temperature": 0.7}, (256, ("a",), 0.0)),
        ({"do_sample": True, "temperature": 0.7, "max_tokens": 9}, (9, (), 0.7)),
        ({"do_sample": True, "temperature": 0}, (256, (), 0.0)),
    ],
)
def test_generation_settings(settings: dict[str, Any], wanted: tuple[Any, ...]) -> None:
    n_tokens, stops, sampling = generation_settings(settings)
    assert (n_tokens, stops, sampling.temperature) == wanted


def test_settings_that_are_not_known_are_refused() -> None:
    with pytest.raises(EvaluationError, match="repetition_penalty"):
        generation_settings({"repetition_penalty": 1.2})


def test_what_is_too_long_loses_its_beginning(tiny: TinyFiles) -> None:
    context = "zq " * 200
    with Model(tiny.base, ONE) as model:
        lm = GgufLM(model)
        [(log_p, _)] = lm.loglikelihood(ask("loglikelihood", (context, " x")))
        assert lm.truncated == 1 and np.isfinite(log_p)
        lm.generate_until(ask("generate_until", (context, {"max_gen_toks": 4})))
        assert lm.truncated == 2
        with pytest.raises(EvaluationError, match="--max-tokens"):
            lm.generate_until(ask("generate_until", ("zq", {"max_gen_toks": 256})))
        with pytest.raises(EvaluationError, match="longer than the 256"):
            lm.loglikelihood(ask("loglikelihood", ("zq", " x" * 300)))


def test_a_run_that_was_killed_goes_on(tiny: TinyFiles, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    pairs = [(f"zq {i}:", f" x{i}") for i in range(40)]
    prompts = [(f"zq {i}", {"max_gen_toks": 3, "until": ["\n"]}) for i in range(12)]

    def killed(kind: str, done: int, _: int) -> None:
        if done == 9:
            raise KeyboardInterrupt

    asked: list[tuple[str, int]] = []
    with Model(tiny.base, ONE) as model:
        whole = GgufLM(model)
        scores = whole.loglikelihood(ask("loglikelihood", *pairs))
        texts = whole.generate_until(ask("generate_until", *prompts))
        for kind, requests in (("loglikelihood", pairs), ("generate_until", prompts)):
            with pytest.raises(KeyboardInterrupt):
                getattr(GgufLM(model, out, killed), kind)(ask(kind, *requests))
    assert len(out.read_text().splitlines()) == 18
    with out.open("a") as file:
        file.write('{"model": "half a li')
    with Model(tiny.base, ONE) as model:
        again = GgufLM(model, out, lambda kind, done, _: asked.append((kind, done)))
        found = again.loglikelihood(ask("loglikelihood", *pairs))
        said = again.generate_until(ask("generate_until", *prompts))
    assert asked[0] == ("loglikelihood", 10) and len(asked) == 31 + 3
    assert np.allclose([x for x, _ in found], [x for x, _ in scores], rtol=1e-3)
    assert sum(a == b for a, b in zip(said, texts, strict=True)) >= len(texts) - 1
    with Model(tiny.noisy, ONE) as model:  # another model's answers are not its own
        other = GgufLM(model, out).loglikelihood(ask("loglikelihood", *pairs))
    assert not np.allclose([x for x, _ in other], [x for x, _ in scores], rtol=1e-3)


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_chat_template(tiny: TinyFiles, tmp_path: Path) -> None:
    file = write_tiny(tmp_path / "chat.gguf", replace(SPEC, template=TEMPLATE))
    messages = [{"role": "user", "content": "12?"}]
    begun = [*messages, {"role": "assistant", "content": "The answer \n"}]
    with Model(file, ONE) as model:
        lm = GgufLM(model)
        assert lm.apply_chat_template(messages) == "<user>12?</user><assistant>"
        continued = lm.apply_chat_template(begun, add_generation_prompt=False)
        assert continued == "<user>12?</user><assistant>The answer"
        assert lm.tokenizer_name != GgufLM(model).apply_chat_template(messages)
    with Model(tiny.base, ONE) as model, pytest.raises(EvaluationError, match="no chat template"):
        GgufLM(model).apply_chat_template(messages)


@pytest.mark.slow
def test_picks_and_answers_are_those_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's real model: F16 in llama.cpp against float32 in transformers."""
    from lm_eval.models.huggingface import HFLM

    from evaluators.weights import expand_file
    from quantkit.llamacpp.converter.convert import convert
    from quantkit.sources.demo import make_checkpoint

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    make_checkpoint(checkpoint)
    convert(checkpoint, tmp_path / "base.gguf")
    file = tmp_path / "f16.gguf"
    expand_file(tmp_path / "base.gguf", file)
    theirs = HFLM(str(checkpoint), dtype="float32", device="cpu", trust_remote_code=False)
    items = choice_items.load("everyday").items
    pairs = [
        texts for item in items for texts in zip(item.contexts, item.continuations, strict=True)
    ]
    prompts = [(item.contexts[0], {"max_gen_toks": 12, "until": ["\n"]}) for item in items[:12]]
    with Model(file) as model:
        ours = GgufLM(model)
        a = np.array(ours.loglikelihood(ask("loglikelihood", *pairs)))
        b = np.array(theirs.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True))
        said = ours.generate_until(ask("generate_until", *prompts))
        wanted = theirs.generate_until(ask("generate_until", *prompts), disable_tqdm=True)
        text = " ".join(item.contexts[0] for item in items)
        [rolled] = ours.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)))
        [other] = theirs.loglikelihood_rolling(
            ask("loglikelihood_rolling", (text,)), disable_tqdm=True
        )
    sums = [np.split(x[:, 0], np.cumsum([len(i.n_chars) for i in items])[:-1]) for x in (a, b)]
    picks = [[one.argmax() for one in side] for side in sums]
    assert np.mean(np.array(picks[0]) == picks[1]) >= 0.98  # 60 items: one may be a tie
    assert np.abs(a[:, 0] - b[:, 0]).max() < 0.2
    assert (a[:, 1] == b[:, 1]).mean() >= 0.98
    assert rolled == pytest.approx(other, rel=1e-3)
    assert sum(x == y for x, y in zip(said, wanted, strict=True)) >= 11
