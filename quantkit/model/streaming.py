"""Run models that are larger than memory, by reading one block at a time from safetensors.

The model itself is on the device `meta`, and knows its names and shapes alone. transformers' own
loader brings the weights of a block when it is to run, renamed and stacked as it would for the
whole model, and they are dropped afterwards. What lies outside of blocks stays. On a CPU, weights
that keep their type are mapped from the files, not copied, here as in a model that is loaded whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from quantkit.checkpoint.safetensors import read_header
from quantkit.checkpoint.weight_files import few, in_folder, tensors_of
from quantkit.errors import QuantkitError
from quantkit.machine.memory import free_memory
from quantkit.model.blockwise import (
    BlockwiseModel,
    check_loaded,
    find_blocks,
    from_checkpoint,
    load_model,
    refusals_told,
)

WHOLE_SHARE = 0.5  # of the free memory that a model may take as a whole; activations need theirs


def open_model(
    folder: Path, dtype: torch.dtype | str = "auto", device: str = "cpu", n_beside: int = 0
) -> BlockwiseModel:
    """Open the checkpoint in `folder` for inference block by block: whole in memory if it takes no
    more than half of what is free and leaves `n_beside` bytes of it, else streamed. The results are
    the same.

    Raises QuantkitError when transformers cannot load it.
    """
    whole, free = _whole_bytes(folder, dtype), free_memory(device)
    if whole <= WHOLE_SHARE * free and whole + n_beside <= free:
        return BlockwiseModel(load_model(folder, dtype, device))
    weights = StreamedWeights(folder, dtype, device)
    return BlockwiseModel(weights.model, weights)


def _whole_bytes(folder: Path, dtype: torch.dtype | str) -> int:
    """What the weights take as a whole."""
    if isinstance(dtype, str):  # as they are stored
        headers = [read_header(path) for path in in_folder(folder)]
        return sum(header.n_file_bytes - header.n_bytes for header in headers)
    return sum(dtype.itemsize * tensor.n_elements for _, tensor in tensors_of(folder).values())


class StreamedWeights:
    """Brings and drops the weights of `model`, whose blocks are on the device `meta`."""

    def __init__(self, folder: Path, dtype: torch.dtype | str, device: str) -> None:
        """Brings what lies outside of blocks. Raises QuantkitError for what cannot be loaded."""
        self._device = device
        self.model = from_checkpoint(folder, dtype, device_map={"": "meta"}).eval()
        with refusals_told():
            self._prefix, blocks = find_blocks(self.model)
            self._of_block = [list(_slots(block)) for block in blocks]
            self._parts = self._split(folder)
            _make_buffers(self.model, device)
            self.bring(None)
            # Now that there are values: a head that is another than the table stays what it is.
            self.model.tie_weights(missing_keys=self._lacking(), recompute_mapping=False)
        check_loaded(self._lacking())

    def _lacking(self) -> set[str]:
        """What is outside of blocks and has no values."""
        own = {id(tensor) for slots in self._of_block for _, _, tensor in slots}
        state = self.model.state_dict(keep_vars=True)
        return {name for name, tensor in state.items() if tensor.is_meta and id(tensor) not in own}

    def bring(self, block: int | None) -> None:
        """Load the weights of a block, or those outside of blocks."""
        dtype = self.model.dtype
        with ExitStack() as stack:
            parts = self._parts.get(block, {})
            files = {path: stack.enter_context(safe_open(path, "pt")) for path in parts}
            slices = {n: files[path].get_slice(n) for path, names in parts.items() for n in names}
            found, _ = convert_and_load_state_dict_in_model(
                self.model,
                slices,
                LoadStateDictConfig(
                    device_map={"": self._device},
                    dtype=dtype,
                    weight_mapping=self._mapping,
                ),
            )
        if found.conversion_errors or found.mismatched_keys:
            wrong = [*found.conversion_errors, *(name for name, *_ in found.mismatched_keys)]
            raise QuantkitError(
                f"transformers cannot load {few(wrong)}.", "The checkpoint is broken."
            )
        modules = self.model.modules() if block is None else {m for m, *_ in self._of_block[block]}
        for module in modules:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)

    def drop(self, block: int) -> None:
        """Forget the weights of a block."""
        for module, name, tensor in self._of_block[block]:
            setattr(module, name, tensor)

    @property
    def _mapping(self) -> list[Any]:
        """How transformers renames and stacks this checkpoint's tensors."""
        mapping: Any = self.model._weight_conversions
        return list(mapping)

    def _split(self, folder: Path) -> dict[int | None, dict[Path, list[str]]]:
        """Names of the checkpoint's tensors by block (None: outside) and file."""
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        known = self.model.state_dict()
        parts: dict[int | None, dict[Path, list[str]]] = {}
        for name, (path, _) in tensors_of(folder).items():
            target, _ = rename_source_key(
                name, renamings, converters, self.model.base_model_prefix, known
            )
            inside = target.startswith(self._prefix + ".")
            number = target.removeprefix(self._prefix + ".").split(".", 1)[0]
            block = int(number) if inside and number.isdigit() else None
            parts.setdefault(block, {}).setdefault(path, []).append(name)
        return parts


def _slots(block: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """Module, attribute and meta tensor of all that a checkpoint holds of a block."""
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield module, name, parameter
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield module, name, buffer


def _make_buffers(model: PreTrainedModel, device: str) -> None:
    """Compute what no checkpoint holds (rotary tables), as transformers does after loading."""
    for module, name, buffer in list(_computed(model)):
        module._buffers[name] = torch.empty_like(buffer, device="cpu")
        module._is_hf_initialized = False  # type: ignore[assignment]
    model.initialize_weights()
    for module, name, buffer in list(_computed(model)):
        module._buffers[name] = buffer.to(device)


def _computed(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None:
                yield module, name, buffer
