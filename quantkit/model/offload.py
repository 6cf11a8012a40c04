"""Hidden states on their way through the blocks of a model, a batch each, with what blocks left for
later blocks.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

import torch

from quantkit.errors import QuantkitError
from quantkit.machine.memory import SpillFile
from quantkit.model.blockwise import SharedKV


class States:
    """By key: a batch's hidden state (batch, n_tokens, n_embd) and what blocks left beside it. In
    memory while there is room, then in a file.
    """

    def __init__(self, path: Path, room: int, device: str | torch.device) -> None:
        """`room` is how many bytes may stay in the memory of `device`."""
        self._spill = SpillFile(path, room)
        self._device = device
        self._n_shared: dict[Hashable, dict[str, int]] = {}

    def put(self, key: Hashable, hidden: torch.Tensor, shared_kv: SharedKV) -> None:
        """Keep a batch in the place of what had its key. Raises QuantkitError when there is no disk
        left for it.
        """
        self._put((key,), hidden)
        for name, tensors in shared_kv.items():
            for i, tensor in enumerate(tensors):
                self._put((key, name, i), tensor)
        self._n_shared[key] = {name: len(tensors) for name, tensors in shared_kv.items()}

    def get(self, key: Hashable, device: str | torch.device) -> tuple[torch.Tensor, SharedKV]:
        """Return a batch, on `device`."""
        shared_kv = {
            name: tuple(self._spill.get((key, name, i)).to(device) for i in range(n))
            for name, n in self._n_shared[key].items()
        }
        return self._spill.get((key,)).to(device), shared_kv

    def clear(self) -> None:
        """Forget everything."""
        self._spill.clear()
        self._n_shared.clear()

    def _put(self, key: Hashable, tensor: torch.Tensor) -> None:
        if not self._spill.put(key, tensor.to(self._device)):
            raise QuantkitError(
                "There is no disk space left for hidden states.",
                "Free some, or use a smaller --profile.",
            )
