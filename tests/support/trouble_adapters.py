"""Adapters of many kinds on a checkpoint of `trouble.py`, written by PEFT itself."""

from __future__ import annotations

import json
import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trouble import EITHER, REFUSED, RIGHT

# Settings of LoraConfig; what may come of them.
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "q and v": (RIGHT, {"target_modules": ["q_proj", "v_proj"]}),
    "all linears": (RIGHT, {"target_modules": "all-linear"}),
    "rslora": (RIGHT, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "patterns": (
        EITHER,
        {
            "target_modules": ["q_proj", "down_proj", "o_proj"],
            "rank_pattern": {"o_proj": 2},
            "alpha_pattern": {"q_proj": 16},
        },
    ),
    "one layer": (EITHER, {"target_modules": ["o_proj"], "layers_to_transform": [1]}),
    "embedding": (EITHER, {"target_modules": ["q_proj", "embed_tokens"]}),
    "head": (EITHER, {"target_modules": ["q_proj", "lm_head"]}),
    "embedding, whole": (
        EITHER,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "head, whole": (EITHER, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "both, whole": (
        EITHER,
        {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "norm, whole": (EITHER, {"target_modules": ["o_proj"], "modules_to_save": ["input_layernorm"]}),
    "dora": (EITHER, {"target_modules": ["o_proj"], "use_dora": True}),
    "alora": (REFUSED, {"target_modules": ["o_proj"], "alora_invocation_tokens": [100, 101]}),
    "lora bias": (EITHER, {"target_modules": ["o_proj"], "lora_bias": True}),
    "tokens": (EITHER, {"target_modules": ["o_proj"], "trainable_token_indices": [5, 6]}),
}
_UNKNOWN = {"reflect_after": 3, "lora_gates": ["q_proj"], "use_new_kind": True}


@dataclass(frozen=True)
class Added:
    said: str
    outcome: str


def add_adapter(rng: random.Random, base: Path, folder: Path, outcome: str) -> Added | None:
    """Put an adapter on a checkpoint that transformers loads; None where it does not, or where PEFT
    does not want to.
    """
    name = rng.choice(sorted(_SETTINGS))
    expected, settings = _SETTINGS[name]
    if outcome == REFUSED:
        return None
    try:
        _write(rng, base, folder, settings)
    except Exception:  # the base has an oddity that PEFT or transformers refuses: no adapter then
        return None
    if rng.random() < 0.2:
        key = rng.choice(sorted(_UNKNOWN))
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: _UNKNOWN[key]}))
        return Added(f"adapter: {name}, unknown {key}", REFUSED)
    return Added(f"adapter: {name}", expected)


def _write(rng: random.Random, base: Path, folder: Path, settings: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(rng.randrange(2**31))
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, trust_remote_code=False
        )
        config = LoraConfig(
            r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **settings
        )
        made = get_peft_model(model, config)
        with torch.no_grad():
            for name, weight in made.named_parameters():
                if "modules_to_save" in name:
                    weight.add_(torch.randn_like(weight) * weight.std().nan_to_num(0.1))
        made.peft_config["default"].base_model_name_or_path = str(base.resolve())
        made.save_pretrained(folder)
