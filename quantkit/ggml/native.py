"""Call ggml's own quantizers and dequantizers, from the `libggml-base` that llama-cpp-python ships.

Rows are independent, ctypes releases the GIL: a thread pool works on blocks of rows. Arrays are
numpy; packed rows are uint8 of shape (n_rows, row_bytes), as in a GGUF file.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quantkit.errors import QuantkitError
from quantkit.ggml.types import BF16, F16, F32, QuantType

_ROWS_PER_TASK = (
    64  # a few hundred kB of weights: long enough to hide the call, short enough to balance
)

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@functools.cache
def library() -> ctypes.CDLL:
    """Load libggml-base with the argument types of the functions used here.

    Found without importing llama_cpp, which would load the whole runtime. Raises QuantkitError when
    it is not installed.
    """
    spec = importlib.util.find_spec("llama_cpp")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else None
    names = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")
    path = (
        next((folder / name for name in names if (folder / name).exists()), None)
        if folder
        else None
    )
    if path is None:
        raise QuantkitError(
            "llama-cpp-python is not installed.",
            "Run `make install`, or pip install -r requirements.txt.",
        )
    lib = ctypes.CDLL(str(path))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        pointer,
        pointer,
        count,
        count,
        count,
        pointer,
    ]
    lib.ggml_quantize_init.argtypes = [ctypes.c_int]
    lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    lib.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    lib.ggml_validate_row_data.restype = ctypes.c_bool
    lib.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return lib


_TO_FLOAT = {F16: "ggml_fp16_to_fp32_row", BF16: "ggml_bf16_to_fp32_row"}


@functools.cache
def _to_float(qtype: QuantType) -> ctypes._NamedFuncPointer:
    name = _TO_FLOAT.get(qtype, "dequantize_row_" + qtype.name.lower().replace("_k", "_K"))
    function = getattr(library(), name, None)
    if function is None:
        raise QuantkitError(
            f"Weights cannot be stored as {qtype}.", "The file is broken, or not a language model."
        )
    function.restype = None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return function


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, "ggml")


def _each_block(n_rows: int, work: object) -> None:
    """Call work(first, last) over blocks of rows, on all cores."""
    starts = range(0, n_rows, _ROWS_PER_TASK)
    list(_pool().map(lambda first: work(first, min(first + _ROWS_PER_TASK, n_rows)), starts))  # type: ignore[operator]


def requires_imatrix(qtype: QuantType) -> bool:
    """Return whether ggml aborts without importances for this type."""
    return bool(library().ggml_quantize_requires_imatrix(int(qtype.ggml)))


def quantize(weight: Floats, qtype: QuantType, importance: Floats | None = None) -> Bytes:
    """Quantize rows as `llama-quantize` does (ggml_quantize_chunk).

    `weight` is (n_rows, n_columns) float32, `importance` (n_columns,) float32 for all rows or None.
    Returns uint8 (n_rows, row_bytes). Raises ValueError where rows do not divide into blocks, and
    QuantkitError when the type needs importances and has none, when weights are NaN or infinite, or
    when the result does not validate (weights too large for the type's scales).
    """
    n_rows, n_columns = weight.shape
    if requires_imatrix(qtype) and importance is None:
        raise QuantkitError(
            f"{qtype} cannot be made without an importance matrix.", "Leave this type out."
        )
    weight = np.ascontiguousarray(weight, np.float32)
    if qtype == F32:
        _check_finite(weight)
        return weight.view(np.uint8)
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        if importance.shape != (n_columns,):
            raise ValueError(
                f"importance has shape {importance.shape}, the rows have {n_columns} columns"
            )
    packed = np.empty((n_rows, qtype.row_bytes(n_columns)), np.uint8)
    lib, kind = library(), int(qtype.ggml)
    lib.ggml_quantize_init(kind)  # builds the codebook's tables once, before threads ask for them
    importances = None if importance is None else importance.ctypes.data

    def work(first: int, last: int) -> None:
        # Of these ggml makes valid blocks of nonsense for most types.
        _check_finite(weight[first:last])
        lib.ggml_quantize_chunk(
            kind,
            weight[first:].ctypes.data,
            packed[first:].ctypes.data,
            0,
            last - first,
            n_columns,
            importances,
        )

    _each_block(n_rows, work)
    if not lib.ggml_validate_row_data(kind, packed.ctypes.data, packed.nbytes):
        raise QuantkitError(
            f"Quantizing to {qtype} gave invalid blocks.",
            "The weights are too large for its scales: leave this type out.",
        )
    return packed


def _check_finite(weight: Floats) -> None:
    if not np.isfinite(weight).all():
        raise QuantkitError(
            "The weights are invalid: they hold NaN or infinite values.",
            "The checkpoint is broken: use another revision, or tell its author.",
        )


def dequantize(packed: Bytes, qtype: QuantType) -> Floats:
    """Return the values of packed rows exactly as llama.cpp reads them: uint8 (n_rows, row_bytes)
    -> float32 (n_rows, n_columns).
    """
    packed = np.ascontiguousarray(packed)
    if qtype == F32:
        return packed.view(np.float32)
    n_rows, row_bytes = packed.shape
    n_columns = row_bytes // qtype.block_bytes * qtype.block_size
    values = np.empty((n_rows, n_columns), np.float32)
    function = _to_float(qtype)

    def work(first: int, last: int) -> None:
        function(packed[first:].ctypes.data, values[first:].ctypes.data, (last - first) * n_columns)

    _each_block(n_rows, work)
    return values
