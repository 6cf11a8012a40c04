"""The scales that `dev/experiments/activation_scales.py` moves leave the function as it is."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

SCRIPT = Path(__file__).parents[2] / "dev" / "experiments" / "activation_scales.py"
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("activation_scales", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def make(kind: str) -> torch.nn.Module:
    """A model whose norms and biases are not what they begin as."""
    torch.manual_seed(1)
    of = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}
    model, config = of[kind]
    made = model(config(**SIZES)).double().eval()
    for parameter in made.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 2)
    return made


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_moved_scales_leave_the_outputs(script: ModuleType, kind: str) -> None:
    """In float64 to rounding; with powers of two to the bit, but for sums in another order."""
    model, ids = make(kind), torch.arange(48)[None]
    before = model(ids).logits.detach()
    places = script.places_of(model)
    assert len(places) == 8
    scales = {}
    for place in places:
        n = dict(model.named_parameters())[place.writers[0]].shape[0]
        scales[place.name] = torch.exp(torch.randn(n, dtype=torch.float64))
    script.move(model, places, scales)
    after = model(ids).logits.detach()
    assert (after - before).abs().max() < 1e-12 * before.abs().max()
    with script.rounding(model, script.groups_of(model, ("attn", "ffn"), 32)):
        assert (model(ids).logits - after).abs().max() > 1e-6


def test_rounded_is_what_ggml_stores(script: ModuleType) -> None:
    """Of Q8_0, whose rows ggml makes and reads; groups of 256 are within half a step."""
    from quantkit.ggml import native
    from quantkit.ggml.types import QuantType

    x = torch.randn(6, 512) * torch.exp(torch.randn(6, 512))
    kind = QuantType("Q8_0")
    expected = native.dequantize(native.quantize(x.numpy(), kind, None), kind)
    found = script.rounded(x, 32)
    equal = (found == torch.from_numpy(expected)).float().mean()
    assert equal > 0.999  # ties of halves fall either way
    largest = x.unflatten(-1, (-1, 256)).abs().amax(-1, keepdim=True)
    off = (script.rounded(x, 256) - x).unflatten(-1, (-1, 256)).abs()
    assert bool((off <= largest / 254 * 1.0001).all())


def test_best_scale_costs_less(script: ModuleType) -> None:
    """One loud channel in each group is what a scale is for: most of the cost goes."""
    torch.manual_seed(2)
    x = torch.randn(200, 64)
    x[:, ::32] *= 50
    seen = script.Seen.of(x, torch.randn(200, 64), torch.randn(48, 64), torch.ones(48))
    place = script.Place("0.attn", (), ())
    scale, before, after = script.best_scale(seen, place, (32, 32), 0.0)
    assert after[0] < 0.05 * before[0]
    assert scale[::32].min() > scale[1:32].max()
    _, _, weighed = script.best_scale(seen, place, (32, 32), 1.0)
    assert weighed[1] < after[1]
