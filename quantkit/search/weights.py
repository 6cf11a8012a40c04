"""Put a candidate's weights into the torch model, as the bytes in the level files decode."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from quantkit.ggml import decode, native
from quantkit.machine.memory import free_memory
from quantkit.model import precision
from quantkit.model.blockwise import BlockwiseModel
from quantkit.model.row_maps import RowMap
from quantkit.search.allocation import Choices, SearchSpace
from quantkit.tensors import Candidate

_DEVICE_SHARE = 0.4  # of a GPU's free memory that packed levels may take; what they leave of it
_DECODED_SHARE = 0.25  # and what was decoded of them lately
_BASE = -1  # in the place of a choice: the base's own weight
OUTSIDE = -1  # the block number of what lies outside of blocks: embeddings and head


class Weights:
    """Puts allocations into a model, dequantizing only what differs from what is there: at once
    where weights are in memory, into a streamed block whenever it is read.

    Tensors without a row map stay as they are in the model.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        space: SearchSpace,
        maps: Mapping[str, RowMap],
        levels: Mapping[str, Path],
    ) -> None:
        """`levels` are the files that candidates lie in, by the names that these give."""
        self._model = model
        self._space = space
        self._maps = [maps.get(name) for name in space.tensors]
        self._levels = levels
        self._wanted: Choices | None = None  # None: the base's own weights
        self._there = np.full(len(space.tensors), _BASE)
        self._resident: dict[tuple[str, int], torch.Tensor] = {}
        self._decoded: OrderedDict[tuple[int, int], torch.Tensor] = OrderedDict()
        device = model.device
        precision.prepare(model)
        # Bytes of the GPU's memory that packed rows may still take, and decoded ones.
        self.room = self.decoded_room = self.scratch = 0
        if device.type == "cuda":
            self.scratch = self._decoding_bytes() + self._block_bytes()
            free = max(0, free_memory(str(device)) - self.scratch)
            packed = sum(c.n_bytes for own in space.candidates for c in own)
            self.room = min(packed, int(_DEVICE_SHARE * free))
            self.decoded_room = int((_DEVICE_SHARE + _DECODED_SHARE) * free) - self.room
        # The block that a tensor belongs to, OUTSIDE, or None for what is not in the model.
        self.block_of = [self._block_of(map_) for map_ in self._maps]
        model.prepare_with(self._prepare)

    def _block_bytes(self) -> int:
        """What a streamed block takes while it runs: none is there when memory is counted."""
        if not self._model.is_streamed:
            return 0
        return max(sum(p.nbytes for p in b.parameters()) for b in self._model.blocks)

    def _decoding_bytes(self) -> int:
        """What decoding the largest tensor takes for a moment."""
        names = [map_.parameter for map_ in self._maps if map_ is not None]
        counts = (self._model.model.get_parameter(name).numel() for name in names)
        return 4 * max(counts, default=0) + 16 * decode.AT_ONCE

    def _block_of(self, map_: RowMap | None) -> int | None:
        if map_ is None:
            return None
        block = self._model.block_of(map_.parameter)
        return OUTSIDE if block is None else block

    def load(self, choices: Choices) -> None:
        """Put a candidate's weights into the model."""
        self._wanted = choices.copy()
        self._put([i for i, block in enumerate(self.block_of) if self._is_held(block)])

    def _is_held(self, block: int | None) -> bool:
        return block is not None and (block == OUTSIDE or self._model.is_held(block))

    def _prepare(self, block: int) -> None:
        """Make a block what it is to be: its weights have just come from the checkpoint."""
        precision.prepare_block(self._model.blocks[block])
        own = [i for i, of_tensor in enumerate(self.block_of) if of_tensor == block]
        self._there[own] = _BASE
        self._put(own)

    def _put(self, tensors: Sequence[int]) -> None:
        if self._wanted is None:
            return
        for i in tensors:
            map_, choice = self._maps[i], int(self._wanted[i])
            if map_ is not None and self._there[i] != choice:
                parameter = self._model.model.get_parameter(map_.parameter)
                map_.scatter(self._decode(i, choice, parameter), parameter.data)
                self._there[i] = choice

    def _decode(self, tensor: int, choice: int, parameter: torch.Tensor) -> torch.Tensor:
        """`values` on the parameter's device and in its type. A GPU keeps those used last: children
        share most of their moves, and a copy is a hundred times as fast.
        """
        key = tensor, choice
        found = self._decoded.pop(key, None)
        if found is None:
            found = self.values(tensor, choice).to(parameter.device, parameter.dtype)
            self.decoded_room -= found.nbytes
        self._decoded[key] = found
        while self.decoded_room < 0:
            self.decoded_room += self._decoded.popitem(last=False)[1].nbytes
        return found

    def values(self, tensor: int, choice: int) -> torch.Tensor:
        """Return what the bytes of a choice stand for: float32 (n_rows, n_columns), on the GPU
        where that is the model's device and can read the type, else on the CPU.
        """
        candidate = self._space.candidates[tensor][choice]
        map_ = self._maps[tensor]
        assert map_ is not None
        n_columns = map_.n_columns(self._model.model.get_parameter(map_.parameter))
        # Mapped anew every time: pages of the file count as ours for as long as they are mapped.
        path, n_bytes = self._levels[candidate.file], candidate.n_bytes
        packed = np.memmap(path, np.uint8, "r", candidate.offset, (n_bytes,))
        rows = packed.reshape(-1, candidate.qtype.row_bytes(n_columns))
        form = decode.READABLE.get(candidate.qtype)
        device = self._model.device
        if form is not None and device.type == "cuda":
            return decode.decoded(form, self._on_device(candidate, rows, device), n_columns)
        return torch.from_numpy(native.dequantize(rows, candidate.qtype))

    def _on_device(
        self, candidate: Candidate, rows: native.Bytes, device: torch.device
    ) -> torch.Tensor:
        """Packed rows on the GPU; they stay there as long as there is room."""
        place = candidate.file, candidate.offset
        found = self._resident.get(place)
        if found is None:
            found = torch.from_numpy(np.array(rows)).to(device)  # torch wants it writable
            if found.numel() <= self.room:
                self.room -= found.numel()
                self._resident[place] = found
        return found
