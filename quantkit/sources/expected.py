"""Run transformers' loader on a checkpoint without its weights: the model of its config on the
device `meta`, with names and shapes alone.

Runs in a limited process (`quantkit.sources.fit`): every number here is a stranger's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from quantkit.checkpoint.quantized import unpacked_shapes
from quantkit.checkpoint.weight_files import tensors_of
from quantkit.model.blockwise import empty_model, find_blocks, refusals_told
from quantkit.sandbox.untrusted import Settings

if TYPE_CHECKING:
    from quantkit.sources.fit import Report

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def compare(folder: str) -> Report:
    """Return transformers' report on the checkpoint (or its shell) in `folder`, as JSON values.

    `missing` and `mismatched` are named as the model does, `unread` as the files do: those that no
    rule of transformers ignores. `tied` are pairs of stored tensors that are one in the model.
    `widths` say of every block how many rows its weights of so many columns have at most. Raises
    QuantkitError when transformers cannot make the model, or its blocks are not found.
    """
    stored = {name: (t.dtype, t.shape) for name, (_, t) in tensors_of(Path(folder)).items()}
    config = Settings.parse(Path(folder, "config.json").read_bytes(), "config.json")
    shapes = unpacked_shapes(config, stored)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = empty_model(Path(folder))
    with refusals_told():
        targets = _targets(model, shapes)
        state = {
            name: torch.empty(shape, dtype=_DTYPES.get(dtype, torch.uint8), device="meta")
            for name, (dtype, shape) in shapes.items()
        }
        mapping: Any = get_model_conversion_mapping(model)
        found, _ = convert_and_load_state_dict_in_model(
            model,
            state,
            LoadStateDictConfig(
                device_map={"": "meta"}, dtype=torch.bfloat16, weight_mapping=mapping
            ),
        )
        tied = _tied_pairs(model, targets)
        model.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(found)
    known = model.state_dict()
    ignored = _ignored(model)
    unread = [
        name
        for name, target in targets.items()
        if target not in known and not (ignored and ignored.search(target))
    ]
    prefix, blocks = find_blocks(model)
    return {
        "model": type(model).__name__,
        "missing": sorted(found.missing_keys),
        "mismatched": sorted(
            (name, list(stored), list(made)) for name, stored, made in found.mismatched_keys
        ),
        "failed": sorted(found.conversion_errors),
        "odd_types": [
            name
            for name, target in targets.items()
            if shapes[name][0] not in _DTYPES
            and target in known
            and known[target].is_floating_point()
        ],
        "unread": unread,
        "unread_targets": [targets[name] for name in unread],
        "tied": tied,
        "head": _name_of(model, model.get_output_embeddings()),
        "blocks": prefix,
        "n_blocks": len(blocks),
        "widths": _widths(blocks),
        "activation": _activation(model),
    }


# Names of one function, as transformers and others spell it; GELUs differ by less than rounding.
_SAME_ACTIVATION = (
    {"silu", "swish"},
    {"gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_accurate", "gelu_pytorch_tanh"},
)


def _activation(model: PreTrainedModel) -> tuple[str, str, str] | None:
    """The activation that the config asks for and the architecture's own, where they are not one
    function: llama.cpp has one for every architecture, and its converter does not look.
    """
    config = model.config.get_text_config()
    usual = type(config)()
    for key in ("hidden_act", "hidden_activation", "activation_function"):
        own, asked = getattr(usual, key, None), getattr(config, key, None)
        if not isinstance(own, str) or asked == own:
            continue
        if not any({own, asked} <= same for same in _SAME_ACTIVATION):
            return key, str(asked), own
    return None


def _targets(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The model's name of every stored tensor, as transformers' loader finds it."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, known = model.base_model_prefix, model.state_dict()
    found = {}
    for name in names:
        target, _ = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, _ = rename_source_key(name, [], [], prefix, known)
        found[name] = target
    return found


def _tied_pairs(model: PreTrainedModel, targets: Mapping[str, str]) -> list[tuple[str, str]]:
    """Stored tensors that the config says are one: [the copy, what it is a copy of]."""
    stored = {target: name for name, target in targets.items()}
    pairs = (model.all_tied_weights_keys or {}).items()
    return [(stored[copy], stored[of]) for copy, of in pairs if copy in stored and of in stored]


def _ignored(model: PreTrainedModel) -> re.Pattern[str] | None:
    """Names that transformers leaves unread without a word: the model's own list, and constants
    that are computed today (see PreTrainedModel._adjust_missing_and_unexpected_keys).
    """
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    patterns |= {r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"}
    patterns |= {r"\.(attn|attention|self_attention)\.(masked_)?bias$"}  # masks of old checkpoints
    return re.compile("|".join(f"({pattern})" for pattern in patterns))


def _name_of(model: PreTrainedModel, wanted: Any) -> str:
    found = (name for name, module in model.named_modules() if module is wanted)
    return next(found, "") if wanted is not None else ""


def block_widths(folder: str) -> list[list[tuple[int, int]]]:
    """Return only `widths`, from config.json alone."""
    return _widths(find_blocks(empty_model(Path(folder)))[1])


def _widths(blocks: Any) -> list[list[tuple[int, int]]]:
    found = []
    for block in blocks:
        widths: dict[int, int] = {}
        for weight in block.parameters():
            if weight.dim() in (2, 3):
                for columns in weight.shape[-2:]:
                    widths[columns] = max(widths.get(columns, 0), weight.numel() // columns)
        found.append([*widths.items()])
    return found
