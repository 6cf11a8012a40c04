"""Send bytes, JSON and arrays between the processes of a run, over a gloo group. Never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

_PIECE = 1 << 26  # bytes of a message


class Wire:
    """A channel of its own. All calls raise RuntimeError where a process at the other end is gone.

    A process's calls must come in the order in which the others expect them; a thread may wait in
    `receive` while another sends.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def send(self, data: bytes, to: int) -> None:
        """Send bytes, their number first."""
        self._send(np.array([len(data)], np.int64), to)
        self._send(np.frombuffer(data, np.uint8), to)

    def receive(self, source: int) -> bytes:
        """Wait for the bytes that `send` sends."""
        size = np.zeros(1, np.int64)
        self._receive(size, source)
        data = np.empty(int(size[0]), np.uint8)
        self._receive(data, source)
        return data.tobytes()

    def send_json(self, value: object, to: int) -> None:
        self.send(json.dumps(value).encode(), to)

    def receive_json(self, source: int) -> Any:
        return json.loads(self.receive(source))

    def broadcast_json(self, value: object) -> Any:
        """Return rank 0's value; what others give is not looked at."""
        import torch
        from torch import distributed

        data = bytearray(json.dumps(value).encode())
        size = torch.tensor([len(data)])
        distributed.broadcast(size, 0, group=self._group)
        if distributed.get_rank():
            data = bytearray(int(size))
        distributed.broadcast(torch.frombuffer(data, dtype=torch.uint8), 0, group=self._group)
        return json.loads(data)

    def send_arrays(self, arrays: Mapping[str, NDArray[Any]], to: int) -> None:
        """Send names, types and shapes as JSON, then the raw bytes. Raise ValueError for arrays of
        objects.
        """
        if any(array.dtype.hasobject for array in arrays.values()):
            raise ValueError("arrays of objects have no bytes")
        head = [[name, array.dtype.str, array.shape] for name, array in arrays.items()]
        self.send_json(head, to)
        for array in arrays.values():
            self._send(np.ascontiguousarray(array).reshape(-1).view(np.uint8), to)

    def receive_arrays(self, source: int) -> dict[str, NDArray[Any]]:
        """Wait for the arrays that `send_arrays` sends."""
        head = self.receive_json(source)
        arrays = {name: np.empty(shape, np.dtype(kind)) for name, kind, shape in head}
        for array in arrays.values():
            self._receive(array.reshape(-1).view(np.uint8), source)
        return arrays

    def _send(self, array: NDArray[Any], to: int) -> None:
        from torch import distributed

        for piece in _pieces(array):
            distributed.send(piece, to, group=self._group)

    def _receive(self, array: NDArray[Any], source: int) -> None:
        from torch import distributed

        for piece in _pieces(array):
            distributed.recv(piece, source, group=self._group)


def _pieces(array: NDArray[Any]) -> list[Tensor]:
    """The memory of an array as tensors, uint8 (n,)."""
    import torch

    if not array.size:
        return []
    array = array.view(np.uint8)
    if not array.flags.writeable:  # torch warns of memory that may not be written
        array = array.copy()
    return list(torch.from_numpy(array).split(_PIECE))
