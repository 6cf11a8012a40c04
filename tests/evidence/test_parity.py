"""base.gguf against the model that transformers loads: what is right passes, what is not stops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from enliven import enliven
from safetensors.torch import load_file, save_file
from tiny_models import save_model
from transformers import LlamaConfig, LlamaForCausalLM

from quantkit.errors import QuantkitError
from quantkit.evidence import parity
from quantkit.evidence.parity import Original, check_logits
from quantkit.gguf_file.read import GgufFile
from quantkit.llamacpp.converter.convert import convert
from quantkit.model.unmapped import reason_of


class Made:
    """A checkpoint and its base.gguf."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
        )
        model = LlamaForCausalLM(config).requires_grad_(False)
        enliven(model)
        self.model = save_model(folder / "Tiny", model.to(torch.bfloat16), "spm")
        result = convert(self.model, folder / "base.gguf")
        self.base, self.ids = GgufFile(folder / "base.gguf"), result.tokens.ids

    def broken(self, path: Path, tensor: str, rows: slice) -> GgufFile:
        """A copy with some rows of a tensor in reverse."""
        shutil.copyfile(self.base.path, path)
        stored = self.base.tensors[tensor]
        packed = np.memmap(path, np.uint8, "r+", stored.offset, self.base.packed(tensor).shape)
        packed[rows] = packed[rows][::-1].copy()
        packed.flush()
        return GgufFile(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("parity"))


def test_a_right_file_passes(made: Made, tmp_path: Path) -> None:
    originals = [Original("transformers", made.model)]
    check, found = check_logits(made.base, made.ids, originals, tmp_path)
    assert check.passed and check.about.endswith("over 128 tokens, by transformers")
    assert found["agreement"].mean_kl < 5e-4 and found["first"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["parity.log"]


@pytest.mark.parametrize("tensor", ["blk.1.attn_k.weight", "blk.0.ffn_down.weight"])
def test_a_few_wrong_rows_stop_the_run(made: Made, tmp_path: Path, tensor: str) -> None:
    """They are all found in the model, in another order: only logits tell."""
    wrong = made.broken(tmp_path / "wrong.gguf", tensor, slice(0, 16))
    originals = [Original("transformers", made.model)]
    with pytest.raises(QuantkitError, match=r"not the model .* mean KL .*, first at token \d"):
        check_logits(wrong, made.ids, originals, tmp_path)


def test_what_does_not_fit_is_read_from_disk(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "free_memory", lambda: 500_000)
    originals = [Original("transformers", made.model)]
    check, _ = check_logits(made.base, made.ids, originals, tmp_path)
    assert check.passed
    assert check.about.endswith("over 64 tokens, by transformers by disk offload, 64 tokens")
    assert [path.name for path in tmp_path.iterdir()] == ["parity.log"]


def test_no_comparison_is_a_failed_check(made: Made, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    originals = [Original("transformers", empty)]
    check, _ = check_logits(made.base, made.ids, originals, tmp_path)
    assert check.passed is False and check.about.startswith("not compared: transformers: ")
    check, _ = check_logits(made.base, (), originals, tmp_path)
    assert check.passed is False and "fewer than two tokens" in check.about


def test_the_next_oracle_is_named(made: Made, tmp_path: Path) -> None:
    """Packed weights that transformers needs another package for, and their expanded copy."""
    packed = tmp_path / "packed"
    shutil.copytree(made.model, packed)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 64}
    (packed / "config.json").write_text(json.dumps(config))
    originals = [Original("transformers", packed), Original(parity.COPY, made.model)]
    check, _ = check_logits(made.base, made.ids, originals, tmp_path)
    assert check.passed
    assert f"by {parity.COPY}; transformers: " in check.about


def test_weights_drawn_at_random_are_no_oracle(made: Made, tmp_path: Path) -> None:
    lacking = tmp_path / "lacking"
    shutil.copytree(made.model, lacking)
    path = lacking / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(QuantkitError, match=r"lacks weights.*: model\.norm\.weight"):
        check_logits(made.base, made.ids, [Original("transformers", lacking)], tmp_path)


@pytest.mark.parametrize("starts_at_zero", [True, False])
def test_peft_judges_adapters(made: Made, tmp_path: Path, starts_at_zero: bool) -> None:
    """A LoRA whose B is zero leaves the base as it is; any other does not."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=starts_at_zero)
    model = LlamaForCausalLM.from_pretrained(made.model)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    originals = [Original("PEFT on transformers", made.model, tmp_path / "adapter")]
    if starts_at_zero:
        check, _ = check_logits(made.base, made.ids, originals, tmp_path)
        assert check.passed and check.about.endswith("by PEFT on transformers")
    else:
        with pytest.raises(QuantkitError, match="by PEFT on transformers"):
            check_logits(made.base, made.ids, originals, tmp_path)


def test_logits_that_are_no_numbers_stop_the_run(made: Made) -> None:
    found = {"oracle": "transformers", "passed_over": [], "not_finite": True}
    with pytest.raises(QuantkitError, match="not finite numbers"):
        parity.judged(made.base, found)


def test_a_prediction_head_is_missed_for_a_reason() -> None:
    about = {
        "general.architecture": "glm4moe",
        "glm4moe.block_count": 47,
        "glm4moe.nextn_predict_layers": 1,
    }
    assert "prediction head" in (reason_of(about, "blk.46.attn_q.weight") or "")
    assert reason_of(about, "blk.45.attn_q.weight") is None
    assert reason_of(about, "token_embd.weight") is None
    assert reason_of({"general.architecture": "llama"}, "blk.0.attn_q.weight") is None
