"""Write a checkpoint again with its channels equalized (`quantkit.model.equalize`)."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file, save_file

from quantkit.checkpoint.safetensors import StoredTensor
from quantkit.checkpoint.weight_files import few, tensors_of
from quantkit.errors import QuantkitError
from quantkit.model.equalize import Powers


def write(folder: Path, files: Iterable[str], powers: Powers, out: Path) -> list[Path]:
    """Write the model of `files` in `folder` to `out` with its parameters multiplied. Return the
    files. One weight file is in memory at a time.

    Raises QuantkitError where the checkpoint does not store a parameter as transformers has it.
    """
    stored = tensors_of(folder)
    strange = [name for name in powers.names() if not _fits(powers, name, stored)]
    if strange:
        raise QuantkitError(
            "The channels of this checkpoint cannot be equalized: it does not store"
            f" {few(sorted(strange))} as transformers' model has it.",
            "Run it without --equalize.",
        )
    shutil.rmtree(out, ignore_errors=True)
    for file in files:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        if file.endswith(".safetensors"):
            whole = load_file(folder / file)
            for name in whole.keys() & powers.names():
                whole[name] = powers.apply(name, whole[name]).contiguous()
            save_file(whole, out / file, metadata={"format": "pt"})
        else:
            shutil.copyfile(folder / file, out / file)
    return sorted(path for path in out.rglob("*") if path.is_file())


def _fits(powers: Powers, name: str, stored: dict[str, tuple[Path, StoredTensor]]) -> bool:
    if name not in stored:
        return False
    shape = stored[name][1].shape
    axes = (powers.rows.get(name), shape[0]), (powers.columns.get(name), shape[-1])
    return all(power is None or len(power) == n for power, n in axes)
