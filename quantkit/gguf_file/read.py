"""Reading GGUF files: tensor table, raw rows (memory-mapped), metadata."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.ggml import native
from quantkit.gguf_file.fields import Field
from quantkit.gguf_file.header import Broken, StoredTensor, shown
from quantkit.gguf_file.parts import read_whole

__all__ = ["GgufFile", "StoredTensor"]


class GgufFile:
    """A GGUF file opened for reading, or a model in several by its first. Tensor bytes are
    memory-mapped, never copied unless asked.
    """

    def __init__(self, path: Path) -> None:
        """Raises QuantkitError when the file is missing or is not a whole GGUF, whoever made it."""
        self.path = path
        try:
            whole = read_whole(path)
        except FileNotFoundError:
            raise QuantkitError(f"There is no file {path}.", "Check the path.") from None
        except OSError as error:
            raise QuantkitError(
                f"{path} cannot be read: {error.strerror}.", "Check the path."
            ) from error
        except Broken as error:
            raise QuantkitError(
                f"{shown(path.name)} is not a whole GGUF file ({error}).",
                "Download or make it again.",
            ) from error
        self.paths = whole.paths  # all parts
        self.places = whole.places  # of each tensor the file that it lies in
        self.tensors = dict(whole.tensors)
        self.fields = whole.fields
        self.alignment = whole.alignment  # tensors begin at multiples of this many bytes

    def packed(self, name: str) -> native.Bytes:
        """Return the rows of a tensor as stored: uint8 (n_rows, row_bytes), mapped from the file
        while they are in use.
        """
        tensor = self.tensors[name]
        shape = (-1, tensor.qtype.row_bytes(tensor.shape[-1]))
        mapped = np.memmap(self.places[name], np.uint8, "r", tensor.offset, (tensor.n_bytes,))
        return mapped.reshape(shape)

    def values(self, name: str) -> native.Floats:
        """Return a tensor's values as llama.cpp reads them: float32 (n_rows, n_columns)."""
        return native.dequantize(self.packed(name), self.tensors[name].qtype)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """All key-value pairs, each decoded when it is asked for."""
        return _Values(self.fields)

    @property
    def context_length(self) -> int:
        """Tokens that the model was trained for. Raises QuantkitError where the file says none."""
        said = self.metadata.get(f"{self.metadata.get('general.architecture')}.context_length")
        if not isinstance(said, int) or said < 1:
            raise QuantkitError(
                f"{shown(self.path.name)} does not say which context length it was trained for.",
                "Download or make it again.",
            )
        return said

    @property
    def n_bytes(self) -> int:
        """The bytes of all parts."""
        return sum(path.stat().st_size for path in self.paths)

    @property
    def n_elements(self) -> int:
        return sum(math.prod(t.shape) for t in self.tensors.values())


class _Values(Mapping[str, Any]):
    def __init__(self, fields: Mapping[str, Field]) -> None:
        self._fields = fields

    def __getitem__(self, name: str) -> Any:
        return self._fields[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)
