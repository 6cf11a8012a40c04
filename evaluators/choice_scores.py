"""log p of every choice of multiple-choice items, many items in one batch.

Tokens are split as lm-evaluation-harness splits them: context and context + continuation are
tokenized whole, and what the second has beyond the first's length is the continuation; spaces at
the end of a context go to the continuation first; an empty context becomes BOS (or EOS).

All choices of an item share the tokens they begin with. Those are decoded once, as members of all
the choices' sequences at the same time (`kv_unified`), so a context costs one pass and not one per
choice. A recurrent state cannot be shared like that: such models get every choice in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluators.errors import EvaluationError
from evaluators.llama_runtime import MAX_STEP, Context, Model
from evaluators.logprobs import RowWorkers
from evaluators.tasks.items import MAX_CHOICES, Item

_MAX_SEQUENCES = 64  # of one batch
_MAX_RECURRENT = 8  # each has a state of its own, some megabytes a layer
_OUTPUT_BYTES = 256 << 20  # of logits in one batch, unless one item alone needs more


@dataclass(frozen=True)
class EncodedItem:
    """Token ids per choice (context and continuation, without the last one, which is only ever a
    target), the number of context tokens, and how many first tokens all choices share.
    """

    inputs: tuple[NDArray[np.int32], ...]
    targets: tuple[NDArray[np.int32], ...]
    n_shared: int

    @property
    def n_tokens(self) -> int:
        """Tokens to decode."""
        return self.n_shared + sum(len(ids) - self.n_shared for ids in self.inputs)

    @property
    def n_outputs(self) -> int:
        """Rows of logits at most."""
        return sum(len(ids) for ids in self.targets)


def encode_pair(
    model: Model, context: str, continuation: str
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Token ids of context and continuation. Raises EvaluationError when the continuation leaves
    no token of its own, because it merged into the context's last.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if stripped:
        head = model.tokenize(stripped)
        tail = model.tokenize(stripped + continuation)[len(head) :]
    else:
        start = model.bos if model.bos >= 0 else model.eos
        head = np.array([start], dtype=np.int32)
        tail = model.tokenize(continuation, add_special=False)
        if len(tail) and tail[0] == start:
            tail = tail[1:]
    if len(tail) == 0 or len(head) == 0 or head[0] < 0:
        raise EvaluationError(
            f"The choice {continuation!r} after {context[-40:]!r} has no token to score.",
            "Remove the item.",
        )
    return head, tail


def encode_item(model: Model, item: Item, share: bool = True) -> EncodedItem:
    """Token ids of every choice of an item. `share` False keeps the choices apart."""
    inputs, targets = [], []
    for context, continuation in zip(item.contexts, item.continuations, strict=True):
        head, tail = encode_pair(model, context, continuation)
        inputs.append(np.concatenate([head, tail[:-1]]))
        targets.append(tail)
    n_shared = _n_common(inputs) if share and not model.is_recurrent else 0
    encoded = EncodedItem(tuple(inputs), tuple(targets), n_shared)
    model.check_context(max(len(ids) for ids in inputs))
    return encoded


def score_items(
    model: Model,
    items: Sequence[Item],
    workers: RowWorkers,
    done: Callable[[int, list[float]], None],
    share: bool = True,
) -> None:
    """Call `done(index, [sum of log p of each choice's tokens])` for every item, in order."""
    encoded = [encode_item(model, item, share) for item in items]
    n_step = max(MAX_STEP, max(item.n_tokens for item in encoded))
    n_rows = max(
        _OUTPUT_BYTES // (4 * model.n_vocab), max(item.n_outputs for item in encoded), MAX_CHOICES
    )
    n_rows = min(n_rows, n_step)
    n_sequences = max(
        max(len(item.inputs) for item in encoded),
        _MAX_RECURRENT if model.is_recurrent else _MAX_SEQUENCES,
    )
    with Context(model, n_step, n_step, n_rows, n_sequences) as context:
        for pack in _packs(encoded, n_rows, n_sequences):
            for index, scores in zip(
                pack, _score_pack(context, [encoded[i] for i in pack], workers), strict=True
            ):
                done(index, scores)


def _packs(items: Sequence[EncodedItem], n_rows: int, n_sequences: int) -> Iterator[range]:
    """Runs of items that fit one batch of MAX_STEP tokens; an item that does not is alone in it."""
    start = tokens = rows = sequences = 0
    for i, item in enumerate(items):
        if i > start and (
            tokens + item.n_tokens > MAX_STEP
            or rows + item.n_outputs > n_rows
            or sequences + len(item.inputs) > n_sequences
        ):
            yield range(start, i)
            start, tokens, rows, sequences = i, 0, 0, 0
        tokens, rows = tokens + item.n_tokens, rows + item.n_outputs
        sequences += len(item.inputs)
    yield range(start, len(items))


def _score_pack(
    context: Context, items: Sequence[EncodedItem], workers: RowWorkers
) -> list[list[float]]:
    """Sum of log p of each choice of each item, in one batch."""
    tokens: list[int] = []
    positions: list[int] = []
    wanted: list[int] = []
    sequences: list[list[int]] = []
    # for each choice, the batch index of the logits that predict each of its targets
    sources: list[list[int]] = []
    n_sequences = 0

    def add(ids: NDArray[np.int32], position: int, members: list[int]) -> int:
        """Append tokens; gives the batch index of the first."""
        begin = len(tokens)
        tokens.extend(ids.tolist())
        positions.extend(range(position, position + len(ids)))
        wanted.extend([0] * len(ids))
        sequences.extend([members] * len(ids))
        return begin

    for item in items:
        members = list(range(n_sequences, n_sequences + len(item.inputs)))
        n_sequences += len(item.inputs)
        p = item.n_shared
        shared = add(item.inputs[0][:p], 0, members)
        for member, ids, targets in zip(members, item.inputs, item.targets, strict=True):
            own = add(ids[p:], p, [member])
            first = len(ids) - len(targets)  # logits at the context's last token are the first used
            source = [
                shared + i if i < p else own + i - p for i in range(first, first + len(targets))
            ]
            for i in source:
                wanted[i] = 1
            sources.append(source)

    flags = np.array(wanted, dtype=np.int8)
    context.clear()
    logits = context.decode(
        np.array(tokens, dtype=np.int32), np.array(positions, dtype=np.int32), flags, sequences
    )
    row_of = np.cumsum(flags) - 1
    log_sums = workers.log_sums(logits)
    scores, choice = [], iter(sources)
    for item in items:
        sums = []
        for targets in item.targets:
            rows = row_of[next(choice)]
            sums.append(float((logits[rows, targets] - log_sums[rows]).sum()))
        scores.append(sums)
    return scores


def _n_common(inputs: Sequence[NDArray[np.int32]]) -> int:
    """How many first tokens all have in common."""
    n = min(len(ids) for ids in inputs)
    same = np.all([ids[:n] == inputs[0][:n] for ids in inputs], axis=0)
    return n if same.all() else int(same.argmin())
