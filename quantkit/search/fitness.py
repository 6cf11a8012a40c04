"""Fitness: KL divergence to the full-precision model, on the weights that the bytes in the file
stand for.

A candidate's tensors are dequantized from the level files into the torch model where they differ
from what is loaded; its forward pass starts at the first block that differs from the parent's,
whose hidden states are kept at every block boundary. Cutting the pass short changes nothing: the
same operations give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from quantkit.blockwise import BlockwiseModel
from quantkit.rowmap import RowMap
from quantkit.search.allocation import Choices, SearchSpace
from quantkit.search.targets import Targets
from quantkit.search.weights import Weights, precision, widen

CHUNKS = 8  # a sequence's KL is given for each eighth: more samples for paired comparisons
_SEQUENCES_PER_BATCH = {"cpu": 2, "cuda": 8}
_LOGITS_BYTES = 2**30
_STATES_SHARE = 0.5  # of a GPU's free memory that the parent's hidden states may take


class Fitness:
    """Evaluates allocations on a fixed list of sequences, in their order."""

    def __init__(
        self,
        model: BlockwiseModel,
        space: SearchSpace,
        maps: Mapping[str, RowMap],
        levels_folder: Path,
        ids: np.ndarray,
        targets_path: Path,
    ) -> None:
        """`ids` are (n_sequences, n_ctx) token ids. Makes the targets with the model as it is,
        which must be the base.
        """
        widen(model)
        self._model = model
        self._space = space
        self._weights = Weights(model, space, maps, levels_folder)
        device = model.model.device
        self._ids = torch.from_numpy(ids).to(device)
        self.n_batch = min(_SEQUENCES_PER_BATCH[device.type], max(1, len(ids) // 2))
        self._parent: Choices | None = None
        # Of the parent's passes, by first sequence: entry i is what block i reads, the last what
        # the head reads.
        self._states: dict[int, list[torch.Tensor]] = {}
        self._targets = self._make_targets(targets_path)

    @property
    def n_sequences(self) -> int:
        return len(self._ids)

    @property
    def n_ctx(self) -> int:
        return self._ids.shape[1]

    def kl(self, choices: Choices, first: int, last: int) -> np.ndarray:
        """Mean KL of every eighth of the sequences first..last: float64 (last - first, CHUNKS).

        Raises ValueError for a part of a batch: its numbers would differ in the last bits from
        those of the whole.
        """
        self._weights.load(choices)
        parts = [self._batch_kl(choices, *batch) for batch in self._batches(first, last)]
        return np.concatenate(parts)

    def kl_of(self, candidates: Sequence[Choices], first: int, last: int) -> list[np.ndarray]:
        """`kl` of each."""
        return [self.kl(choices, first, last) for choices in candidates]

    def set_parent(self, choices: Choices) -> None:
        """From now on candidates are taken as changes of this allocation."""
        if self._parent is None or bool((self._parent != choices).any()):
            self._parent = choices.copy()
            self._states.clear()

    def _batches(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        if first % self.n_batch or (last % self.n_batch and last < self.n_sequences):
            raise ValueError(f"sequences {first} to {last} are not whole batches")
        for start in range(first, last, self.n_batch):
            yield start, min(start + self.n_batch, last)

    @torch.no_grad()
    def _batch_kl(self, choices: Choices, first: int, last: int) -> np.ndarray:
        ids = self._ids[first:last]
        hidden, calls = self._model.trace(ids)
        start = 0
        is_parent = self._parent is not None and not bool((choices != self._parent).any())
        if first in self._states and not is_parent:
            changed = np.flatnonzero(choices != self._parent).tolist()
            touched = [b for b in (self._weights.block_of[i] for i in changed) if b is not None]
            lowest = min(touched, default=len(self._model.blocks))
            if lowest >= 0:  # embeddings are as the parent's
                start, hidden = lowest, self._states[first][lowest]
        kept = [hidden]
        with precision(self._model):
            for index in range(start, len(self._model.blocks)):
                hidden = self._model.run_block(index, hidden, calls[index])
                kept.append(hidden)
        if is_parent and self._has_room(kept):
            self._states[first] = kept
        return self._score(hidden, first)

    def _score(self, hidden: torch.Tensor, first: int) -> np.ndarray:
        """KL of every part of every sequence from the last hidden states; all logits are never
        held.
        """
        means = []
        for i, states in self._few(hidden):
            kl = self._targets.kl((first + i) * self.n_ctx, self._logits(states))
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
        return self._model.head(states).flatten(0, 1).float()

    def _has_room(self, states: list[torch.Tensor]) -> bool:
        """Whether a GPU has memory for the parent's states; without them nothing but time is
        lost.
        """
        if not states[0].is_cuda:
            return True
        n_bytes = sum(state.nbytes for state in states)
        return n_bytes < _STATES_SHARE * torch.cuda.mem_get_info(states[0].device)[0]

    @torch.no_grad()
    def _make_targets(self, path: Path) -> Targets:
        n_vocab = self._model.model.get_output_embeddings().weight.shape[0]
        targets = Targets(path, self._ids.numel(), n_vocab, self._ids.device)
        for first, last in self._batches(0, self.n_sequences):
            hidden, calls = self._model.trace(self._ids[first:last])
            with precision(self._model):
                for index, call in enumerate(calls):
                    hidden = self._model.run_block(index, hidden, call)
            for i, state in enumerate(hidden):
                targets.put((first + i) * self.n_ctx, self._logits(state[None]))
        return targets
