"""Base log-probabilities of one text on disk: 16-bit codes that are read block by block.

Layout, little-endian, nothing compressed:

    4096 bytes   magic, then JSON: what the logits are of (`StoreKey`) and the shape
    codes        uint16  [n_windows * n_scored, n_vocab]      evaluators.logprobs says what they
    mean tokens       int32   [n_windows, n_ctx] low, step    float32 [n_windows * n_scored] each
    argmax       int32   [n_windows * n_scored] nll          float64 [n_windows * n_scored]

Codes take 2 bytes for each scored token and vocabulary entry: 25 MB a window of 512 with 49k
tokens, 78 MB with 152k. The file is written under a `.partial` name and moved into place whole; one
whose key or length is not what was asked for is refused, never recomputed over silently.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from evaluators.errors import EvaluationError
from evaluators.logprobs import U16, BaseRows
from evaluators.windows import Windows

_MAGIC = b"QKLOGP1\n"
_HEADER_BYTES = 4096
_SPARE_BYTES = 256 << 20  # left free on the disk


@dataclass(frozen=True)
class StoreKey:
    """Everything that the stored logits depend on."""

    base_sha256: str
    base_n_bytes: int
    text_sha256: str
    n_ctx: int
    max_windows: int | None
    llama_cpp_python: str
    n_gpu_layers: int

    def file_name(self, base: Path, kind: str) -> str:
        """Return the name of a store in a cache: that of the base, and a digest of all of this."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{base.stem}.{digest[:16]}.{kind}"


class LogitStore:
    """An open store. `rows` is in memory (24 bytes a token), the codes are read when asked for."""

    def __init__(self, path: Path, windows: Windows, n_vocab: int, rows: BaseRows) -> None:
        self.windows = windows
        self.n_vocab = n_vocab
        self.rows = rows
        self._file = path.open("rb", buffering=0)

    def reader(self, first_row: int) -> Callable[[int, U16], None]:
        """Return a function that fills a block of codes from row `first_row + row` on. Threads may
        call it at once: it reads at a position and moves none.
        """
        descriptor = self._file.fileno()

        def load(row: int, codes: U16) -> None:
            offset = _HEADER_BYTES + 2 * self.n_vocab * (first_row + row)
            view = codes.data.cast("B")
            while view:
                n = os.preadv(descriptor, [view], offset)
                if n == 0:
                    raise EvaluationError(
                        f"The stored base logits {self._file.name} were cut short.",
                        "Delete the file and run again.",
                    )
                view, offset = view[n:], offset + n

        return load

    def rows_of(self, first_row: int, n: int) -> BaseRows:
        """Return the rows' scalars, n of them from `first_row` on."""
        part = slice(first_row, first_row + n)
        rows = self.rows
        return BaseRows(rows.low[part], rows.step[part], rows.argmax[part], rows.nll[part])

    def close(self) -> None:
        self._file.close()


class StoreWriter:
    """Writes a store; use as a context manager. The file appears only when the body succeeds."""

    def __init__(self, path: Path, key: StoreKey, windows: Windows, n_vocab: int) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._windows = windows
        self._n_vocab = n_vocab
        n = windows.n_windows * windows.n_scored
        self._rows = BaseRows(
            np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.int32), np.empty(n)
        )
        self._header = _header(key, windows, n_vocab)

    def __enter__(self) -> Self:
        self._file = self._partial.open("wb", buffering=0)
        return self

    def writer(self, first_row: int) -> Callable[[int, U16], None]:
        """Return a function that writes a block of codes from row `first_row + row` on, from any
        thread.
        """
        descriptor = self._file.fileno()

        def store(row: int, codes: U16) -> None:
            offset = _HEADER_BYTES + 2 * self._n_vocab * (first_row + row)
            view = codes.data.cast("B")
            while view:
                n = os.pwrite(descriptor, view, offset)
                view, offset = view[n:], offset + n

        return store

    def put_rows(self, first_row: int, rows: BaseRows) -> None:
        """Keep the rows' scalars until the end."""
        part = slice(first_row, first_row + len(rows.nll))
        for name in ("low", "step", "argmax", "nll"):
            getattr(self._rows, name)[part] = getattr(rows, name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                rows = self._rows
                end = _HEADER_BYTES + 2 * self._n_vocab * len(rows.nll)
                for array in (self._windows.tokens, rows.low, rows.step, rows.argmax, rows.nll):
                    os.pwrite(self._file.fileno(), array.tobytes(), end)
                    end += array.nbytes
                os.pwrite(self._file.fileno(), self._header, 0)
                os.fsync(self._file.fileno())
                os.replace(self._partial, self._path)
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)


def open_store(path: Path, key: StoreKey) -> LogitStore:
    """Open a finished store. Raises EvaluationError when it is of something else, or not whole."""
    remedy = "Delete it, or choose another --cache folder."
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
        if len(head) < _HEADER_BYTES or not head.startswith(_MAGIC):
            raise EvaluationError(f"{path} does not hold base logits.", remedy)
        header = json.loads(head[len(_MAGIC) :])
        for name, wanted in asdict(key).items():
            if header["key"].get(name) != wanted:
                raise EvaluationError(
                    f"The stored base logits {path} belong to another {name}: "
                    f"{header['key'].get(name)}, not {wanted}.",
                    remedy,
                )
        n_windows, n_ctx, first = header["n_windows"], header["n_ctx"], header["first"]
        n_vocab = header["n_vocab"]
        n = n_windows * (n_ctx - 1 - first)
        if path.stat().st_size != store_bytes(n_windows, n_ctx, first, n_vocab):
            raise EvaluationError(f"The stored base logits {path} are incomplete.", remedy)
        file.seek(_HEADER_BYTES + 2 * n_vocab * n)

        def read(dtype: type[np.generic], count: int) -> NDArray[Any]:
            return np.fromfile(file, dtype, count)

        tokens = read(np.int32, n_windows * n_ctx).reshape(n_windows, n_ctx)
        low, step = read(np.float32, n), read(np.float32, n)
        rows = BaseRows(low, step, read(np.int32, n), read(np.float64, n))
    return LogitStore(path, Windows(tokens, first), n_vocab, rows)


def store_bytes(n_windows: int, n_ctx: int, first: int, n_vocab: int) -> int:
    """Return the size of a store's file."""
    n = n_windows * (n_ctx - 1 - first)
    return _HEADER_BYTES + 2 * n_vocab * n + 4 * n_windows * n_ctx + (4 + 4 + 4 + 8) * n


def check_space(folder: Path, n_bytes: int, purpose: str, remedy: str) -> None:
    """Raise EvaluationError when `folder`'s disk has no room for `n_bytes` more."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes + _SPARE_BYTES:
        raise EvaluationError(
            f"{purpose} need {n_bytes / 1e9:.1f} GB in {folder}, but only {free / 1e9:.1f} GB are "
            "free.",
            remedy,
        )


def _header(key: StoreKey, windows: Windows, n_vocab: int) -> bytes:
    value = {
        "key": asdict(key),
        "n_windows": windows.n_windows,
        "n_ctx": windows.n_ctx,
        "first": windows.first,
        "n_vocab": n_vocab,
    }
    data = _MAGIC + json.dumps(value, sort_keys=True).encode()
    return data.ljust(_HEADER_BYTES)
