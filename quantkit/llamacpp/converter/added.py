"""Fix models that the converter alone writes in a way that llama.cpp cannot run. Runs inside the
sandbox, beside the converter's own classes.

**Llama 4 without experts** (MobileLLM-R1). llama.cpp's llama4 refuses a model without experts, and
where every layer rotates it still leaves the last one unrotated. But that model is Qwen 3 to the
bit: RoPE of neighboring pairs is RoPE of halves with a head's rows in another order, and the L2
norm of queries and keys is an RMS norm with gains of one, which a rotation before or after it does
not change. So it is written as qwen3, rows in that order, gains of one beside them. Those with
layers without RoPE in Llama 4's own places (every fourth) stay llama4 and only name one expert that
no layer has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quantkit.sandbox.untrusted import Settings


def class_for(folder: Path, config: Settings, converters: type) -> type:
    """Return the class that converts the text model in `folder`: the converter's own or one of
    ours.

    Raises ValueError for a model that llama.cpp does not compute.
    """
    found = dense_llama4(config)
    if found is not None:
        return found
    if getattr(converters, "supports_mtp_export", False) and not _has_prediction_head(
        folder, (config.section("text_config") or config).get("num_hidden_layers")
    ):
        converters.no_mtp = True  # type: ignore[attr-defined]
    return converters


def with_older_names(config: Mapping[str, object]) -> dict[str, object]:
    """Return a config that also has the names that its settings had before transformers 5."""
    rope = config.get("rope_parameters")
    older = {
        "n_ctx": config.get("n_positions"),
        "rotary_pct": rope.get("partial_rotary_factor") if isinstance(rope, dict) else None,
    }
    return {**{name: value for name, value in older.items() if value is not None}, **config}


def unread(names: Iterable[str], config: Mapping[str, Any]) -> set[str]:
    """Return the names of tensors that transformers ignores by a rule of its own and llama.cpp need
    not have: keys and values of Gemma 4's blocks that share those of blocks before.
    """
    text = config.get("text_config") or config
    n_shared = text.get("num_kv_shared_layers") or 0
    if not n_shared or not str(config.get("model_type")).startswith("gemma4"):
        return set()
    blocks = {name: _KEYS_VALUES.search(name) for name in names}
    first = text["num_hidden_layers"] - n_shared
    return {name for name, match in blocks.items() if match and int(match[1]) >= first}


_KEYS_VALUES = re.compile(r"model\.layers\.(\d+)\.self_attn\.[kv]_(?:proj|norm)\.")


def projector_class_for(found: Any) -> type:
    """Return the converter's class of an encoder, which then also knows names without
    `vision_model`.
    """

    class Projector(found):
        model_arch = found.model_arch

        def map_tensor_name(self, name: str, *args: Any, **kwargs: Any) -> str:
            try:
                return super().map_tensor_name(name, *args, **kwargs)
            except ValueError:
                older = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
                if older == name:
                    raise
                return super().map_tensor_name(older, *args, **kwargs)

    return Projector


def _has_prediction_head(folder: Path, n_layers: object) -> bool:
    from safetensors import safe_open

    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return any(".mtp." in f".{name}" or f".layers.{n_layers}." in name for name in names)


def dense_llama4(config: Settings) -> type | None:
    """Return the converter's class for a Llama 4 without experts; None for any other model.

    Raises ValueError where llama.cpp computes no such model.
    """
    if config.get("architectures") != ["Llama4ForCausalLM"] or config.get("num_local_experts"):
        return None
    n_layers = config.integer("num_hidden_layers")
    interval = config.integer("no_rope_layer_interval") or 4
    by_interval = [int((i + 1) % interval != 0) for i in range(n_layers)]
    rotated = config.get("no_rope_layers") or by_interval
    if not isinstance(rotated, list):
        raise ValueError("no_rope_layers is no list")
    rotated = rotated[:n_layers]
    if all(rotated) and config.get("use_qk_norm", True):
        return _as_qwen3()
    if rotated == [int((i + 1) % 4 != 0) for i in range(n_layers)]:
        return _as_llama4()
    raise ValueError("llama.cpp has no Llama 4 without experts that leaves out RoPE as this one")


def _as_qwen3() -> type:
    import torch
    from conversion.qwen import Qwen3Model

    class DenseLlama4(Qwen3Model):
        model_arch = Qwen3Model.model_arch

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.hparams["intermediate_size"] = self.hparams["intermediate_size_mlp"]
            for key in ("num_local_experts", "num_experts_per_tok"):
                self.hparams.pop(key, None)
            self.n_rot = self.hparams.get("head_dim") or (
                self.hparams["hidden_size"] // self.hparams["num_attention_heads"]
            )

        def modify_tensors(
            self, data_torch: Any, name: str, bid: int | None
        ) -> Iterable[tuple[str, Any]]:
            for short in ("q", "k"):
                if f".self_attn.{short}_proj." in name:
                    pairs = data_torch.reshape(-1, self.n_rot // 2, 2, *data_torch.shape[1:])
                    data_torch = pairs.transpose(1, 2).reshape(data_torch.shape)
                    if name.endswith(".weight"):
                        gains = f"model.layers.{bid}.self_attn.{short}_norm.weight"
                        yield self.map_tensor_name(gains), torch.ones(self.n_rot)
            yield from super().modify_tensors(data_torch, name, bid)

    return DenseLlama4


def _as_llama4() -> type:
    from conversion.llama import Llama4Model

    class DenseLlama4(Llama4Model):
        model_arch = Llama4Model.model_arch

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.hparams |= {
                "num_local_experts": 1,
                "num_experts_per_tok": 1,
                "interleave_moe_layer_step": 0,
            }

    return DenseLlama4
