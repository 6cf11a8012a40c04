"""Calibration text written by the model itself: needs no data, fits any language the model speaks.

Two kinds: free text continued from short openings, and dialogues through the model's own chat
template, in which the model writes both sides (the user's turn is sampled from the template's
beginning of a user message).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

_BATCH = 128
_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
Progress = Callable[[int, int], None]


def openings() -> list[str]:
    """The openings of data/openings.txt, in order."""
    lines = (Path(__file__).parent.parent / "data" / "openings.txt").read_text("utf-8").splitlines()
    return [line.split("\t", 1)[1] for line in lines if line and not line.startswith("#")]


@contextmanager
def _contiguous_inputs(head: torch.nn.Module) -> Iterator[None]:
    """`generate` hands the head the last position of a longer pass. For a strided batch torch
    copies the whole weight once per text, which took longer than all the rest.
    """
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _continue(
    model: PreTrainedModel, tokenizer: Any, prompts: list[str], n_new: int, seed: int
) -> list[str]:
    """Continue each prompt by at most `n_new` sampled tokens; texts with the prompt, special tokens
    kept.
    """
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    torch.manual_seed(seed)
    with _contiguous_inputs(model.get_output_embeddings()):
        out = model.generate(  # type: ignore[operator]
            **batch,
            max_new_tokens=n_new,
            do_sample=True,
            temperature=1.0,
            top_k=64,  # nucleus sampling would sort the vocabulary at every step
            pad_token_id=tokenizer.pad_token_id,
        )
    texts = []
    for row, prompt in zip(out, batch.input_ids, strict=True):
        new = row[len(prompt) :].tolist()
        if tokenizer.eos_token_id in new:
            new = new[: new.index(tokenizer.eos_token_id)]
        texts.append(tokenizer.decode(new, skip_special_tokens=True))
    return texts


def free_text(
    model: PreTrainedModel,
    tokenizer: Any,
    starts: Sequence[str],
    n_texts: int,
    n_new: int,
    seed: int,
    progress: Progress,
) -> list[str]:
    """`n_texts` texts continued from the openings `starts` in turn, each of at most `n_new` new
    tokens.
    """
    texts: list[str] = []
    while len(texts) < n_texts:
        n = min(_BATCH, n_texts - len(texts))
        prompts = [starts[(len(texts) + i) % len(starts)] for i in range(n)]
        continued = _continue(model, tokenizer, prompts, n_new, seed + len(texts))
        texts += [prompt + text for prompt, text in zip(prompts, continued, strict=True)]
        progress(len(texts), n_texts)
    return texts


def has_chat_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def dialogues(
    model: PreTrainedModel, tokenizer: Any, n_texts: int, n_new: int, seed: int, progress: Progress
) -> list[str]:
    """`n_texts` one-turn dialogues, rendered by the chat template; the model writes question and
    answer.
    """
    marked = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    start = marked[: marked.index(_MARK)]
    texts: list[str] = []
    while len(texts) < n_texts:
        n = min(_BATCH, n_texts - len(texts))
        questions = _continue(model, tokenizer, [start] * n, 64, seed + len(texts))
        turns = [[{"role": "user", "content": q.strip() or "Hello!"}] for q in questions]
        prompts = [
            tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True)
            for t in turns
        ]
        answers = _continue(model, tokenizer, prompts, n_new, seed + len(texts) + 1)
        for turn, answer in zip(turns, answers, strict=True):
            whole = [*turn, {"role": "assistant", "content": answer.strip()}]
            texts.append(tokenizer.apply_chat_template(whole, tokenize=False))
        progress(len(texts), n_texts)
    return texts
