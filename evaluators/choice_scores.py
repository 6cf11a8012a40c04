"""log p of every choice of multiple-choice items, many items in one batch.

Tokens are split as lm-evaluation-harness splits them: context and context + continuation are
tokenized whole, and what the second has beyond the first's length is the continuation; spaces at
the end of a context go to the continuation first; an empty context becomes BOS (or EOS).

Sequences that begin alike share what they begin with: a batch is a prefix tree, where a token is
decoded once, as a member of every sequence that passes through it (`kv_unified`). So a context
costs one pass and not one per choice, and items are taken in the order of their tokens, so that
neighbors share "Question: How do you" and WinoGrande's twins most of their sentence. A recurrent
state cannot be shared like that: such models get every choice in full.
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
    """Token ids per choice: `inputs` are context and continuation without the last token, which is
    only ever a target, and `targets` the continuation. `n_shared` first inputs are the same in all
    choices, and may be decoded once.
    """

    inputs: tuple[NDArray[np.int32], ...]
    targets: tuple[NDArray[np.int32], ...]
    n_shared: int

    @property
    def n_tokens(self) -> int:
        """Tokens to decode, if nothing is shared with other items."""
        return self.n_shared + sum(len(ids) - self.n_shared for ids in self.inputs)

    @property
    def n_outputs(self) -> int:
        """Rows of logits at most."""
        return sum(len(ids) for ids in self.targets)


class PrefixTree:
    """The sequences of one batch; a node is a token. Parents come before their children, so the
    nodes in order are a valid batch. With `share` False every sequence has nodes of its own.
    """

    def __init__(self, share: bool) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.members: list[list[int]] = []  # sequences through each node
        self.n_sequences = 0
        self._share = share
        self._children: dict[tuple[int, int], int] = {}  # (parent or -1, token) -> node

    def depth(self, ids: NDArray[np.int32]) -> int:
        """Return how many first tokens of a sequence are in the tree."""
        node = -1
        for depth, token in enumerate(ids.tolist()):
            child = self._children.get((node, token))
            if child is None:
                return depth
            node = child
        return len(ids)

    def add(self, ids: NDArray[np.int32]) -> list[int]:
        """Add one sequence; gives its nodes, one for each token."""
        node, path = -1, []
        for position, token in enumerate(ids.tolist()):
            child = self._children.get((node, token))
            if child is None:
                child = len(self.tokens)
                self.tokens.append(token)
                self.positions.append(position)
                self.members.append([])
                if self._share:
                    self._children[node, token] = child
            node = child
            self.members[node].append(self.n_sequences)
            path.append(node)
        self.n_sequences += 1
        return path


@dataclass
class Pack:
    """Items of one batch: their indices, and for each of their choices the nodes of its inputs."""

    tree: PrefixTree
    indices: list[int]
    paths: list[list[list[int]]]
    n_outputs: int = 0


def encode_pair(
    model: Model, context: str, continuation: str
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the token ids of context and continuation. Raises EvaluationError when the
    continuation leaves no token of its own, because it merged into the context's last.
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
    """Return the token ids of every choice of an item; nothing is shared with `share` False."""
    inputs, targets = [], []
    for context, continuation in zip(item.contexts, item.continuations, strict=True):
        head, tail = encode_pair(model, context, continuation)
        inputs.append(np.concatenate([head, tail[:-1]]))
        targets.append(tail)
    n_shared = _n_common(inputs) if share else 0
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
    """Call `done(index, [sum of log p of each choice's tokens])` for every item, in the order that
    shares most. `share` False keeps all sequences apart.
    """
    share = share and not model.is_recurrent
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
        for pack in _packs(encoded, n_rows, n_sequences, share):
            chosen = [encoded[i] for i in pack.indices]
            scores = _score_pack(context, pack, chosen, workers)
            for index, sums in zip(pack.indices, scores, strict=True):
                done(index, sums)


def _packs(
    items: Sequence[EncodedItem], n_rows: int, n_sequences: int, share: bool
) -> Iterator[Pack]:
    """Items that fit one batch of MAX_STEP tokens; an item that does not is alone in its batch."""
    order = sorted(range(len(items)), key=lambda i: items[i].inputs[0].tolist())
    pack = Pack(PrefixTree(share), [], [])
    for i in order:
        item = items[i]
        n_new = item.n_tokens - min(item.n_shared, pack.tree.depth(item.inputs[0]))
        if pack.indices and (
            len(pack.tree.tokens) + n_new > MAX_STEP
            or pack.n_outputs + item.n_outputs > n_rows
            or pack.tree.n_sequences + len(item.inputs) > n_sequences
        ):
            yield pack
            pack = Pack(PrefixTree(share), [], [])
        pack.indices.append(i)
        pack.paths.append([pack.tree.add(ids) for ids in item.inputs])
        pack.n_outputs += item.n_outputs
    yield pack


def _score_pack(
    context: Context, pack: Pack, items: Sequence[EncodedItem], workers: RowWorkers
) -> list[list[float]]:
    """Sum of log p of each choice of each item, in one batch."""
    tree = pack.tree
    # The logits at the context's last token predict the first token of the continuation.
    sources = [
        [path[len(path) - len(ids) :] for path, ids in zip(paths, item.targets, strict=True)]
        for paths, item in zip(pack.paths, items, strict=True)
    ]
    wanted = np.zeros(len(tree.tokens), dtype=np.int8)
    for nodes in sources:
        wanted[[node for source in nodes for node in source]] = 1
    context.clear()
    logits = context.decode(
        np.array(tree.tokens, dtype=np.int32),
        np.array(tree.positions, dtype=np.int32),
        wanted,
        tree.members,
    )
    row_of = np.cumsum(wanted) - 1
    log_sums = workers.log_sums(logits)
    scores = []
    for nodes, item in zip(sources, items, strict=True):
        rows = [row_of[source] for source in nodes]
        scores.append(
            [
                float((logits[at, targets] - log_sums[at]).sum())
                for at, targets in zip(rows, item.targets, strict=True)
            ]
        )
    return scores


def _n_common(inputs: Sequence[NDArray[np.int32]]) -> int:
    """How many first tokens all have in common."""
    n = min(len(ids) for ids in inputs)
    same = np.all([ids[:n] == inputs[0][:n] for ids in inputs], axis=0)
    return n if same.all() else int(same.argmin())
