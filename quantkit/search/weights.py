"""A candidate's weights in the torch model: what the bytes in the level files stand for."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch

from quantkit.blockwise import BlockwiseModel
from quantkit.kquants import native
from quantkit.kquants.formats import FORMATS
from quantkit.rowmap import RowMap
from quantkit.search.allocation import Choices, SearchSpace
from quantkit.tensors import Candidate

_DEVICE_SHARE = 0.5  # of a GPU's free memory that packed levels may take
OUTSIDE = -1  # the block number of what lies outside of blocks: embeddings and head


class Weights:
    """Puts allocations into a model, dequantizing only what differs from what is there.

    Tensors without a row map stay as they are in the model.
    """

    def __init__(
        self, model: BlockwiseModel, space: SearchSpace, maps: Mapping[str, RowMap], folder: Path
    ) -> None:
        self._space = space
        self._maps = [maps.get(name) for name in space.tensors]
        self._folder = folder
        self._parameters = dict(model.model.named_parameters())
        self._prefix = model.blocks_name + "."
        self._loaded: Choices | None = None
        self._files: dict[str, np.memmap] = {}
        self._resident: dict[tuple[str, int], torch.Tensor] = {}
        device = model.model.device
        self._room = 0  # bytes of the GPU's memory that packed rows may still take
        if device.type == "cuda":
            self._room = int(_DEVICE_SHARE * torch.cuda.mem_get_info(device)[0])
        self.block_of = [self._block_of(map_) for map_ in self._maps]

    def _block_of(self, map_: RowMap | None) -> int | None:
        """The block that a tensor belongs to, OUTSIDE, or None for what is not in the model."""
        if map_ is None:
            return None
        if map_.parameter.startswith(self._prefix):
            return int(map_.parameter.removeprefix(self._prefix).split(".", 1)[0])
        return OUTSIDE

    def load(self, choices: Choices) -> None:
        """Put a candidate's weights into the model."""
        for i, choice in enumerate(choices.tolist()):
            map_ = self._maps[i]
            if map_ is None or (self._loaded is not None and self._loaded[i] == choice):
                continue
            parameter = self._parameters[map_.parameter]
            values = self.values(i, choice).to(parameter.device, parameter.dtype)
            map_.scatter(values, parameter.data)
        self._loaded = choices.copy()

    def parameter(self, tensor: int) -> torch.nn.Parameter:
        """The model's weight that holds a tensor's rows."""
        map_ = self._maps[tensor]
        assert map_ is not None
        return self._parameters[map_.parameter]

    def rows(self, tensor: int, like_parameter: torch.Tensor) -> torch.Tensor:
        """A tensor's rows (n_rows, n_columns) of something shaped like its parameter."""
        map_ = self._maps[tensor]
        assert map_ is not None
        return map_.gather(like_parameter)

    def values(self, tensor: int, choice: int) -> torch.Tensor:
        """What the bytes of a choice stand for: float32 (n_rows, n_columns), on the GPU where
        that is the model's device and can read the type, else on the CPU.
        """
        candidate = self._space.candidates[tensor][choice]
        mapped = self._files.get(candidate.file)
        if mapped is None:
            path = self._folder / candidate.file
            mapped = self._files[candidate.file] = np.memmap(path, np.uint8, "r")
        map_ = self._maps[tensor]
        assert map_ is not None
        n_columns = map_.n_columns(self._parameters[map_.parameter])
        packed = mapped[candidate.offset : candidate.offset + candidate.n_bytes]
        rows = packed.reshape(-1, candidate.key.qtype.row_bytes(n_columns))
        form = FORMATS.get(candidate.key.qtype)
        device = self._parameters[map_.parameter].device
        if form is not None and device.type == "cuda":
            return form.values(self._on_device(candidate, rows, device))
        return torch.from_numpy(native.dequantize(rows, candidate.key.qtype))

    def _on_device(
        self, candidate: Candidate, rows: native.Bytes, device: torch.device
    ) -> torch.Tensor:
        """Packed rows on the GPU; they stay there as long as there is room."""
        place = candidate.file, candidate.offset
        found = self._resident.get(place)
        if found is None:
            found = torch.from_numpy(np.array(rows)).to(device)  # torch wants it writable
            if found.numel() <= self._room:
                self._room -= found.numel()
                self._resident[place] = found
        return found


def widen(model: BlockwiseModel) -> None:
    """Keep the model in float32, in place, but for the matrices inside blocks.

    The rounding of a 16-bit residual stream or of 16-bit logits is as large as what candidates
    differ by; products inside blocks may be in 16 bits (`precision`).
    """
    prefix = model.blocks_name + "."
    for name, parameter in model.model.named_parameters():
        if not name.startswith(prefix) or parameter.dim() < 2:
            parameter.data = parameter.data.float()


def precision(model: BlockwiseModel) -> AbstractContextManager[object]:
    """The context in which blocks are run: products in the type of their matrices."""
    matrices = (p for block in model.blocks for p in block.parameters() if p.dim() >= 2)
    dtype = next(matrices).dtype
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(model.model.device.type, dtype)
