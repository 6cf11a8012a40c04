"""PEFT is the oracle: an adapter that it saved is refused by name, or the merged model's logits are
those that PEFT computes.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from enliven import enliven
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import KasaConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from quantkit.checkpoint.adapter import _UNDERSTOOD, _WITHOUT_EFFECT, read_adapter
from quantkit.checkpoint.safetensors import header_bytes, read_header, write_shell
from quantkit.errors import QuantkitError
from quantkit.sources.lora import merge, merge_shell

IDS = torch.arange(3, 43)[None]
_LLAMA = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": True,
}


def llama(tie: bool) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tie, **_LLAMA))


def gpt2(tie: bool) -> PreTrainedModel:
    config = GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=2, tie_word_embeddings=tie)
    return GPT2LMHeadModel(config)


def gemma(tie: bool) -> PreTrainedModel:
    sizes = {k: v for k, v in _LLAMA.items() if k != "attention_bias"}
    config = Gemma3TextConfig(head_dim=8, tie_word_embeddings=tie, **sizes)
    return Gemma3ForCausalLM(config)


def mixtral(tie: bool) -> PreTrainedModel:
    sizes = {k: v for k, v in _LLAMA.items() if k != "attention_bias"}
    return MixtralForCausalLM(MixtralConfig(num_local_experts=4, tie_word_embeddings=tie, **sizes))


def saved(folder: Path, make: Any, tie: bool, settings: dict[str, Any]) -> torch.Tensor:
    """Write `base` and `adapter` to `folder`. Returns PEFT's logits, after it read them again."""
    torch.manual_seed(0)
    model = make(tie).requires_grad_(False)
    enliven(model)
    model.save_pretrained(folder / "base")
    config = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings}
    peft = get_peft_model(model, LoraConfig(**{"init_lora_weights": False, **config}))
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "modules_to_save" in name or (weight.requires_grad and "lora_" not in name):
                weight.add_(torch.randn_like(weight) * 0.3)
    peft.peft_config["default"].base_model_name_or_path = str(folder / "base")
    peft.save_pretrained(folder / "adapter")
    read = PeftModel.from_pretrained(loaded(folder / "base"), folder / "adapter")
    return logits(read)


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def kl(right: torch.Tensor, found: torch.Tensor) -> float:
    return torch.nn.functional.kl_div(
        found.log_softmax(-1), right.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1).mean().item()  # fmt: skip


def merged(folder: Path) -> Path:
    base, adapter = folder / "base", folder / "adapter"
    files = [path.name for path in base.iterdir()]
    merge(base, files, adapter, [path.name for path in adapter.iterdir()], folder / "merged")
    return folder / "merged"


Q = ["q_proj", "v_proj"]
SAVED = "modules_to_save"
SETTINGS: list[tuple[str, Any, bool, dict[str, Any]]] = [
    ("q and v", llama, False, {"target_modules": Q}),
    ("all linear", llama, True, {"target_modules": "all-linear"}),
    ("a pattern", llama, False, {"target_modules": r".*layers\.1\.mlp\..*_proj"}),
    ("rslora", llama, False, {"target_modules": Q, "use_rslora": True}),
    (
        "other alphas and ranks",
        llama,
        False,
        {
            "target_modules": "all-linear",
            "alpha_pattern": {"down_proj": 32, "^model.layers.1.self_attn.q_proj": 3},
            "rank_pattern": {"layers.0.mlp.up_proj": 2, "o_proj": 7},
        },
    ),
    ("one layer", llama, False, {"target_modules": Q, "layers_to_transform": [1]}),
    ("left out", llama, False, {"target_modules": Q, "exclude_modules": ["0.self_attn.q_proj"]}),
    ("square and transposed", gpt2, True, {"target_modules": ["c_proj", "c_attn"]}),
    ("all biases", gpt2, True, {"target_modules": ["c_attn"], "bias": "all"}),
    ("some biases", llama, False, {"target_modules": Q, "bias": "lora_only"}),
    ("fan_in_fan_out of a linear", llama, False, {"target_modules": Q, "fan_in_fan_out": True}),
    ("embedding", llama, True, {"target_modules": Q, SAVED: ["embed_tokens"]}),
    ("head", llama, True, {"target_modules": Q, SAVED: ["lm_head"]}),
    ("both", llama, True, {"target_modules": Q, SAVED: ["embed_tokens", "lm_head"]}),
    ("both, untied", llama, False, {"target_modules": Q, SAVED: ["embed_tokens", "lm_head"]}),
    ("norms", llama, True, {"target_modules": Q, SAVED: ["norm", "input_layernorm"]}),
    ("a whole block", llama, True, {"target_modules": Q, SAVED: ["layers.0.mlp"]}),
    (
        "kept tied",
        llama,
        True,
        {"target_modules": Q, SAVED: ["embed_tokens"], "ensure_weight_tying": True},
    ),
    ("LoRA of the embedding", llama, True, {"target_modules": [*Q, "embed_tokens"]}),
    ("LoRA of the head", llama, True, {"target_modules": [*Q, "lm_head"]}),
    ("LoRA of both", llama, True, {"target_modules": ["lm_head", "embed_tokens"]}),
    ("LoRA of both, untied", llama, False, {"target_modules": ["lm_head", "embed_tokens"]}),
    (
        "LoRA of both, kept tied",
        llama,
        True,
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    ("one of each", llama, True, {"target_modules": ["embed_tokens"], SAVED: ["lm_head"]}),
    ("a scaled table", gemma, True, {"target_modules": ["q_proj", "embed_tokens"]}),
    ("another tied table", gpt2, True, {"target_modules": ["c_attn", "wte"]}),
    ("beside experts", mixtral, False, {"target_modules": Q}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "tie", "settings"), [row[1:] for row in SETTINGS], ids=[row[0] for row in SETTINGS]
)
def test_merged_as_peft_computes(
    tmp_path: Path, make: Any, tie: bool, settings: dict[str, Any]
) -> None:
    right = saved(tmp_path, make, tie, settings)
    assert kl(right, logits(loaded(tmp_path / "base"))) > 0.01  # the adapter does something
    found = merged(tmp_path)
    assert kl(right, logits(loaded(found))) < 1e-6
    # A plan sees the same tensors and the same config.
    shell = tmp_path / "shell"
    shell.mkdir()
    for path in (tmp_path / "base").iterdir():
        (shell / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "base/model.safetensors"
    write_shell(shell / weights.name, header_bytes(weights), weights.stat().st_size)
    merge_shell(shell, tmp_path / "adapter")
    tensors = [
        {(t.name, t.shape, t.dtype) for t in read_header(folder / weights.name).tensors}
        for folder in (shell, found)
    ]
    assert tensors[0] == tensors[1]
    said = [json.loads((folder / "config.json").read_text()) for folder in (shell, found)]
    assert said[0] == said[1]
    assert said[0]["tie_word_embeddings"] is (tie and "lm_head.weight" not in _names(found))


def _names(folder: Path) -> set[str]:
    return {t.name for t in read_header(folder / "model.safetensors").tensors}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"alora_invocation_tokens": [100, 101]}, "alora_invocation_tokens"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "mica"}, "init_lora_weights='mica'"),
        ({"velora_config": VeloraConfig(num_groups=4)}, "velora_config"),
        ({"kasa_config": KasaConfig(), "init_lora_weights": True}, "kasa_config"),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS'"),
    ],
)
def test_settings_of_peft_that_are_refused(
    tmp_path: Path, settings: dict[str, Any], name: str
) -> None:
    config = LoraConfig(r=4, **{"target_modules": Q, "base_model_name_or_path": "base", **settings})
    config.save_pretrained(tmp_path)
    _refused(tmp_path, name)


def test_experts_are_refused(tmp_path: Path) -> None:
    settings = {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}
    saved(tmp_path, mixtral, False, settings)
    _refused(tmp_path / "adapter", "target_parameters")


@pytest.mark.parametrize("kind", sorted(set(PEFT_TYPE_TO_CONFIG_MAPPING) - {PeftType.LORA}))
def test_other_kinds_of_adapters_are_refused(tmp_path: Path, kind: PeftType) -> None:
    settings = {"peft_type": kind.value, "base_model_name_or_path": "base", "lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    _refused(tmp_path, f"kind {kind.value}")


def _refused(folder: Path, name: str) -> None:
    settings = json.loads((folder / "adapter_config.json").read_text())
    with pytest.raises(QuantkitError, match=re.escape(name)):
        read_adapter("alice/lora", ["adapter_model.safetensors"], settings)


def test_every_setting_of_this_peft_is_decided(tmp_path: Path) -> None:
    """What a plain adapter says by default is accepted, and nothing else but what is understood."""
    LoraConfig(base_model_name_or_path="base").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    read_adapter("alice/lora", ["adapter_model.safetensors"], settings)
    named = _UNDERSTOOD | _WITHOUT_EFFECT
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert named <= fields
    for name in sorted(fields - named):
        with pytest.raises(QuantkitError, match=name):
            value = {**settings, name: settings.get(name) or {"a": 1}}
            read_adapter("alice/lora", ["adapter_model.safetensors"], value)


def _edit(tensors: dict[str, torch.Tensor], settings: dict[str, Any], what: str) -> None:
    key = next(k for k in tensors if k.endswith("layers.1.self_attn.q_proj.lora_A.weight"))
    other = key.replace(".weight", ".default.weight")
    if what == "lacking":
        del tensors[key], tensors[key.replace("lora_A", "lora_B")]
    elif what == "whole and lacking":
        settings["modules_to_save"] = ["lm_head"]
    elif what == "left out":
        settings["target_modules"] = ["v_proj"]
    elif what == "another layer":
        settings["layers_to_transform"] = [0]
    elif what == "excluded":
        settings["exclude_modules"] = ["layers.1.self_attn.q_proj"]
    elif what == "two names":
        tensors[other] = tensors[key] * 2
    elif what == "two modules":
        for part in ("lora_A", "lora_B"):
            old = key.replace("lora_A", part)
            tensors[old.replace("base_model.model.model.", "model.")] = tensors[old] * 2
    elif what == "another rank":
        settings["r"] = 8
    elif what == "integers":
        tensors[key] = tensors[key].to(torch.int8)
    elif what == "empty":
        tensors.clear()
    elif what == "too large":
        tensors[key].fill_(3e38)
    elif what == "flat":
        tensors[key] = tensors[key].flatten()


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("lacking", "lacks model.layers.1.self_attn.q_proj"),
        ("whole and lacking", "lacks lm_head"),
        ("left out", "settings leave that out"),
        ("another layer", "settings leave that out"),
        ("excluded", "settings leave that out"),
        ("two names", "twice"),
        ("two modules", "twice"),
        ("another rank", "of rank 4, but its settings say 8"),
        ("integers", "of type I8"),
        ("empty", "no tensors"),
        ("too large", "cannot hold"),
        ("flat", "no complete lora_A"),
    ],
)
def test_adapters_that_were_meddled_with(tmp_path: Path, what: str, sentence: str) -> None:
    saved(tmp_path, llama, False, {"target_modules": Q})
    weights, config = (
        tmp_path / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json")
    )
    tensors, settings = load_file(weights), json.loads(config.read_text())
    _edit(tensors, settings, what)
    save_file(tensors, weights)
    config.write_text(json.dumps(settings))
    with pytest.raises(QuantkitError, match=sentence):
        merged(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"new_kind_of_scale": 0.5},
        {"lora_alpha": "8"},
        {"lora_alpha": True},
        {"lora_alpha": float("nan")},
        {"lora_alpha": -8},
        {"r": 2.5},
        {"r": []},
        {"alpha_pattern": ["q_proj"]},
        {"alpha_pattern": {"q_proj": None}},
        {"alpha_pattern": {"q_proj(": 8}},
        {"rank_pattern": {"q_proj": 0}},
        {"use_rslora": "yes"},
        {"bias": "some"},
        {"target_modules": 7},
        {"modules_to_save": {"lm_head": 1}},
        {"layers_to_transform": ["0"]},
        {"peft_type": ["LORA"]},
        {"init_lora_weights": {"a": 1}},
    ],
)
def test_settings_that_are_no_settings(settings: dict[str, Any]) -> None:
    known = {"base_model_name_or_path": "x/base", "lora_alpha": 8, "r": 4}
    with pytest.raises(QuantkitError, match=f"{next(iter(settings))}|of the kind"):
        read_adapter("alice/lora", ["adapter_model.safetensors"], {**known, **settings})


def test_patterns_cannot_take_for_ever(tmp_path: Path) -> None:
    """A pattern that takes exponential time on a name ends as a sentence."""
    saved(tmp_path, llama, False, {"target_modules": Q})
    path = tmp_path / "adapter/adapter_config.json"
    settings = {**json.loads(path.read_text()), "target_modules": r"([\w.]+)+!"}
    path.write_text(json.dumps(settings))
    with pytest.raises(QuantkitError, match="patterns of module names cannot be used"):
        merged(tmp_path)
