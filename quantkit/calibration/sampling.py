"""Let the model write calibration text: this needs no data, and fits any language it speaks.

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
from transformers import GenerationConfig, PreTrainedModel

from quantkit.errors import QuantkitError
from quantkit.llamacpp.chat import ChatTemplate

_BATCH = 128
_CACHE_BYTES = 2**32  # of keys and values that a batch may take: a few sequences of any model fit
_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
Progress = Callable[[int, int], None]


def openings() -> list[str]:
    """Return the openings of data/openings.txt, in order."""
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
    ids = [tokenizer(prompt, verbose=False).input_ids for prompt in prompts]
    width = max(map(len, ids))
    ends = _ends(model, tokenizer)
    # The mask hides what is padded with: any token of the table will do, a tokenizer's own need not
    # be one.
    batch = torch.tensor([[ends[0]] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    torch.manual_seed(seed)
    with _contiguous_inputs(model.get_output_embeddings()), _plain_sampling(model, ends, n_new):
        out = model.generate(  # type: ignore[operator]
            input_ids=batch.to(model.device), attention_mask=mask.to(model.device)
        )
    texts = []
    for row in out:
        new = row[width:].tolist()
        end = next((i for i, token in enumerate(new) if token in ends), len(new))
        texts.append(tokenizer.decode(new[:end], skip_special_tokens=True))
    return texts


def _ends(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The tokens that end a text, at least one, all of them in the table of embeddings."""
    said = model.generation_config.eos_token_id if model.generation_config else None
    found = [*(said if isinstance(said, list) else [said]), tokenizer.eos_token_id]
    table: Any = model.get_input_embeddings()
    kept = [i for i in dict.fromkeys(found) if i is not None and 0 <= i < len(table.weight)]
    return kept or [0]


@contextmanager
def _plain_sampling(model: PreTrainedModel, ends: list[int], n_new: int) -> Iterator[None]:
    """The model's own distribution, whatever the checkpoint's generation_config.json says:
    penalties and stops are for chats.
    """
    before = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=n_new,
        do_sample=True,
        temperature=1.0,
        top_k=64,  # nucleus sampling would sort the vocabulary at every step
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    try:
        yield
    finally:
        model.generation_config = before


def _batch(model: PreTrainedModel, n_tokens: int) -> int:
    """How many texts of so many tokens are written at a time: fewer where a token's keys and values
    take much memory.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    of_one = 2 * config.num_hidden_layers * kept * width * model.dtype.itemsize * n_tokens
    return max(4, min(_BATCH, _CACHE_BYTES // of_one))


def free_text(
    model: PreTrainedModel,
    tokenizer: Any,
    starts: Sequence[str],
    n_texts: int,
    n_new: int,
    seed: int,
    progress: Progress,
) -> list[str]:
    """Write `n_texts` texts, continued from the openings `starts` in turn, each of at most `n_new`
    new tokens.
    """
    texts: list[str] = []
    n_batch = _batch(model, n_new)
    while len(texts) < n_texts:
        n = min(n_batch, n_texts - len(texts))
        prompts = [starts[(len(texts) + i) % len(starts)] for i in range(n)]
        continued = _continue(model, tokenizer, prompts, n_new, seed + len(texts))
        texts += [prompt + text for prompt, text in zip(prompts, continued, strict=True)]
        progress(len(texts), n_texts)
    return texts


def why_no_chat(chat: ChatTemplate) -> str:
    """Return why there is no chat template that takes a user's turn and an answer as plain text;
    nothing where there is one.
    """
    if not chat.exists:
        return "the tokenizer has no chat template"
    turns = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": "Yes."}]
    try:
        made = [chat.render(t) for t in (turns[:1], turns)]
    except (QuantkitError, ValueError) as error:
        return getattr(error, "message", str(error)).rstrip(".")
    taken = all(_MARK in text for text in made)
    return "" if taken else "the chat template leaves out what is said"


def dialogues(
    model: PreTrainedModel,
    tokenizer: Any,
    chat: ChatTemplate,
    n_texts: int,
    n_new: int,
    seed: int,
    progress: Progress,
) -> list[str]:
    """Write `n_texts` one-turn dialogues, rendered by the chat template; the model writes question
    and answer.
    """
    marked = chat.render([{"role": "user", "content": _MARK}])
    start = marked[: marked.index(_MARK)]
    texts: list[str] = []
    n_batch = _batch(model, 2 * n_new)
    while len(texts) < n_texts:
        n = min(n_batch, n_texts - len(texts))
        questions = _continue(model, tokenizer, [start] * n, 64, seed + len(texts))
        turns = [[{"role": "user", "content": q.strip() or "Hello!"}] for q in questions]
        prompts = [chat.render(t, add_generation_prompt=True) for t in turns]
        answers = _continue(model, tokenizer, prompts, n_new, seed + len(texts) + 1)
        for turn, answer in zip(turns, answers, strict=True):
            whole = [*turn, {"role": "assistant", "content": answer.strip()}]
            texts.append(chat.render(whole))
        progress(len(texts), n_texts)
    return texts
