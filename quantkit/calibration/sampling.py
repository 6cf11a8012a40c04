"""Let the model write calibration text: this needs no data, and fits any language it speaks.

Two kinds: free text continued from short openings, and dialogues through the model's own chat
template, in which the model writes both sides (the user's turn is sampled from the template's
beginning of a user message).

All texts are written side by side: a step takes a GPU about as long for a thousand as for one. Each
has random numbers of its own, so it is drawn in the same way whatever stands beside it; products of
other batches still round otherwise, so how many texts a batch has depends on the model alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from quantkit.errors import QuantkitError
from quantkit.files import json_line, write_json
from quantkit.llamacpp.chat import ChatTemplate
from quantkit.ranks.group import ALONE, Ranks
from quantkit.run.folder import read_as

# Texts of a batch. A CPU gains nothing by more, and a killed run writes its last batch again.
_MOST_TEXTS = {"cpu": 128, "cuda": 1024}
_BATCH_BYTES = 2**32  # of keys, values and logits of a batch: a few sequences of any model fit
_LOGIT_BYTES = 12  # of each: as the model gives it, in float32, and where others are put out
_LIKELIEST = 64  # tokens that are drawn from; nucleus sampling would sort the vocabulary every step
QUESTION_TOKENS = 64
_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Prompt:
    """What a text begins with, and the seed of the random numbers that it goes on by."""

    text: str
    seed: tuple[int, ...]


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
def continue_batch(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    n_new: int,
    on_step: Callable[[int], None] = lambda n_done: None,
) -> list[str]:
    """Continue each prompt by at most `n_new` sampled tokens, side by side; return the new texts
    without special tokens. `on_step` is called with the steps that are done.
    """
    ids = [tokenizer(prompt.text, verbose=False).input_ids for prompt in prompts]
    width = max(map(len, ids))
    ends = _ends(model, tokenizer)
    # The mask hides what is padded with: any token of the table will do, a tokenizer's own need not
    # be one.
    batch = torch.tensor([[ends[0]] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    draw = _Draw(prompts, width, n_new, model.device, on_step)
    with _contiguous_inputs(model.get_output_embeddings()), _plain(model, ends, n_new):
        out = model.generate(  # type: ignore[operator]
            input_ids=batch.to(model.device),
            attention_mask=mask.to(model.device),
            logits_processor=LogitsProcessorList([draw]),
        )
    texts = []
    for row in out[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        texts.append(tokenizer.decode(row[:end], skip_special_tokens=True))
    return texts


class _Draw(LogitsProcessor):
    """Draws each text's next token from the likeliest ones by the inverse of their cumulative
    distribution, at a number of the text's own for every step, and puts out the others: the greedy
    choice is what was drawn.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        width: int,
        n_new: int,
        device: torch.device,
        on_step: Callable[[int], None],
    ) -> None:
        numbers = [np.random.default_rng(p.seed).random((n_new, 1), np.float32) for p in prompts]
        self._numbers = torch.from_numpy(np.stack(numbers)).to(device)
        self._width, self._on_step = width, on_step

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores of minus infinity, float32 (n_texts, n_vocab), but for the drawn tokens."""
        step = input_ids.shape[1] - self._width
        found, tokens = scores.topk(min(_LIKELIEST, scores.shape[1]))
        below = found.softmax(1).cumsum(1)
        drawn = (below <= self._numbers[:, step] * below[:, -1:]).sum(1, keepdim=True)
        drawn = drawn.clamp_max(found.shape[1] - 1)
        self._on_step(step + 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens.gather(1, drawn), 0)


def _ends(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The tokens that end a text, at least one, all of them in the table of embeddings."""
    said = model.generation_config.eos_token_id if model.generation_config else None
    found = [*(said if isinstance(said, list) else [said]), tokenizer.eos_token_id]
    table: Any = model.get_input_embeddings()
    kept = [i for i in dict.fromkeys(found) if i is not None and 0 <= i < len(table.weight)]
    return kept or [0]


@contextmanager
def _plain(model: PreTrainedModel, ends: list[int], n_new: int) -> Iterator[None]:
    """The model's own distribution, whatever the checkpoint's generation_config.json says:
    penalties and stops are for chats.
    """
    before = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=n_new,
        do_sample=False,  # `_Draw` does
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    try:
        yield
    finally:
        model.generation_config = before


def texts_at_once(model: PreTrainedModel, n_tokens: int) -> int:
    """Return how many texts of so many tokens are written at a time: fewer where keys and values of
    a token, or the vocabulary, take much memory.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    of_one = 2 * config.num_hidden_layers * kept * width * model.dtype.itemsize * n_tokens
    of_one += _LOGIT_BYTES * config.vocab_size
    return min(_MOST_TEXTS[model.device.type], max(4, _BATCH_BYTES // of_one))


def write_share(
    ranks: Ranks,
    model: PreTrainedModel,
    tokenizer: Any,
    batches: Sequence[Sequence[Prompt]],
    n_new: int,
    on_step: Callable[[int], None] = lambda n_done: None,
) -> list[list[str]]:
    """Continue this rank's share of the batches; return what came of all to rank 0."""
    own = [continue_batch(model, tokenizer, b, n_new, on_step) for b in ranks.share(batches)]
    found = ranks.gather(own)
    return [found[i % ranks.size][i // ranks.size] for i in range(len(batches))] if found else []


def follow_writer(ranks: Ranks, model: PreTrainedModel, tokenizer: Any, asked: Any) -> None:
    """Do another rank's share of what rank 0's `Writer` tells: its task "write"."""
    n_new, told = asked
    batches = [[Prompt(text, tuple(seed)) for text, seed in batch] for batch in told]
    write_share(ranks, model, tokenizer, batches, n_new)


class Writer:
    """Writes texts with a model, each by random numbers that `seed`, its kind and its place make.

    Batches that are written are kept in the file `kept`, by what was asked for: a killed run goes
    on after them. Every rank writes one at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        seed: int,
        progress: Progress,
        kept: Path | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._ranks = ranks
        self._model, self._tokenizer, self._seed = model, tokenizer, seed
        self._progress, self._path = progress, kept
        self.n_expected = 0  # tokens that are to be written in all, for the progress
        self._n_before = 0  # tokens of what was written so far
        there = kept is not None and kept.exists()
        self._kept = read_as(dict[str, list[str]], kept) if kept and there else {}

    def free_texts(
        self, asked: Sequence[tuple[str, Sequence[str], int]], n_new: int
    ) -> list[list[str]]:
        """Write texts of several kinds: for each its name, openings that are continued in turn by
        at most `n_new` tokens, and how many there are to be.
        """
        prompts = [
            self._prompt(name, i, starts[i % len(starts)])
            for name, starts, n_texts in asked
            for i in range(n_texts)
        ]
        new = iter(self.continued(prompts, n_new, "the model writes calibration text"))
        whole = (prompt.text + text for prompt, text in zip(prompts, new, strict=True))
        return [[next(whole) for _ in range(n_texts)] for _, _, n_texts in asked]

    def dialogues(self, chat: ChatTemplate, n_texts: int, n_new: int) -> list[str]:
        """Write one-turn dialogues, rendered by the chat template; the model writes question and
        answer.
        """
        marked = chat.render([{"role": "user", "content": _MARK}])
        start = marked[: marked.index(_MARK)]
        prompts = [self._prompt("question", i, start) for i in range(n_texts)]
        said = self.continued(prompts, QUESTION_TOKENS, "the model writes questions")
        turns = [[{"role": "user", "content": q.strip() or "Hello!"}] for q in said]
        asked = [chat.render(turn, add_generation_prompt=True) for turn in turns]
        prompts = [self._prompt("answer", i, text) for i, text in enumerate(asked)]
        answers = self.continued(prompts, n_new, "the model writes answers")
        return [
            chat.render([*turn, {"role": "assistant", "content": answer.strip()}])
            for turn, answer in zip(turns, answers, strict=True)
        ]

    def _prompt(self, kind: str, index: int, text: str) -> Prompt:
        return Prompt(text, (self._seed, index, *kind.encode()))

    def continued(self, prompts: Sequence[Prompt], n_new: int, message: str) -> list[str]:
        """Return what comes after each prompt, at most `n_new` tokens, in batches of a constant
        number of texts.
        """
        n = texts_at_once(self._model, 2 * n_new)  # prompts are shorter than what is written
        n_done, n_side = 0, n * self._ranks.size

        def tell(n_texts: int) -> None:
            """Progress over all that is written, in tokens."""
            whole = max(self.n_expected, self._n_before + len(prompts) * n_new)
            self._progress(self._n_before + n_texts * n_new, whole, message)

        def on_step(step: int) -> None:
            done = n_done + min(n_side, len(prompts) - n_done) * step // n_new
            tell(min(done, len(prompts) - 1))

        texts: list[str] = []
        for n_done in range(0, len(prompts), n_side):
            side = prompts[n_done : n_done + n_side]
            batches = [side[i : i + n] for i in range(0, len(side), n)]
            texts += [text for found in self._once(batches, n_new, on_step) for text in found]
        tell(len(prompts))
        self._n_before += len(prompts) * n_new
        return texts

    def _once(
        self, batches: Sequence[Sequence[Prompt]], n_new: int, on_step: Callable[[int], None]
    ) -> list[list[str]]:
        """The texts of a batch for every rank, unless they are kept."""
        keys = [hashlib.sha256(json_line([n_new, batch])).hexdigest() for batch in batches]
        left = {k: b for k, b in zip(keys, batches, strict=True) if k not in self._kept}
        if left:
            told = [[[prompt.text, list(prompt.seed)] for prompt in b] for b in left.values()]
            with self._ranks.task("write", [n_new, told]):
                found = write_share(
                    self._ranks,
                    self._model,
                    self._tokenizer,
                    list(left.values()),
                    n_new,
                    on_step,
                )
            self._kept |= dict(zip(left, found, strict=True))
            if self._path is not None:
                write_json(self._path, self._kept)
        return [self._kept[key] for key in keys]


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
