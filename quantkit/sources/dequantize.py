"""Expand a quantized checkpoint to 16 bits, so that the converter and transformers read exactly the
same weights and no runtime of the source's format is needed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantkit.checkpoint.quantized import FP8, Expanded, Source, expanded
from quantkit.checkpoint.safetensors import StoredTensor, read_header
from quantkit.checkpoint.weight_files import INDEX, stored
from quantkit.errors import QuantkitError
from quantkit.sources.integers import read_integers
from quantkit.sources.metadata import strip_config

_WEIGHTS = ".safetensors"
_SHARD_BYTES = 2_000_000_000  # of one file, and of what is in memory


@dataclass(frozen=True)
class Checkpoint:
    """The stored tensors of a checkpoint, whatever files they lie in."""

    tensors: Mapping[str, StoredTensor]
    _file_of: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path, files: Iterable[str]) -> Checkpoint:
        """Open the safetensors among `files` in `folder`."""
        weights = [file for file in files if file.endswith(_WEIGHTS)]
        headers = ((file, read_header(folder / file).tensors) for file in weights)
        found = stored(folder.name, headers)
        opened = {file: safe_open(folder / file, "pt") for file in weights}
        tensors = {name: tensor for name, (_, tensor) in found.items()}
        return cls(tensors, {name: opened[file] for name, (file, _) in found.items()})

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor as it is stored."""
        tensor: torch.Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def expanded(self, source: Source) -> dict[str, Expanded]:
        """Return the tensors of the 16-bit checkpoint that is made of it."""
        return expanded(source, self.tensors)


def dequantize(folder: Path, files: Iterable[str], source: Source, out: Path) -> list[Path]:
    """Write the model of `files` in `folder` to `out` in 16 bits. Returns the files."""
    files = list(files)
    checkpoint = Checkpoint.open(folder, files)
    _copy_rest(folder, [file for file in files if not file.endswith(_WEIGHTS)], out)
    read = checkpoint.read
    shards: dict[str, str] = {}
    waiting: dict[str, torch.Tensor] = {}
    paths: list[Path] = []

    def flush() -> None:
        paths.append(out / f"model-{len(paths) + 1:05}.safetensors")
        save_file(waiting, paths[-1], metadata={"format": "pt"})
        shards.update(dict.fromkeys(waiting, paths[-1].name))
        waiting.clear()

    for name, made in checkpoint.expanded(source).items():
        waiting[name] = _expand([read(part) for part in made.sources], made, source).contiguous()
        if sum(t.nbytes for t in waiting.values()) > _SHARD_BYTES:
            flush()
    if waiting:
        flush()
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return sorted(path for path in out.rglob("*") if path.is_file())


def _copy_rest(folder: Path, files: Iterable[str], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for file in files:
        if file == INDEX:
            continue
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        if file == "config.json":
            strip_config(folder / file, out / file)
        else:
            shutil.copyfile(folder / file, out / file)


def _expand(parts: list[torch.Tensor], made: Expanded, source: Source) -> torch.Tensor:
    if len(made.sources) == 1 and parts[0].dtype.itemsize > 1:
        return parts[0]
    if source.scheme == FP8:
        values = _fp8(parts[0], parts[1] if len(parts) > 1 else None, source)
        return values.to(torch.bfloat16)
    return read_integers(named(made, parts), made, source).values()


def named(made: Expanded, parts: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the parts of a tensor by the ends of their names."""
    names = [name.rpartition(".")[2] for name in made.sources]
    return dict(zip(names, parts, strict=True))


def _fp8(weight: torch.Tensor, scale: torch.Tensor | None, source: Source) -> torch.Tensor:
    """Values of FP8 weights (..., n_rows, n_columns) under one scale, one a row, or one a block."""
    values = weight.float()
    if scale is None:
        return values
    scale = scale.float()
    if scale.dim() == 1 and scale.numel() == values.shape[0]:
        scale = scale[:, None]
    if source.block is not None and scale.dim() >= 2:
        rows, columns = source.block
        scale = scale.repeat_interleave(rows, -2).repeat_interleave(columns, -1)
        scale = scale[..., : values.shape[-2], : values.shape[-1]]
    try:
        return values * scale
    except RuntimeError:
        raise QuantkitError(
            f"FP8 scales {tuple(scale.shape)} do not fit weights {tuple(weight.shape)}.",
            "The checkpoint is broken or of an unknown kind: give the original model.",
        ) from None
