"""Ask `llama_model_quantize` what llama.cpp itself would make: stock mixes and `--pure` files.

The rules by which `Q4_K_M` picks a type for each tensor, and which tensors may be quantized at all,
are llama.cpp's. They are not written down here a second time: a dry run on `base.gguf` (its header
is enough, the weights may be a hole) tells the type of every tensor for any mix.
"""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.files import replacing
from quantkit.ggml import native
from quantkit.ggml.native import Floats
from quantkit.ggml.types import FILE_TYPES, QuantType
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.write import Layout, data_bytes, lay_out

_LINE = re.compile(
    r"^\[ *\d+/ *\d+\] (?P<name>\S+) +- \[[^\]]*\], type = +(?P<old>\w+), "
    r"size = .*?MiB(?: -> .*?MiB \((?P<new>\w+)\))?$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class StockRecipe:
    """A file that llama-quantize makes: a mix by its label, or with `pure` every tensor of the
    label's one type.
    """

    label: str
    pure: bool = False

    def __post_init__(self) -> None:
        if self.label not in FILE_TYPES:
            raise ValueError(f"{self.label} is not a file type")

    def __str__(self) -> str:
        return f"{self.label} --pure" if self.pure else self.label


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """Collect everything that llama.cpp logs meanwhile, in this process."""
    import llama_cpp

    parts: list[str] = []

    @llama_cpp.llama_log_callback
    def note(_level: int, text: bytes, _data: Any) -> None:
        parts.append(text.decode("utf-8", "replace"))

    @llama_cpp.llama_log_callback
    def silence(_level: int, _text: bytes, _data: Any) -> None:
        pass

    llama_cpp.llama_log_set(note, ctypes.c_void_p(0))
    try:
        yield parts
    finally:
        captured_log.silence = silence  # type: ignore[attr-defined]  # llama.cpp keeps the pointer
        llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))


def _run(base: Path, out: Path, params: Any) -> str:
    """Run llama_model_quantize and return its log. Raises QuantkitError with llama.cpp's own words
    when it fails.
    """
    import llama_cpp

    with captured_log() as parts:
        failed = llama_cpp.llama_model_quantize(
            str(base).encode(), str(out).encode(), ctypes.byref(params)
        )
    log = "".join(parts)
    if failed:
        lines = [line for line in log.splitlines() if "fail" in line or "error" in line.lower()]
        reason = lines[-1].split(": ", 1)[-1].strip() if lines else ""
        raise QuantkitError(
            f"llama.cpp cannot quantize {base.name}: {reason or 'no reason given'}.",
            "The architecture or the file is not one that this llama.cpp supports.",
        )
    return log


class _Imatrix:
    """An importance matrix as the C array that llama_model_quantize takes; owns the memory."""

    def __init__(self, imatrix: Mapping[str, Floats]) -> None:
        import llama_cpp

        self._vectors = {
            name: np.ascontiguousarray(v, np.float32).reshape(-1) for name, v in imatrix.items()
        }
        self.array = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()
        for entry, (name, vector) in zip(self.array, self._vectors.items(), strict=False):
            entry.name = name.encode()
            entry.data = vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = vector.size


# llama.cpp only asks whether there is one when it picks types.
_NO_IMATRIX = {"(none)": np.ones(1, np.float32)}


def stock_types(base: Path, recipe: StockRecipe) -> dict[str, QuantType]:
    """Return the type of every tensor in the stock file that llama-quantize with an imatrix would
    make of `base`.

    A dry run: nothing is written and no weight is read. Raises QuantkitError where llama.cpp
    refuses the model.
    """
    imatrix = _Imatrix(_NO_IMATRIX)
    return _dry_run(base, _params(recipe, imatrix))


def _params(recipe: StockRecipe, imatrix: _Imatrix) -> Any:
    """llama-quantize's own; they point into `imatrix`, which has to outlive them."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[recipe.label]
    params.pure = recipe.pure
    params.imatrix = ctypes.cast(imatrix.array, type(params.imatrix))
    return params


def _dry_run(base: Path, params: Any) -> dict[str, QuantType]:
    """The type of every tensor in the file that llama.cpp would make with these parameters."""
    params.dry_run = True
    with _bare(base) as file:
        log = _run(file, file, params)
    params.dry_run = False
    types = {m["name"]: QuantType((m["new"] or m["old"]).upper()) for m in _LINE.finditer(log)}
    if not types:
        raise QuantkitError(
            "llama.cpp's dry run named no tensors.", "Please report this with the model's id."
        )
    return types


@contextmanager
def _bare(base: Path) -> Iterator[Path]:
    """`base` without its vocabulary, which no type depends on and llama.cpp takes a third of a
    second to read where it has 262,144 tokens; a hole for the weights.
    """
    found = base.stat()
    layout = _bare_layout(base, (found.st_ino, found.st_size, found.st_mtime_ns))
    with tempfile.TemporaryDirectory(prefix="quantkit-bare-") as folder:
        file = Path(folder) / base.name
        file.write_bytes(layout.header)
        os.truncate(file, layout.n_bytes)
        yield file


@lru_cache(maxsize=2)
def _bare_layout(base: Path, _version: object) -> Layout:
    file = GgufFile(base)
    arrays = [name for name, field in file.fields.items() if field.item is not None]
    return lay_out(file, {}, without=[n for n in arrays if n.startswith("tokenizer.")])


def quantizable_tensors(base: Path) -> frozenset[str]:
    """Return the names of the tensors that llama.cpp allows to be quantized: those a pure Q8_0 file
    would touch.
    """
    stored = {name: t.qtype for name, t in GgufFile(base).tensors.items()}
    asked = stock_types(base, StockRecipe("Q8_0", pure=True))
    return frozenset(name for name, qtype in asked.items() if qtype != stored[name])


def stock_bytes(base: GgufFile, recipe: StockRecipe) -> int:
    """Return the exact size in bytes of the stock file, without the few hundred bytes of
    quantize.imatrix.* metadata.
    """
    header = min(t.offset for t in base.tensors.values())
    return header + data_bytes(base, stock_types(base.path, recipe))


def make_stock(
    base: Path,
    out: Path,
    recipe: StockRecipe,
    imatrix: Mapping[str, Floats],
    types: Mapping[str, QuantType] | None = None,
) -> None:
    """Make the stock file with llama.cpp itself: what a user would download instead of ours. With
    `types` those of single tensors are others, as with `llama-quantize --tensor-type`.

    `imatrix` holds mean squared inputs per tensor, float32 (n_columns,) or (n_experts, n_columns).
    Raises QuantkitError when llama.cpp refuses, as it does types of about 2 bits for tensors that
    are not in `imatrix`.
    """
    import llama_cpp

    types, importance = types or {}, _Imatrix(imatrix)
    params = _params(recipe, importance)
    overrides = (llama_cpp.llama_model_tensor_override * (len(types) + 1))()
    for entry, (name, qtype) in zip(overrides, types.items(), strict=False):
        entry.pattern = f"^{re.escape(name)}$".encode()
        entry.type = int(qtype.ggml)
    params.tt_overrides = ctypes.cast(overrides, type(params.tt_overrides))
    # llama.cpp asks for the importances of most tensors, but not of the embeddings and the head:
    # there ggml ends the process.
    for name, qtype in _dry_run(base, params).items():
        if qtype.is_quantized and native.requires_imatrix(qtype) and name not in imatrix:
            raise QuantkitError(
                f"llama.cpp cannot make {recipe} from {base.name}: {name} would be {qtype}, which"
                " needs importances, but this tensor has none.",
                "Choose a larger file.",
            )
    with replacing(out) as partial:
        _run(base, partial, params)


def tensor_types(types: Mapping[str, QuantType]) -> str:
    """Return the types of tensors as llama-quantize reads them. It quantizes by rounding: the types
    are the same, the weights are not.
    """
    return "".join(f"^{re.escape(name)}$={str(t).lower()}\n" for name, t in types.items())
