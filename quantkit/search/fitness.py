"""Fitness: KL divergence to the full-precision model, on the weights that the bytes in the file
stand for.

A candidate's tensors are dequantized from the level files into the torch model where they differ
from what is loaded; its forward pass starts at the first block that differs from the parent's,
whose hidden states are kept at every block boundary. Cutting the pass short changes nothing: the
same operations give the same numbers. Of a model that is streamed, each block is read once for as
many sequences as there is room for.

Where there are several ranks each has a `Fitness` of its own (`quantkit.search.distributed`); the
base's distributions are made together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from quantkit.machine.memory import SpillFile, free_memory
from quantkit.model import precision
from quantkit.model.blockwise import BlockCall, BlockwiseModel
from quantkit.model.row_maps import RowMap
from quantkit.ranks.group import ALONE, Ranks
from quantkit.search.allocation import Choices, SearchSpace
from quantkit.search.targets import Targets
from quantkit.search.weights import Weights

CHUNKS = 8  # a sequence's KL is given for each eighth: more samples for paired comparisons
_SEQUENCES_PER_BATCH = {"cpu": 2, "cuda": 8}
_LOGITS_BYTES, _LOGITS_AT_ONCE = 2**30, 3
STATES_SHARE = 0.5  # of the free memory that the parent's hidden states may take
_SPAN_SHARE = 0.1  # of the free memory: hidden states that pass a streamed block together


@dataclass
class _Pass:
    """A batch on its way: what block `at` reads next."""

    first: int
    at: int
    hidden: torch.Tensor
    calls: Sequence[BlockCall]

    def key(self, block: int) -> tuple[int, int, int]:
        """Return the key of what the block reads; a part of a batch has another."""
        return self.first, len(self.hidden), block


class Fitness:
    """Evaluates allocations on a fixed list of sequences, in their order."""

    def __init__(
        self,
        model: BlockwiseModel,
        space: SearchSpace,
        maps: Mapping[str, RowMap],
        levels: Mapping[str, Path],
        ids: np.ndarray,
        targets_path: Path,
        ranks: Ranks = ALONE,
    ) -> None:
        """`levels` are the files that the space's candidates lie in, by name; `ids` are token ids
        (n_sequences, n_ctx). Makes the targets with the model as it is, which must be the base: all
        `ranks` at once.
        """
        self._ranks = ranks
        self._model = model
        self._space = space
        self._weights = Weights(model, space, maps, levels)
        device = model.device
        self._ids = torch.from_numpy(ids).to(device)
        self.n_sequences, self.n_ctx = ids.shape
        self.n_batch = min(_SEQUENCES_PER_BATCH[device.type], max(1, len(ids) // 2))
        # What sequences are shared out in. A CPU's batches stay whole, so that numbers are the same
        # on any number of ranks; a GPU's are large, and few.
        self.n_unit = self.n_batch if device.type == "cpu" else 1
        self._parent: Choices | None = None
        self._targets = self._make_targets(targets_path)
        taken = self._weights.room + self._weights.decoded_room
        if device.type == "cuda":
            taken += self._weights.scratch + _LOGITS_AT_ONCE * _LOGITS_BYTES
        room = STATES_SHARE * max(0, free_memory(str(self._ids.device)) - taken)
        # Of the parent's passes, by batch and block: what the block reads, and after the last block
        # what the head reads.
        self._states = SpillFile(targets_path.with_name(f"states-{targets_path.name}"), int(room))

    @property
    def is_streamed(self) -> bool:
        """Return whether the model's blocks are read one by one."""
        return self._model.is_streamed

    @property
    def n_unmapped(self) -> int:
        """Return how many tensors are not in the model: no KL knows of them."""
        return self._weights.block_of.count(None)

    def kl(self, choices: Choices, first: int, last: int) -> np.ndarray:
        """Return the mean KL of every eighth of the sequences first..last: float64 (last - first,
        CHUNKS).

        Raises ValueError for a part of a unit: its numbers would differ in the last bits from those
        of the whole.
        """
        self._weights.load(choices)
        parts = [
            self._score(done)
            for span in self._spans(first, last)
            for done in self._run([self._begin(choices, *batch) for batch in span], choices)
        ]
        return np.concatenate(parts)

    def kl_of(self, candidates: Sequence[Choices], first: int, last: int) -> list[np.ndarray]:
        """Return `kl` of each."""
        return [self.kl(choices, first, last) for choices in candidates]

    def set_parent(self, choices: Choices) -> None:
        """Take candidates as changes of this allocation from now on."""
        if self._parent is None or bool((self._parent != choices).any()):
            self._parent = choices.copy()
            self._states.clear()

    def _batches(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        if first % self.n_unit or (last % self.n_unit and last < self.n_sequences):
            raise ValueError(f"sequences {first} to {last} are not whole batches")
        for start in range(first, last, self.n_batch):
            yield start, min(start + self.n_batch, last)

    def _spans(self, first: int, last: int) -> Iterator[list[tuple[int, int]]]:
        """Batches that pass the blocks together: one by one, but as many as there is room for where
        every pass has to read the blocks.
        """
        batches = list(self._batches(first, last))
        n = 1
        if self._model.is_streamed:
            n_embd = self._model.model.get_output_embeddings().weight.shape[1]
            of_one = 4 * n_embd * self.n_ctx * self.n_batch
            n = max(1, int(_SPAN_SHARE * free_memory(str(self._ids.device))) // of_one)
        for start in range(0, len(batches), n):
            yield batches[start : start + n]

    def _begin(self, choices: Choices | None, first: int, last: int) -> _Pass:
        """A batch before the first block that the candidate does not share with the parent."""
        hidden, calls = precision.begin(self._model, self._ids[first:last])
        # What the blocks before left for later ones is not kept.
        start = 0 if any(call.shared for call in calls) else self._shared(choices)
        begun = _Pass(first, 0, hidden, calls)
        if start and begun.key(start) in self._states:
            kept = self._states.get(begun.key(start)).to(hidden.device)
            return _Pass(first, start, kept, calls)
        return begun

    def _shared(self, choices: Choices | None) -> int:
        """How many of the first blocks are the parent's, embeddings included."""
        if choices is None or self._parent is None or self._is_parent(choices):
            return 0
        changed = np.flatnonzero(choices != self._parent).tolist()
        touched = [b for b in (self._weights.block_of[i] for i in changed) if b is not None]
        return max(0, min(touched, default=len(self._model.blocks)))

    def _is_parent(self, choices: Choices | None) -> bool:
        return (
            choices is not None
            and self._parent is not None
            and not bool((choices != self._parent).any())
        )

    @torch.no_grad()
    def _run(self, span: Sequence[_Pass], choices: Choices | None = None) -> Sequence[_Pass]:
        """All blocks over all batches of a span, a block at a time; keeps the parent's states."""
        is_parent = self._is_parent(choices)
        for index in range(min(part.at for part in span), len(self._model.blocks)):
            with self._model.holding(index), precision.products(self._model):
                for part in span:
                    if part.at > index:
                        continue
                    if is_parent:
                        self._states.put(part.key(index), part.hidden)
                    part.hidden = self._model.run_block(index, part.hidden, part.calls[index])
                    part.at = index + 1
        if is_parent:
            for part in span:
                self._states.put(part.key(part.at), part.hidden)
        return span

    @torch.no_grad()
    def _score(self, done: _Pass) -> np.ndarray:
        """KL of every part of every sequence from the last hidden states; all logits are never
        held.
        """
        means = []
        for i, states in self._few(done.hidden):
            kl = self._targets.kl((done.first + i) * self.n_ctx, self._logits(states))
            parts = kl.view(len(states), -1).tensor_split(CHUNKS, 1)
            means.append(torch.stack([part.mean(1) for part in parts], 1))
        return torch.cat(means).cpu().numpy()

    def _few(self, hidden: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Hidden states, by the number of their first sequence, of so many sequences that their
        logits take no more than a gigabyte; on a CPU one by one.
        """
        n_bytes = 4 * self.n_ctx * self._targets.n_vocab
        n = max(1, _LOGITS_BYTES // n_bytes) if hidden.is_cuda else 1
        yield from ((i, hidden[i : i + n]) for i in range(0, len(hidden), n))

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        """float32 (n positions, n_vocab) of hidden states (n sequences, n_ctx, n_embd)."""
        return precision.logits(self._model, states).flatten(0, 1)

    @torch.no_grad()
    def _make_targets(self, path: Path) -> Targets:
        n_vocab = self._model.model.get_output_embeddings().weight.shape[0]
        targets = Targets(path, self._ids.numel(), n_vocab, self._ids.device)
        own = part_of(self._ranks.rank, self._ranks.size, 0, self.n_sequences, self.n_unit)
        for span in self._spans(*own):
            for done in self._run([self._begin(None, *batch) for batch in span]):
                for i, state in enumerate(done.hidden):
                    targets.put((done.first + i) * self.n_ctx, self._logits(state[None]))
        targets.complete(self._ranks)
        return targets


def part_of(rank: int, size: int, first: int, last: int, n_unit: int) -> tuple[int, int]:
    """Return the first and the last of the sequences first..last that a rank of `size` takes: whole
    units, side by side, as many as the others' or one more.
    """
    n_units = -(-(last - first) // n_unit)
    start, end = (first + n_unit * (n_units * i // size) for i in (rank, rank + 1))
    return min(start, last), min(end, last)
