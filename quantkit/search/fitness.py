"""Fitness: KL divergence to the full-precision model, on the weights that the bytes in the file
stand for.

A candidate's tensors are dequantized from the level files into the torch model where they differ
from what is loaded; its forward pass starts at the first block that differs from the parent's,
whose hidden states are kept at every block boundary. Cutting the pass short changes nothing: the
same operations give the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from quantkit.blockwise import BlockwiseModel
from quantkit.kquants import native
from quantkit.rowmap import RowMap
from quantkit.search.allocation import Choices, SearchSpace
from quantkit.search.targets import Targets

_SEQUENCES_PER_BATCH = 4


@dataclass
class _ParentStates:
    """Hidden states of the parent's pass over one batch: entry i is what block i reads, the last
    what the head reads.
    """

    hidden: list[torch.Tensor]


class Fitness:
    """Evaluates allocations on a fixed list of sequences, in their order.

    `n_tokens` counts what was evaluated: tokens that went through the model, whole passes and
    partial ones alike.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        space: SearchSpace,
        maps: Mapping[str, RowMap],
        levels_folder: Path,
        ids: np.ndarray,
        targets_path: Path,
        n_fixed: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """`ids` are (n_sequences, n_ctx) token ids. Makes the targets with the model as it is,
        which must be the base.
        """
        self._model = model
        self._space = space
        self._maps = maps
        self._folder = levels_folder
        self._ids = torch.from_numpy(ids).to(model.model.device)
        self._parameters = dict(model.model.named_parameters())
        self._block_of = [self._first_block(name) for name in space.tensors]
        self._loaded: Choices | None = None
        self._parent: Choices | None = None
        self._states: dict[int, _ParentStates] = {}
        self._files: dict[str, np.memmap] = {}
        self.n_tokens = 0
        self._targets = self._make_targets(targets_path)

    @property
    def n_sequences(self) -> int:
        return len(self._ids)

    @property
    def n_ctx(self) -> int:
        return self._ids.shape[1]

    def kl(self, choices: Choices, first: int, last: int) -> np.ndarray:
        """Mean KL of every sequence first..last, float64 (last - first,). Whole batches are
        evaluated.
        """
        self._load(choices)
        parts = []
        for start in range(first, last, _SEQUENCES_PER_BATCH):
            parts.append(self._batch_kl(choices, start, min(start + _SEQUENCES_PER_BATCH, last)))
        return np.concatenate(parts)

    def set_parent(self, choices: Choices) -> None:
        """From now on candidates are taken as changes of this allocation."""
        if self._parent is None or bool((self._parent != choices).any()):
            self._parent = choices.copy()
            self._states.clear()

    def _first_block(self, tensor: str) -> int:
        """The block whose pass is the first to see a tensor: -1 for embeddings, n for the head
        alone.
        """
        parameter = self._maps[tensor].parameter
        prefix = self._model.blocks_name + "."
        if parameter.startswith(prefix):
            return int(parameter.removeprefix(prefix).split(".", 1)[0])
        return -1

    def _load(self, choices: Choices) -> None:
        """Put a candidate's weights into the model."""
        for i in range(len(choices)):
            if self._loaded is None or self._loaded[i] != choices[i]:
                self._put(i, int(choices[i]))
        self._loaded = choices.copy()

    def _put(self, tensor: int, choice: int) -> None:
        candidate = self._space.candidates[tensor][choice]
        mapped = self._files.get(candidate.file)
        if mapped is None:
            mapped = self._files[candidate.file] = np.memmap(
                self._folder / candidate.file, np.uint8, "r"
            )
        map_ = self._maps[candidate.key.tensor]
        parameter = self._parameters[map_.parameter]
        n_columns = parameter.shape[0] if map_.transposed else parameter.shape[-1]
        packed = mapped[candidate.offset : candidate.offset + candidate.n_bytes]
        rows = packed.reshape(-1, candidate.key.qtype.row_bytes(n_columns))
        values = torch.from_numpy(native.dequantize(rows, candidate.key.qtype))
        map_.scatter(values.to(parameter.device, parameter.dtype), parameter.data)

    @torch.no_grad()
    def _batch_kl(self, choices: Choices, first: int, last: int) -> np.ndarray:
        ids = self._ids[first:last]
        hidden, calls = self._model.trace(ids)
        start = 0
        states = self._states.get(first)
        is_parent = self._parent is not None and not bool((choices != self._parent).any())
        if states is not None and not is_parent:
            changed = np.flatnonzero(choices != self._parent)
            start = max(0, min(self._block_of[i] for i in changed))
            if min(self._block_of[i] for i in changed) >= 0:
                hidden = states.hidden[start]
        kept = [hidden]
        for index in range(start, len(self._model.blocks)):
            hidden = self._model.run_block(index, hidden, calls[index])
            kept.append(hidden)
        if is_parent:
            self._states[first] = _ParentStates(kept)
        self.n_tokens += ids.numel()
        return self._score(hidden, first)

    def _score(self, hidden: torch.Tensor, first: int) -> np.ndarray:
        """KL of every sequence from the last hidden states, one sequence at a time: all logits are
        never held.
        """
        means = []
        for i, state in enumerate(hidden):
            logits = self._model.head(state[None])[0]
            kl = self._targets.kl((first + i) * self.n_ctx, logits)
            means.append(float(kl.mean()))
        return np.array(means)

    @torch.no_grad()
    def _make_targets(self, path: Path) -> Targets:
        n_vocab = self._model.model.get_output_embeddings().weight.shape[0]
        n_rows = self._ids.numel()
        targets = Targets(path, n_rows, n_vocab, write=True)
        for first in range(0, self.n_sequences, _SEQUENCES_PER_BATCH):
            ids = self._ids[first : first + _SEQUENCES_PER_BATCH]
            hidden, calls = self._model.trace(ids)
            for index, call in enumerate(calls):
                hidden = self._model.run_block(index, hidden, call)
            for i, state in enumerate(hidden):
                targets.put((first + i) * self.n_ctx, self._model.head(state[None])[0])
        targets.flush()
        return targets
