"""The full-precision GGUF of a run, and its tensors: what is quantized, and its original."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from quantkit.gguf_file.read import GgufFile
from quantkit.run.folder import RunDir, read_as
from quantkit.tensors import TensorSpec


def load_base(directory: RunDir) -> GgufFile:
    """Return what a run quantizes, whose convert stage is finished: `base.gguf`, or the equalized
    one. Every stage asks for it; a header with 100,000s of tokens is read once.
    """
    return _load(directory.artifacts.quantized)


def load_original(directory: RunDir) -> GgufFile:
    """Return `base.gguf`, the model as it was given: files are measured against it."""
    return _load(directory.artifacts.base)


def _load(path: Path) -> GgufFile:
    found = path.stat() if path.exists() else None
    return _opened(path, (found.st_ino, found.st_size, found.st_mtime_ns) if found else None)


@lru_cache(maxsize=2)
def _opened(path: Path, _version: object) -> GgufFile:
    return GgufFile(path)


@dataclass(frozen=True)
class _Specs:
    specs: tuple[TensorSpec, ...]


def load_specs(directory: RunDir) -> dict[str, TensorSpec]:
    """Return the tensors of `base.gguf` by name, in file order."""
    return {spec.name: spec for spec in read_as(_Specs, directory.artifacts.specs).specs}
