"""`base.gguf` of a run, and its tensors."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from quantkit.ggml.types import QuantType
from quantkit.gguf_file.read import GgufFile
from quantkit.run.folder import RunDir, read_json
from quantkit.tensors import TensorSpec


def load_base(directory: RunDir) -> GgufFile:
    """Return `base.gguf` of a run whose convert stage is finished. Every stage asks for it; a
    header with 100,000s of tokens is read once.
    """
    path = directory.artifacts.base
    found = path.stat() if path.exists() else None
    return _opened(path, (found.st_ino, found.st_size, found.st_mtime_ns) if found else None)


@lru_cache(maxsize=1)
def _opened(path: Path, _version: object) -> GgufFile:
    return GgufFile(path)


def load_specs(directory: RunDir) -> dict[str, TensorSpec]:
    """Return the tensors of `base.gguf` by name, in file order."""
    table = read_json(directory.artifacts.specs)["specs"]
    return {
        row["name"]: TensorSpec(
            row["name"], tuple(row["shape"]), QuantType(row["qtype"]), row["quantizable"]
        )
        for row in table
    }
