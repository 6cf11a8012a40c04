"""Decide how much memory a run can take, and spill tensors that do not fit to a file.

QUANTKIT_MEMORY (`12GiB`) is the most that a run may count on, of the machine's memory or of a
GPU's; without it that is what is free (`quantkit.machine.room`). Processes that torchrun started
together on a machine have equal shares of its memory. No result depends on it but
whether files are tuned, and the run says when they are not.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.machine import room
from quantkit.sizes import parse_bytes

_DISK_LEFT = 2_000_000_000  # bytes that a spill file leaves to others


def free_memory(device: str = "cpu") -> int:
    """Return the bytes that a run may still take on a device: what is free there, and no more than
    QUANTKIT_MEMORY; on a GPU less what PyTorch's tensors have of that already.
    """
    said = os.environ.get("QUANTKIT_MEMORY")
    limit = None if said is None else parse_bytes(said)
    if device == "cpu":
        free, taken = room.free().n_bytes, 0
    else:
        taken = torch.cuda.memory_allocated(device)
        unused = torch.cuda.memory_reserved(device) - taken
        free = torch.cuda.mem_get_info(device)[0] + unused
    free = free if limit is None else max(0, min(free, limit - taken))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device == "cpu" else free


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the file."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype
    n_bytes: int


class SpillFile:
    """Tensors by key: where they are while there is room, and after that in a file, which is
    deleted with the spill file.

    Read and written as a file, not mapped: what lies there takes no memory of the process.
    """

    def __init__(self, path: Path, room: int) -> None:
        """`room` is how many bytes may stay in memory."""
        self._path = path
        self._room = room
        self._held: dict[Hashable, torch.Tensor] = {}
        self._places: dict[Hashable, _Place] = {}
        self._end = 0

    def put(self, key: Hashable, tensor: torch.Tensor) -> bool:
        """Keep a tensor in the place of what had its key. False when there is no disk for it,
        either: then it is not there.
        """
        before = self._held.pop(key, None)
        if before is not None:
            self._room += before.nbytes
        if tensor.nbytes <= self._room:
            self._room -= tensor.nbytes
            self._held[key] = tensor
            self._places.pop(key, None)
            return True
        place = self._places.get(key)
        if place is None or place.n_bytes != tensor.nbytes:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self._path.parent).free < tensor.nbytes + _DISK_LEFT:
                self._places.pop(key, None)
                return False
            place = _Place(self._end, tensor.shape, tensor.dtype, tensor.nbytes)
            self._end += tensor.nbytes
        self._places[key] = _Place(place.offset, tensor.shape, tensor.dtype, tensor.nbytes)
        with self._path.open("r+b" if self._path.exists() else "w+b") as file:
            file.seek(place.offset)
            file.write(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().data)
        return True

    def get(self, key: Hashable) -> torch.Tensor:
        """Return the tensor, on the device where it was or, from the file, on the CPU."""
        found = self._held.get(key)
        if found is not None:
            return found
        place = self._places[key]
        data = torch.empty(place.n_bytes, dtype=torch.uint8)
        with self._path.open("rb") as file:
            file.seek(place.offset)
            file.readinto(data.numpy().data)
        return data.view(place.dtype).view(place.shape)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held or key in self._places

    def clear(self) -> None:
        """Forget everything."""
        self._room += sum(tensor.nbytes for tensor in self._held.values())
        self._held.clear()
        self._places.clear()
        self._end = 0
        self._path.unlink(missing_ok=True)

    def __del__(self) -> None:
        self._path.unlink(missing_ok=True)
