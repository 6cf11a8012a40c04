"""A tiny random checkpoint of every family of models that people ask for, by its real config class.

What makes a family special is kept (widths that do not divide into 256, heads, experts, layer
types, norms, soft caps, tied embeddings, vision towers); what only makes it large is not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from enliven import enliven
from tiny_models import N_TOKENS, save_model
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """A line of docs/architectures.md."""

    name: str
    models: str  # what people know it by
    build: Callable[[int], PreTrainedModel]  # from the size of the vocabulary
    tokenizer: str = "bpe"
    dtype: torch.dtype = torch.bfloat16
    notes: str = ""
    sees: bool = False  # has a vision tower
    seed: int = 0  # of weights in which no token of the test is level between two experts


def write_checkpoint(family: Family, folder: Path) -> Path:
    """A checkpoint of the family in `folder`: config, tokenizer, safetensors."""
    torch.manual_seed(family.seed)
    model = family.build(N_TOKENS[family.tokenizer]).requires_grad_(False).eval()
    enliven(model)
    save_model(folder, model.to(family.dtype), family.tokenizer)
    if hasattr(model.config, "vision_config"):
        size = getattr(model.config.vision_config, "image_size", 224)
        images = {
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "size": {"height": size, "width": size},
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return folder


def _build(
    config_class: str, model_class: str, **settings: Any
) -> Callable[[int], PreTrainedModel]:
    def build(n_vocab: int) -> PreTrainedModel:
        common = {"vocab_size": n_vocab, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        config = getattr(transformers, config_class)(**{**common, **settings})
        return getattr(transformers, model_class)(config).float()

    return build


def _vision(
    config_class: str,
    model_class: str,
    text: dict[str, Any],
    vision: dict[str, Any],
    **settings: Any,
) -> Callable[[int], PreTrainedModel]:
    """A language model with a vision tower, both small."""

    def build(n_vocab: int) -> PreTrainedModel:
        tokens = {"vocab_size": n_vocab, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        config = getattr(transformers, config_class)(
            text_config={**tokens, **text}, vision_config=vision, **settings
        )
        return getattr(transformers, model_class)(config).float()

    return build


_SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}


_SMALL_MHA = {**_SMALL, "intermediate_size": 1024, "num_key_value_heads": 4}
_SIX = {  # Gemma 3: five layers see a window, the sixth sees all
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
}

_GEMMA_4 = {
    "tie_word_embeddings": True,
    "head_dim": 64,
    "global_head_dim": 128,
    "sliding_window": 64,
    "final_logit_softcapping": 30.0,
}


def _mobilellm(width: int, feed_forward: int, heads: int, kv_heads: int, n_layers: int) -> Any:
    return _build(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        hidden_size=width,
        intermediate_size=feed_forward,
        intermediate_size_mlp=feed_forward,
        num_hidden_layers=n_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        max_position_embeddings=1024,
        num_local_experts=0,
        num_experts_per_tok=0,
        moe_layers=[],
        interleave_moe_layer_step=0,
        no_rope_layers=[1] * n_layers,
        layer_types=["full_attention"] * n_layers,
        attn_temperature_tuning=False,
        use_qk_norm=True,
        tie_word_embeddings=True,
    )


_AS_QWEN3 = "written as qwen3, which computes the same: this llama4 refuses models without experts"

# Latent attention and experts after a dense block, as DeepSeek has them.
_LATENT: dict[str, Any] = {
    **_SMALL,
    "num_key_value_heads": 4,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 256,
}

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "Llama 3",
            "Llama 3.x, SmolLM2, TinyLlama",
            _build(
                "LlamaConfig",
                "LlamaForCausalLM",
                **_SMALL,
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 500000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 256,
                },
            ),
        ),
        *(
            Family(f"MobileLLM-R1 {size}", f"MobileLLM-R1-{size}", build, notes=_AS_QWEN3)
            for size, build in (
                ("140M", _mobilellm(576, 2048, 9, 3, 2)),
                ("360M", _mobilellm(1024, 4096, 16, 4, 1)),
                ("950M", _mobilellm(1536, 6144, 24, 6, 1)),
            )
        ),
        Family(
            "Llama 4 dense",
            "Llama 4 without experts, every fourth layer without RoPE",
            _build(
                "Llama4TextConfig",
                "Llama4ForCausalLM",
                **{**_SMALL, "num_hidden_layers": 4},
                intermediate_size_mlp=512,
                head_dim=64,
                num_local_experts=0,
                num_experts_per_tok=0,
                moe_layers=[],
                interleave_moe_layer_step=0,
            ),
            notes="names one expert that no layer has: this llama4 refuses models without",
        ),
        Family(
            "Mistral",
            "Mistral 7B, Mistral Nemo",
            _build("MistralConfig", "MistralForCausalLM", **_SMALL, head_dim=32),
            "spm",
        ),
        Family(
            "Mistral 3",
            "Mistral Small 3.x, Magistral Small 1.2",
            _vision(
                "Mistral3Config",
                "Mistral3ForConditionalGeneration",
                {"model_type": "mistral", **_SMALL, "head_dim": 32},
                {
                    "model_type": "pixtral",
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 2,
                    "head_dim": 32,
                    "image_size": 56,
                    "patch_size": 14,
                },
                image_token_index=5,
                spatial_merge_size=2,
                tie_word_embeddings=False,
            ),
            sees=True,
        ),
        Family("Qwen2", "Qwen2, Qwen2.5", _build("Qwen2Config", "Qwen2ForCausalLM", **_SMALL)),
        Family("Qwen3", "Qwen3", _build("Qwen3Config", "Qwen3ForCausalLM", **_SMALL, head_dim=32)),
        Family(
            "Qwen3-MoE",
            "Qwen3-30B-A3B, Qwen3-Coder-30B-A3B",
            _build(
                "Qwen3MoeConfig",
                "Qwen3MoeForCausalLM",
                **_SMALL,
                head_dim=32,
                moe_intermediate_size=256,
                num_experts=4,
                num_experts_per_tok=2,
                norm_topk_prob=True,
                decoder_sparse_step=1,
                mlp_only_layers=[],
            ),
            seed=1,
        ),
        Family(
            "Mixtral",
            "Mixtral 8x7B",
            _build(
                "MixtralConfig",
                "MixtralForCausalLM",
                **_SMALL,
                num_local_experts=4,
                num_experts_per_tok=2,
            ),
            "spm",
        ),
        Family(
            "gpt-oss",
            "gpt-oss-20b, gpt-oss-120b",
            _build(
                "GptOssConfig",
                "GptOssForCausalLM",
                **{**_SMALL, "intermediate_size": 256},
                head_dim=64,
                num_local_experts=4,
                num_experts_per_tok=2,
                sliding_window=128,
                layer_types=["sliding_attention", "full_attention"],
            ),
            notes="from 16-bit weights",
        ),
        Family(
            "DeepSeek-V2",
            "DeepSeek-V2, V2.5",
            _build(
                "DeepseekV2Config",
                "DeepseekV2ForCausalLM",
                **_LATENT,
                n_group=1,
                topk_group=1,
                topk_method="greedy",
                norm_topk_prob=False,
            ),
        ),
        Family(
            "DeepSeek-V2-Lite",
            "DeepSeek-V2-Lite, DeepSeek-Coder-V2-Lite",
            _build(
                "DeepseekV2Config",
                "DeepseekV2ForCausalLM",
                **{**_SMALL, "num_key_value_heads": 4, "hidden_size": 128, "num_hidden_layers": 27},
                q_lora_rank=None,
                kv_lora_rank=64,
                qk_nope_head_dim=32,
                qk_rope_head_dim=32,
                v_head_dim=32,
                n_routed_experts=2,
                num_experts_per_tok=1,
                n_shared_experts=1,
                first_k_dense_replace=26,
                moe_intermediate_size=128,
                n_group=1,
                topk_group=1,
                topk_method="greedy",
                norm_topk_prob=False,
            ),
            notes="all 27 layers, by which llama.cpp knows it",
        ),
        Family(
            "DeepSeek-V3",
            "DeepSeek-V3, DeepSeek-R1, Kimi K2",
            _build(
                "DeepseekV3Config",
                "DeepseekV3ForCausalLM",
                **_LATENT,
                n_group=2,
                topk_group=1,
                norm_topk_prob=True,
                scoring_func="sigmoid",  # the original's config says so, not transformers'
            ),
        ),
        Family(
            "Gemma 2",
            "Gemma 2",
            _build(
                "Gemma2Config",
                "Gemma2ForCausalLM",
                **{**_SMALL, "tie_word_embeddings": True},
                head_dim=64,
                query_pre_attn_scalar=64,
                sliding_window=64,
                layer_types=["sliding_attention", "full_attention"],
            ),
            "spm",
        ),
        Family(
            "Gemma 3",
            "Gemma 3 270M and 1B",
            _build(
                "Gemma3TextConfig",
                "Gemma3ForCausalLM",
                **{**_SMALL, "tie_word_embeddings": True, "hidden_size": 640, **_SIX},
                head_dim=256,
                query_pre_attn_scalar=256,
                sliding_window=64,
            ),
            "spm",
        ),
        Family(
            "Gemma 3 multimodal",
            "Gemma 3 4B to 27B",
            _vision(
                "Gemma3Config",
                "Gemma3ForConditionalGeneration",
                {
                    "model_type": "gemma3_text",
                    **{**_SMALL, "tie_word_embeddings": True, **_SIX},
                    "head_dim": 64,
                    "query_pre_attn_scalar": 64,
                    "sliding_window": 64,
                },
                {
                    "model_type": "siglip_vision_model",
                    "vision_use_head": False,
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "image_size": 56,
                    "patch_size": 14,
                },
                mm_tokens_per_image=4,
                image_token_index=10,
                boi_token_index=11,
                eoi_token_index=12,
            ),
            "spm",
            sees=True,
        ),
        Family(
            "Gemma 4",
            "Gemma 4 E2B, E4B",
            _vision(
                "Gemma4Config",
                "Gemma4ForConditionalGeneration",
                {
                    "model_type": "gemma4_text",
                    **{**_SMALL, **_GEMMA_4, "num_hidden_layers": 6},
                    "layer_types": ["sliding_attention", "full_attention"] * 3,
                    "vocab_size_per_layer_input": N_TOKENS["gemma4"],
                    "hidden_size_per_layer_input": 64,
                    "num_kv_shared_layers": 2,
                    "use_double_wide_mlp": True,
                },
                {
                    "model_type": "gemma4_vision",
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "head_dim": 32,
                    "position_embedding_size": 64,
                },
                image_token_id=10,
                boi_token_id=11,
                eoi_token_id=12,
            ),
            "gemma4",
            sees=True,
        ),
        Family(
            "Gemma 4 MoE",
            "Gemma 4 26B-A4B",
            _build(
                "Gemma4TextConfig",
                "Gemma4ForCausalLM",
                **{**_SMALL, **_GEMMA_4},
                layer_types=["sliding_attention", "full_attention"],
                attention_k_eq_v=True,
                num_global_key_value_heads=1,
                hidden_size_per_layer_input=0,
                enable_moe_block=True,
                num_experts=8,
                top_k_experts=2,
                moe_intermediate_size=256,
            ),
            "gemma4",
        ),
        Family(
            "Phi-3",
            "Phi-3, Phi-3.5, Phi-4",
            _build(
                "Phi3Config",
                "Phi3ForCausalLM",
                **_SMALL,
                original_max_position_embeddings=1024,
                sliding_window=None,
            ),
            "spm",
        ),
        Family("Phi-2", "Phi-1.5, Phi-2", _build("PhiConfig", "PhiForCausalLM", **_SMALL_MHA)),
        Family(
            "SmolLM3",
            "SmolLM3 3B",
            _build(
                "SmolLM3Config",
                "SmolLM3ForCausalLM",
                **{**_SMALL, "num_hidden_layers": 4, "tie_word_embeddings": True},
            ),
        ),
        Family("OLMo 2", "OLMo 2", _build("Olmo2Config", "Olmo2ForCausalLM", **_SMALL)),
        Family(
            "Granite",
            "Granite 3.x",
            _build(
                "GraniteConfig",
                "GraniteForCausalLM",
                **_SMALL,
                embedding_multiplier=2.0,
                logits_scaling=3.0,
                residual_multiplier=0.5,
                attention_multiplier=0.125,
            ),
            "spm",
        ),
        Family(
            "GPT-2",
            "GPT-2",
            _build(
                "GPT2Config", "GPT2LMHeadModel", n_embd=256, n_layer=2, n_head=4, n_positions=512
            ),
        ),
        Family(
            "GPT-NeoX",
            "Pythia, GPT-NeoX",
            _build(
                "GPTNeoXConfig", "GPTNeoXForCausalLM", **_SMALL, rotary_pct=0.25, hidden_act="gelu"
            ),
        ),
        Family(
            "Falcon",
            "Falcon 7B",
            _build(
                "FalconConfig",
                "FalconForCausalLM",
                hidden_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_kv_heads=1,
                multi_query=True,
                parallel_attn=True,
                new_decoder_architecture=False,
                alibi=False,
                bias=False,
                ffn_hidden_size=1024,
                max_position_embeddings=1024,
            ),
        ),
        Family(
            "Falcon 40B",
            "Falcon 40B, 180B",
            _build(
                "FalconConfig",
                "FalconForCausalLM",
                hidden_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_kv_heads=2,
                new_decoder_architecture=True,
                alibi=False,
                bias=False,
                ffn_hidden_size=1024,
                max_position_embeddings=1024,
            ),
        ),
        Family(
            "StableLM",
            "StableLM 2, StableLM Zephyr",
            _build("StableLmConfig", "StableLmForCausalLM", **_SMALL, partial_rotary_factor=0.25),
        ),
        Family(
            "Qwen3.5",
            "Qwen3.5 (linear attention hybrid)",
            _build(
                "Qwen3_5TextConfig",
                "Qwen3_5ForCausalLM",
                **{**_SMALL, "num_hidden_layers": 4},
                head_dim=64,
                linear_num_key_heads=2,
                linear_num_value_heads=4,
                linear_key_head_dim=32,
                linear_value_head_dim=32,
                layer_types=["linear_attention"] * 3 + ["full_attention"],
            ),
        ),
        Family(
            "LFM2",
            "LFM2",
            _build(
                "Lfm2Config",
                "Lfm2ForCausalLM",
                **{**_SMALL, "tie_word_embeddings": True},
                block_auto_adjust_ff_dim=False,
                layer_types=["conv", "full_attention"],
            ),
        ),
        Family(
            "Mamba-2",
            "Mamba-2, Codestral Mamba",
            _build(
                "Mamba2Config",
                "Mamba2ForCausalLM",
                hidden_size=256,
                num_hidden_layers=2,
                state_size=32,
                num_heads=8,
                head_dim=64,
                n_groups=2,
                expand=2,
                tie_word_embeddings=False,
            ),
        ),
    )
}
