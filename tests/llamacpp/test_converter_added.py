"""Which models are converted by a class of quantkit's own, decided from the config alone. That they
then compute the same is tested with the families.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantkit.llamacpp.converter.added import class_for, dense_llama4, unread, with_older_names
from quantkit.sandbox.untrusted import Settings


def llama4(**changes: Any) -> Settings:
    return Settings({"architectures": ["Llama4ForCausalLM"], "num_hidden_layers": 8, **changes})


def test_other_models_keep_the_converters_class() -> None:
    assert (
        dense_llama4(Settings({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}))
        is None
    )
    assert dense_llama4(llama4(num_local_experts=16)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"no_rope_layers": [1] * 8, "use_qk_norm": False},
        {"no_rope_layers": [0] * 8},
        {"no_rope_layer_interval": 3},
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="without experts"):
        dense_llama4(llama4(**changes))


def test_older_names_are_added_and_never_changed() -> None:
    rope = {"partial_rotary_factor": 0.25}
    found = with_older_names({"n_positions": 1024, "rope_parameters": rope})
    assert (found["n_ctx"], found["rotary_pct"]) == (1024, 0.25)
    assert with_older_names({"n_positions": 1024, "n_ctx": 7})["n_ctx"] == 7
    assert with_older_names({"hidden_size": 8}) == {"hidden_size": 8}


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("model.layers.1.mlp.weight", True),
        ("mtp.layers.0.mlp.weight", False),
        ("model.mtp.fc.weight", False),
        ("model.layers.2.eh_proj.weight", False),
    ],
)
def test_a_prediction_head_counts_only_when_it_is_there(
    tmp_path: Path, name: str, left_out: bool
) -> None:
    class Converter:
        supports_mtp_export = True
        no_mtp = False

    save_file({name: torch.zeros(1)}, tmp_path / "model.safetensors")
    assert class_for(tmp_path, Settings({"num_hidden_layers": 2}), Converter) is Converter
    assert Converter.no_mtp is left_out


def test_keys_and_values_that_gemma_4_shares_are_left_out() -> None:
    config = {"model_type": "gemma4_text", "num_hidden_layers": 4, "num_kv_shared_layers": 2}
    names = [
        f"model.layers.{i}.self_attn.{part}.weight"
        for i in range(4)
        for part in ("q_proj", "k_proj", "v_proj", "k_norm")
    ]
    names.append("model.vision_tower.encoder.layers.3.self_attn.k_proj.linear.weight")
    left_out = {n for n in names[:-1] if int(n.split(".")[2]) >= 2 and "q_proj" not in n}
    assert unread(names, config) == left_out
    assert unread(names, {"model_type": "gemma4", "text_config": config}) == left_out
    assert unread(names, config | {"num_kv_shared_layers": 0}) == set()
    assert unread(names, config | {"model_type": "llama"}) == set()
