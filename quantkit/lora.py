"""A LoRA adapter merged onto its base model: W + scale * B A, file by file."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantkit.errors import QuantkitError
from quantkit.hub.adapter import CONFIG, WEIGHTS, Adapter, overlay, read_adapter

_PREFIX = "base_model.model."
_REMEDY = "Merge it yourself (peft's merge_and_unload), and give the merged model."


def merge(
    base: Path, base_files: Iterable[str], adapter: Path, own_files: Iterable[str], out: Path
) -> list[Path]:
    """Write to `out` the model of `base_files` in `base` with the adapter merged and its
    `own_files` (tokenizer, chat template) laid over. Returns the files. One weight file is in
    memory at a time, sums are taken in float32.

    Raises QuantkitError where a part of the adapter has no place in the base.
    """
    settings = json.loads((adapter / CONFIG).read_text("utf-8"))
    config = read_adapter(adapter.name, [WEIGHTS], settings)
    base_files = list(base_files)
    weights = [file for file in base_files if file.endswith(".safetensors")]
    names: list[str] = []  # of the base's tensors
    for file in weights:
        with safe_open(base / file, "pt") as opened:
            names += opened.keys()
    changes = _changes(load_file(adapter / WEIGHTS), config, names)
    out.mkdir(parents=True, exist_ok=True)
    for file in base_files:
        if file not in weights:
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / file, out / file)
    overlay(adapter, own_files, out)
    for file in weights:
        tensors = load_file(base / file)
        for name, change in changes.items():
            if name in tensors:
                tensors[name] = _changed(name, tensors[name], change, config.transposed)
        save_file(tensors, out / file, metadata={"format": "pt"})
    return sorted(path for path in out.rglob("*") if path.is_file())


Change = tuple[torch.Tensor, ...]
"""(scaled B, A), or one tensor that replaces the base's."""


def _changes(
    tensors: Mapping[str, torch.Tensor], config: Adapter, names: Sequence[str]
) -> dict[str, Change]:
    """What is done to which tensor of the base."""
    pairs: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    changes: dict[str, Change] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if found:
            pairs[found[1].removeprefix(_PREFIX)][found[2]] = tensor
        elif ".lora_" in key:
            raise QuantkitError(
                f"The adapter has {key}, which cannot be merged: only lora_A and lora_B of linear"
                " layers can.",
                _REMEDY,
            )
        else:  # a module that was trained whole (modules_to_save), or a bias
            name = re.sub(r"\.(modules_to_save|base_layer)(\.default)?", "", key)
            changes[_place(name.removeprefix(_PREFIX), names)] = (tensor.contiguous(),)
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"} or pair["A"].dim() != 2 or pair["B"].dim() != 2:
            raise QuantkitError(f"The adapter has no whole lora_A and lora_B of {module}.", _REMEDY)
        rank = len(pair["A"])
        patterns = (a for p, a in config.alphas.items() if re.match(rf"(.*\.)?({p})$", module))
        scale = next(patterns, config.alpha) / (rank**0.5 if config.use_rslora else rank)
        name = _place(f"{module}.weight", names)
        changes[name] = (pair["B"].float() * scale, pair["A"].float())
    return changes


def _place(name: str, names: Sequence[str]) -> str:
    """The base's tensor of this name; checkpoints leave outer modules out, or name them otherwise,
    but number layers alike.
    """
    if name in names:
        return name
    tail = name[found.start() :] if (found := re.search(r"\blayers\.\d", name)) else name
    near = [n for n in names if name.endswith(f".{n}") or n.endswith(f".{tail}")]
    if len(near) != 1:
        raise QuantkitError(
            f"The adapter changes {name}, and its base has "
            f"{'no such tensor' if not near else f'{len(near)} such tensors'}.",
            "Check that the adapter names the right base; or merge it yourself"
            " (peft's merge_and_unload).",
        )
    return near[0]


def _changed(name: str, weight: torch.Tensor, change: Change, transposed: bool) -> torch.Tensor:
    if len(change) == 1:
        made = change[0].to(weight.dtype)
    else:
        delta = change[0] @ change[1]
        delta = delta.T if transposed else delta
        if delta.shape == weight.shape and weight.is_floating_point() and weight.itemsize > 1:
            return (weight.float() + delta).to(weight.dtype)
        made = delta
    if made.shape != weight.shape:
        raise QuantkitError(
            f"The adapter's {name} is {tuple(made.shape)} and its base's {tuple(weight.shape)}.",
            "It was trained on another base, or with a larger vocabulary: merge it yourself"
            " (peft's resize_token_embeddings and merge_and_unload).",
        )
    if len(change) == 2:
        raise QuantkitError(
            f"The base of the adapter is quantized ({weight.dtype}): there is nothing to add to.",
            "Name its full-precision original in adapter_config.json of a local copy.",
        )
    return made
