"""log p of continuations after their contexts, many pairs in one batch.

Tokens are split as lm-evaluation-harness splits them: context and context + continuation are
tokenized whole, and what the second has beyond the first's length is the continuation; spaces at
the end of a context go to the continuation first; an empty context becomes BOS (or EOS).

Sequences that begin alike share what they begin with: they are taken in the order of their tokens,
and a pack of them is a prefix tree, where a token is decoded once, as a member of every sequence
that passes through it (`kv_unified`). So a context costs one pass and not one per choice, neighbors
share "Question: How do you", and all questions of a subject the examples that stand before them. A
recurrent state cannot be shared like that: such models get every pair in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evaluators.choice_items import Item
from evaluators.errors import EvaluationError
from evaluators.llama_runtime import MAX_STEP, Context, Model
from evaluators.logprobs import RowWorkers

Ids = NDArray[np.int32]

_MAX_SEQUENCES = 64  # of one pack
_MAX_RECURRENT = 8  # each has a state of its own, some megabytes a layer
_OUTPUT_BYTES = 256 << 20  # of logits in one step
# A pack is of one step, which is the fastest. Where sequences share more than they add it may grow
# to several: what they share is computed once a pack.
_MOST_CELLS = 8192


@dataclass(frozen=True)
class Pair:
    """Token ids: `inputs` are context and continuation without the last token, which is only ever
    a target, and `targets` the continuation.
    """

    inputs: Ids
    targets: Ids

    @classmethod
    def of(cls, context: Ids, continuation: Ids) -> Pair:
        """Return the pair of a context and a continuation, neither of them empty."""
        return cls(np.concatenate([context, continuation[:-1]]), continuation)


@dataclass(frozen=True)
class Score:
    """Sum of log p of a continuation's tokens, and whether each was the most likely one."""

    log_p: float
    is_greedy: bool


@dataclass
class Pack:
    """Pairs that are computed together, as a prefix tree whose nodes are tokens. Parents come
    before their children, so the nodes in order are a valid batch. `paths` are the nodes of every
    pair's inputs.
    """

    share: bool = True
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)  # sequences through each node
    indices: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)  # (parent or -1, token)

    def depth(self, ids: Ids) -> int:
        """Return how many first tokens of a sequence are in the tree."""
        node = -1
        for depth, token in enumerate(ids.tolist()):
            child = self._children.get((node, token))
            if child is None:
                return depth
            node = child
        return len(ids)

    def add(self, index: int, ids: Ids) -> None:
        """Add the inputs of the pair of this index."""
        node, path, sequence = -1, [], len(self.indices)
        for position, token in enumerate(ids.tolist()):
            child = self._children.get((node, token))
            if child is None:
                child = len(self.tokens)
                self.tokens.append(token)
                self.positions.append(position)
                self.members.append([])
                if self.share:
                    self._children[node, token] = child
            node = child
            self.members[node].append(sequence)
            path.append(node)
        self.indices.append(index)
        self.paths.append(path)


def encode_pair(model: Model, context: str, continuation: str, special: bool = False) -> Pair:
    """Return the token ids of a pair; with `special` the names of special tokens in the texts are
    these tokens, as to the tokenizers of transformers, and a BOS that stands there is the only one.

    Raises EvaluationError when the continuation leaves no token of its own, because it merged into
    the context's last.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if stripped:
        head = tokens_of(model, stripped, special)
        tail = tokens_of(model, stripped + continuation, special)[len(head) :]
    else:
        head = start_of(model)
        tail = model.tokenize(continuation, add_special=False, parse_special=special)
        if len(tail) and tail[0] == head[0]:
            tail = tail[1:]
    if len(tail) == 0 or len(head) == 0 or head[0] < 0:
        raise EvaluationError(
            f"The choice {continuation!r} after {context[-40:]!r} has no token to score.",
            "Remove the item.",
        )
    return Pair.of(head, tail)


def tokens_of(model: Model, text: str, special: bool) -> Ids:
    """Return the tokens of a text that starts a sequence. A BOS that the text has itself, as chat
    templates write one, is not put there twice.
    """
    ids = model.tokenize(text, parse_special=special)
    twice = special and model.adds_bos and len(ids) > 1 and ids[0] == ids[1] == model.bos
    return ids[1:] if twice else ids


def start_of(model: Model) -> Ids:
    """Return the one token that stands where there is no context, [1]; below 0 if there is none."""
    return np.array([model.bos if model.bos >= 0 else model.eos], dtype=np.int32)


def score_items(
    model: Model,
    items: Sequence[Item],
    workers: RowWorkers,
    done: Callable[[int, list[float]], None],
    share: bool = True,
) -> None:
    """Call `done(index, [sum of log p of each choice's tokens])` for every item, in the order that
    shares most. `share` False keeps all sequences apart.

    Raises EvaluationError for an item that is longer than the model was trained with.
    """
    pairs: list[Pair] = []
    owners: list[tuple[int, int]] = []
    for i, item in enumerate(items):
        for j, texts in enumerate(zip(item.contexts, item.continuations, strict=True)):
            pairs.append(encode_pair(model, *texts))
            owners.append((i, j))
    model.check_context(max(len(pair.inputs) for pair in pairs))
    found: dict[int, dict[int, float]] = {}

    def scored(index: int, score: Score) -> None:
        i, j = owners[index]
        sums = found.setdefault(i, {})
        sums[j] = score.log_p
        if len(sums) == len(items[i].continuations):
            done(i, [sums[j] for j in range(len(sums))])

    score_pairs(model, pairs, workers, scored, share)


def score_pairs(
    model: Model,
    pairs: Sequence[Pair],
    workers: RowWorkers,
    done: Callable[[int, Score], None],
    share: bool = True,
) -> None:
    """Call `done(index, score)` for every pair, in the order that shares most."""
    share = share and not model.is_recurrent
    longest = max(len(pair.inputs) for pair in pairs)
    n_cells = MAX_STEP if longest <= MAX_STEP else max(longest, _MOST_CELLS)
    n_sequences = _MAX_RECURRENT if model.is_recurrent else _MAX_SEQUENCES
    n_rows = min(max(1, _OUTPUT_BYTES // (4 * model.n_vocab)), MAX_STEP)
    with Context(model, n_cells, MAX_STEP, max(n_rows, n_sequences), n_sequences) as context:
        for pack in _packs(pairs, n_cells, n_sequences, share):
            chosen = [pairs[i] for i in pack.indices]
            scores = _score_pack(context, pack, chosen, workers, n_rows)
            for index, score in zip(pack.indices, scores, strict=True):
                done(index, score)


def in_order(ids: Ids) -> bytes:
    """Return what sequences are sorted by: their tokens, the first first."""
    return ids.astype(">i4").tobytes()


def _packs(pairs: Sequence[Pair], n_cells: int, n_sequences: int, share: bool) -> Iterator[Pack]:
    """Packs of MAX_STEP tokens; of more where a pair is longer, and as long as pairs share more
    with the pack than they add.
    """
    order = sorted(range(len(pairs)), key=lambda i: in_order(pairs[i].inputs))
    pack = Pack(share)
    for i in order:
        ids = pairs[i].inputs
        n_shared = pack.depth(ids)
        n_all = len(pack.tokens) + len(ids) - n_shared
        fits = n_all <= MAX_STEP or (n_all <= n_cells and 2 * n_shared >= len(ids))
        if pack.indices and not (fits and len(pack.indices) < n_sequences):
            yield pack
            pack = Pack(share)
        pack.add(i, ids)
    yield pack


def _score_pack(
    context: Context, pack: Pack, pairs: Sequence[Pair], workers: RowWorkers, n_rows: int
) -> list[Score]:
    """Score each pair of a pack, step by step through its tokens."""
    # The logits at the context's last token predict the first token of the continuation.
    sources = [
        np.array(path[len(path) - len(pair.targets) :])
        for path, pair in zip(pack.paths, pairs, strict=True)
    ]
    wanted = np.zeros(len(pack.tokens), dtype=np.int8)
    wanted[np.concatenate(sources)] = 1
    # what is asked of each node, once for each sequence that goes on from it
    nodes = np.concatenate(sources)
    targets = np.concatenate([pair.targets for pair in pairs])
    order = np.argsort(nodes, kind="stable")
    log_p, greedy = np.empty(len(nodes)), np.empty(len(nodes), np.bool_)
    tokens = np.array(pack.tokens, dtype=np.int32)
    positions = np.array(pack.positions, dtype=np.int32)
    context.clear()
    for step in _steps(wanted, n_rows):
        logits = context.decode(
            tokens[step], positions[step], wanted[step], pack.members[step.start : step.stop]
        )
        first, last = np.searchsorted(nodes[order], [step.start, step.stop])
        asked = order[first:last]
        if len(asked) == 0:
            continue
        rows = (np.cumsum(wanted[step]) - 1)[nodes[asked] - step.start]
        log_sums, tops = workers.log_sums_and_tops(logits)
        picked = logits[rows, targets[asked]]
        log_p[asked] = picked - log_sums[rows]
        greedy[asked] = picked >= tops[rows]
    scores, at = [], 0
    for pair in pairs:
        of = slice(at, at + len(pair.targets))
        scores.append(Score(float(log_p[of].sum()), bool(greedy[of].all())))
        at = of.stop
    return scores


def _steps(wanted: NDArray[np.int8], n_rows: int) -> Iterator[slice]:
    """Cut the tokens of a pack: at a time at most MAX_STEP, and `n_rows` rows of logits."""
    start = 0
    while start < len(wanted):
        rows = np.cumsum(wanted[start : start + MAX_STEP])
        n = int(np.searchsorted(rows, n_rows, side="right"))
        yield slice(start, start + n)
        start += n
