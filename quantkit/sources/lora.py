"""Merge a LoRA adapter onto its base model: W + scale * B A, file by file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.adapter import CONFIG, MERGE, WEIGHTS, overlay, read_adapter
from quantkit.checkpoint.codeless import strip
from quantkit.checkpoint.info import shown
from quantkit.checkpoint.safetensors import StoredTensor, read_header, write_shell_of
from quantkit.checkpoint.weight_files import INDEX, in_folder
from quantkit.errors import QuantkitError
from quantkit.sandbox.untrusted import Settings
from quantkit.sources.adapted import Change, Changes, base_of, changes


def merge(
    base: Path, base_files: Iterable[str], adapter: Path, own_files: Iterable[str], out: Path
) -> list[Path]:
    """Write to `out` the model of `base_files` in `base` with the adapter merged and its
    `own_files` (tokenizer, chat template) laid over. Returns the files. One weight file is in
    memory at a time, sums are taken in float32.

    Where PEFT changes one of two tied tables, the head gets a tensor of its own and the config says
    that they are untied. Raises QuantkitError where a part of the adapter has no place in the base.
    """
    base_files = list(base_files)
    weights = [file for file in base_files if file.endswith(".safetensors")]
    made = _changes(base, weights, adapter)
    tensors = load_file(adapter / WEIGHTS)
    for one, other in made.same:
        if not torch.equal(*_comparable(tensors[one], tensors[other])):
            raise QuantkitError(
                f"The adapter's {shown(one)} and {shown(other)} should be equal, but differ.", MERGE
            )
    out.mkdir(parents=True, exist_ok=True)
    for file in base_files:
        if file not in weights:
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / file, out / file)
    overlay(adapter, own_files, out)
    strip(out)
    if made.is_untied:
        _untie(out)
    for file in weights:
        whole = load_file(base / file)
        if made.head is not None and made.head[1] in whole:
            name, table, change = made.head
            whole[name] = _changed(name, whole[table].clone(), change, tensors)
            _add_to_index(out, name, file)
        for name, change in made.of.items():
            if name in whole:
                whole[name] = _changed(name, whole[name], change, tensors)
        save_file(whole, out / file, metadata={"format": "pt"})
    return sorted(path for path in out.rglob("*") if path.is_file())


def merge_shell(folder: Path, adapter: Path) -> bool:
    """Do the same to a folder of shells (`sources.fetch_metadata`), in place: headers, no weights.
    `adapter` is a shell, too. Returns whether tied tables were untied: nothing else changes.

    Raises QuantkitError for what `merge` would refuse by its header.
    """
    weights = [path.name for path in in_folder(folder)]
    made = _changes(folder, weights, adapter)
    if made.is_untied:
        _untie(folder)
    if made.head is None:
        return made.is_untied
    name, table, _ = made.head
    for file in weights:
        stored = {t.name: (t.dtype, t.shape) for t in read_header(folder / file).tensors}
        if table in stored:
            write_shell_of(folder / file, {**stored, name: stored[table]})
            _add_to_index(folder, name, file)
    return True


def _changes(base: Path, weights: Iterable[str], adapter: Path) -> Changes:
    settings = Settings.parse((adapter / CONFIG).read_bytes(), CONFIG)
    config = read_adapter(adapter.name, [WEIGHTS], settings)
    stored: dict[str, StoredTensor] = {}
    for file in weights:
        stored |= {t.name: t for t in read_header(base / file).tensors}
    tensors = {t.name: t for t in read_header(adapter / WEIGHTS).tensors}
    return changes(config, tensors, stored, base_of(base))


def _untie(folder: Path) -> None:
    """Say in the config that the embedding and the head are two tables."""
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    _write_json(path, config)


def _add_to_index(folder: Path, tensor: str, file: str) -> None:
    path = folder / INDEX
    if path.exists():
        index = json.loads(path.read_text("utf-8"))
        index["weight_map"][tensor] = file
        _write_json(path, index)


def _write_json(path: Path, value: object) -> None:
    path.unlink()
    path.write_text(json.dumps(value, indent=1), "utf-8")


def _comparable(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A LoRA of a table is stored the other way round than the same one of the head."""
    return one, other if one.shape == other.shape else other.T


def _changed(
    name: str, weight: torch.Tensor, change: Change, tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    made = weight if change.whole is None else tensors[change.whole]
    if change.a is not None and change.b is not None:
        delta = (tensors[change.b].float() * change.scale) @ tensors[change.a].float()
        made = made.float() + (delta.T if change.is_transposed else delta)
    made = made.to(weight.dtype).contiguous()
    if not made.isfinite().all():
        raise QuantkitError(
            f"With the adapter {shown(name)} has values that {weight.dtype} cannot hold.",
            "Merge it in a wider type yourself, and give the merged model.",
        )
    return made
