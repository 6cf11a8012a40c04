"""Many prompts at once: what each of them says alone, whoever else is being computed."""

from __future__ import annotations

from collections.abc import Sequence
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
    reference_logits,
    tiny,
    write_tiny,
    write_tiny_mamba,
)

from evaluators import continuations
from evaluators.continuations import Continuation, Prompt, Sampling, continue_all, sample
from evaluators.errors import EvaluationError
from evaluators.llama_runtime import Context, Model

__all__ = ["tiny"]  # a fixture: used by name

SHARED = "zq xy 123456 "
PROMPTS = [f"{SHARED * (1 + i % 3)}{i}" for i in range(21)]


def ids_of(text: str) -> np.ndarray:
    return np.array([1, *byte_ids(text)], dtype=np.int32)


def run(model: Model, prompts: Sequence[Prompt], share: bool = True) -> list[Continuation]:
    found: dict[int, Continuation] = {}
    continue_all(model, prompts, found.__setitem__, share)
    return [found[i] for i in range(len(prompts))]


def reference(ids: np.ndarray, n_tokens: int) -> list[int]:
    """Greedy tokens in numpy, one after the other."""
    said: list[int] = []
    while len(said) < n_tokens:
        said.append(int(reference_logits(SPEC, np.array([*ids, *said]))[-1].argmax()))
        if said[-1] == 2:  # </s>
            break
    return said


def test_greedy_tokens_are_those_of_each_alone(tiny: TinyFiles) -> None:
    prompts = [Prompt(ids_of(text), 6 + i % 5) for i, text in enumerate(PROMPTS)]
    with Model(tiny.base, ONE) as model:
        together = run(model, prompts)
    # two logits can be nearer to each other than llama.cpp's arithmetic is to numpy's
    same = [
        list(found.tokens) == reference(prompt.ids, prompt.n_tokens)
        for found, prompt in zip(together, prompts, strict=True)
    ]
    assert sum(same) >= len(same) - 1
    assert {found.ended for found in together} <= {"limit", "end"}


def test_what_prompts_share_is_computed_once(
    tiny: TinyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_tokens: list[int] = []
    original = Context.decode

    def spy(context: Context, *arguments: Any) -> Any:
        n_tokens.append(len(arguments[0]))
        return original(context, *arguments)

    monkeypatch.setattr(Context, "decode", spy)
    prompts = [Prompt(ids_of(text), 4) for text in PROMPTS]
    with Model(tiny.base, ONE) as model:
        shared = run(model, prompts)
        n_shared, n_tokens[:] = sum(n_tokens), []
        alone = run(model, prompts, share=False)
    assert n_shared < 0.7 * sum(n_tokens)
    same = [a.tokens == b.tokens for a, b in zip(shared, alone, strict=True)]
    assert sum(same) >= len(same) - 1


def test_small_steps_and_few_cells(tiny: TinyFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that do not fit one step, more than fit the memory at once."""
    prompts = [Prompt(ids_of(text), 5) for text in PROMPTS]
    with Model(tiny.base, ONE) as model:
        wide = run(model, prompts)
        monkeypatch.setattr(continuations, "MAX_STEP", 16)
        monkeypatch.setattr(continuations, "_MOST_CELLS", 1024)  # four at once
        narrow = run(model, prompts)
    same = [a.tokens == b.tokens for a, b in zip(wide, narrow, strict=True)]
    assert sum(same) >= len(same) - 1


def test_a_recurrent_model_shares_nothing(tmp_path: Path) -> None:
    mamba = write_tiny_mamba(tmp_path / "mamba.gguf", SPEC)
    prompts = [Prompt(ids_of(text), 5) for text in PROMPTS]
    with Model(mamba, ONE) as model:
        together = run(model, prompts)
        alone = [run(model, [prompt])[0] for prompt in prompts]
    assert [found.tokens for found in together] == [found.tokens for found in alone]


def test_a_stop_text_is_cut_off(tiny: TinyFiles) -> None:
    with Model(tiny.base, ONE) as model:
        [whole] = run(model, [Prompt(ids_of("zq"), 12)])
        at = len(whole.text) // 2
        stop = whole.text[at : at + 2]
        [cut] = run(model, [Prompt(ids_of("zq"), 12, ("never said", stop))])
    assert whole.ended == "limit" and len(whole.tokens) == 12
    assert cut.ended == "stop" and cut.text == whole.text[: whole.text.index(stop)]
    assert len(cut.tokens) < 12


def test_a_stop_that_is_a_special_token(tmp_path: Path) -> None:
    """The model's own end, and a stop that names a token, end an answer without being said."""
    tensors_of_end = 50.0  # makes </s> the most likely token everywhere
    from eval_fixtures import weights

    tensors = weights(SPEC)
    hidden = tensors["output.weight"]
    tensors["output.weight"] = np.vstack([hidden[:2], hidden[2:3] * tensors_of_end, hidden[3:]])
    file = write_tiny(tmp_path / "ends.gguf", SPEC, tensors)
    with Model(file, ONE) as model:
        found = run(model, [Prompt(ids_of(text), 20, ("</s>",)) for text in PROMPTS])
        ended = [one for one in found if one.ended != "limit"]
        assert ended and all("</s>" not in one.text for one in ended)
        assert {one.ended for one in ended} == {"end"}


def test_drawn_tokens_follow_their_seed(tiny: TinyFiles) -> None:
    drawn = [Prompt(ids_of("zq"), 8, sampling=Sampling(1.5, seed=s)) for s in (0, 1, 2, 0)]
    with Model(tiny.base, ONE) as model:
        found = [one.tokens for one in run(model, drawn)]
    assert found[0] == found[3] and len({*found}) == 3


def test_sampling_leaves_out_what_it_is_told_to() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    generator = np.random.default_rng(0)

    def shares(**settings: Any) -> np.ndarray:
        drawn = [sample(logits, Sampling(1.0, **settings), generator) for _ in range(4000)]
        return np.bincount(drawn, minlength=4) / 4000

    assert np.allclose(shares(), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    assert np.allclose(shares(top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    # the fewest that have 0.7 together are two
    assert np.allclose(shares(top_p=0.7), [0.625, 0.375, 0, 0], atol=0.03)
    cold = [sample(logits, Sampling(0.1), generator) for _ in range(500)]
    assert np.mean(np.array(cold) == 0) > 0.97


@pytest.mark.parametrize("n_tokens", [0, 300])
def test_prompts_that_cannot_be_continued(tiny: TinyFiles, n_tokens: int) -> None:
    with Model(tiny.base, ONE) as model, pytest.raises(EvaluationError):
        run(model, [Prompt(ids_of("zq"), n_tokens)])


def test_logits_that_are_not_numbers(tmp_path: Path) -> None:
    from eval_fixtures import weights

    tensors = weights(SPEC)
    tensors["output_norm.weight"] = np.full(SPEC.n_embd, np.nan, np.float32)
    file = write_tiny(tmp_path / "nan.gguf", replace(SPEC), tensors)
    with Model(file, ONE) as model, pytest.raises(EvaluationError, match="not finite"):
        run(model, [Prompt(ids_of("zq"), 3)])
