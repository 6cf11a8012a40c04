"""Decode packed rows where their values are wanted: on a GPU by PyTorch, on the CPU by libggml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from quantkit.ggml import native
from quantkit.ggml.codebooks import CODEBOOKS
from quantkit.ggml.formats import FORMATS
from quantkit.ggml.types import QuantType


class Readable(Protocol):
    """A block format that torch can read on any device: scalar grids and codebooks."""

    @property
    def qtype(self) -> QuantType: ...

    def values(self, packed: torch.Tensor) -> torch.Tensor:
        """Return the float32 values (n_rows, n_columns) of packed rows uint8 (n_rows,
        row_bytes).
        """


READABLE: Mapping[QuantType, Readable] = {**FORMATS, **CODEBOOKS}
"""The types that GPTQ can make."""

AT_ONCE = 1 << 26  # weights: what lies between bytes and values takes several times their size


def values_of(packed: native.Bytes, qtype: QuantType, device: torch.device) -> torch.Tensor:
    """Return the values of packed rows, uint8 (n_rows, row_bytes), on `device`: float32 (n_rows,
    n_columns). A GPU decodes the types that it can read itself.
    """
    form = READABLE.get(qtype)
    if form is None or device.type != "cuda":
        return torch.from_numpy(native.dequantize(packed, qtype)).to(device)
    n_columns = packed.shape[1] // qtype.block_bytes * qtype.block_size
    return decoded(form, torch.from_numpy(packed.copy()).to(device), n_columns)


def decoded(form: Readable, packed: torch.Tensor, n_columns: int) -> torch.Tensor:
    """Return the values of packed rows on a device: float32 (n_rows, n_columns), some rows at a
    time.
    """
    values = torch.empty(len(packed), n_columns, device=packed.device)
    n = max(1, AT_ONCE // n_columns)
    for first in range(0, len(packed), n):
        values[first : first + n] = form.values(packed[first : first + n])
    return values
