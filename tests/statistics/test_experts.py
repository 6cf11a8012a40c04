"""Hessians and prices of experts, against what their router and their weights say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from triton_marks import INTERPRETED

from quantkit.model.blockwise import BlockwiseModel
from quantkit.model.streaming import open_model
from quantkit.planning.cost import _hessian_bytes
from quantkit.statistics.experts import ExpertCollector, ExpertProducts, grouped_experts
from quantkit.statistics.fisher import output_fisher
from quantkit.statistics.hessian import (
    HessianCollector,
    add_outers,
    is_linear,
    symmetrize,
)
from quantkit.statistics.inputs import BlockStatistics

N = 32  # columns of the experts' inputs
SIZES = {
    "vocab_size": 60,
    "hidden_size": N,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}
QWEN = Qwen3MoeConfig(
    **SIZES, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True
)
MODELS = {
    "qwen3": (Qwen3MoeForCausalLM, QWEN),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**SIZES, intermediate_size=16)),
    "gpt-oss": (
        GptOssForCausalLM,
        GptOssConfig(**SIZES, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2),
    ),
    "llama4": (
        Llama4ForCausalLM,
        Llama4TextConfig(
            **SIZES, intermediate_size=16, intermediate_size_mlp=16, num_local_experts=4
        ),
    ),
}


def build(name: str) -> BlockwiseModel:
    torch.manual_seed(0)
    kind, config = MODELS[name]
    model: PreTrainedModel = kind(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # so that no product is nearly nothing
        parameter.copy_(torch.randn_like(parameter) / 4)
    return BlockwiseModel(model)


@contextmanager
def spied(block: nn.Module) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """What the experts of a block are called with: hidden states and, of those that are routed
    inside, the choices.
    """
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    owner = next(
        m for m in block.modules() if any(p.dim() == 3 for p in m.parameters(recurse=False))
    )
    handle = owner.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    yield seen
    handle.remove()


def run(
    model: BlockwiseModel, collector: ExpertCollector, seed: int = 1, n: int = 24
) -> torch.Tensor:
    ids = torch.randint(0, 60, (2, n), generator=torch.Generator().manual_seed(seed))
    hidden, calls = model.trace(ids)
    with torch.no_grad(), collector.watching():
        return model.run_block(0, hidden, calls[0])


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "gpt-oss"])
def test_a_config_that_asks_for_more_than_logits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fine-tunes are saved with what their training asked for."""
    kind, config = MODELS[name]
    torch.manual_seed(0)
    model = kind(config).eval().requires_grad_(False)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 60, (2, 8))
    wanted = model(ids, use_cache=False).logits
    asked = {"output_router_logits": True, "output_hidden_states": True, "return_dict": False}
    asked["attn_implementation"] = "flash_attention_2"
    told = json.loads((tmp_path / "config.json").read_text()) | asked
    (tmp_path / "config.json").write_text(json.dumps(told))
    for memory in ("1TB", "1kB"):  # whole, and streamed
        monkeypatch.setenv("QUANTKIT_MEMORY", memory)
        cut = open_model(tmp_path, torch.float32)
        assert cut.is_streamed == (memory == "1kB")
        hidden, calls = cut.trace(ids)
        for index, call in enumerate(calls):
            with cut.holding(index):
                hidden = cut.run_block(index, hidden, call)
        assert torch.allclose(cut.head(hidden), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "gpt-oss"])
def test_an_expert_sees_the_tokens_that_its_router_sends(name: str) -> None:
    model = build(name)
    collector = ExpertCollector(model.blocks[0], "b", 48, lent=0)
    with spied(model.blocks[0]) as seen:
        run(model, collector)
    (hidden, chosen) = seen[0]
    group = next(g for g in collector.sums if "gate_up" in g)
    n_experts = len(collector.sums[group])
    counts = [(chosen == e).any(1).sum().item() for e in range(n_experts)]
    assert collector.n_tokens[group].tolist() == counts and sum(counts) == chosen.numel()
    means = collector.means()
    for expert in range(n_experts):
        x = hidden[(chosen == expert).any(1)].double()
        if len(x):
            assert torch.allclose(means[group][expert].double(), x.T @ x / len(x), atol=1e-5)


def test_experts_that_are_handed_all_tokens_count_their_own() -> None:
    """Llama 4 multiplies with 0 what is not for an expert."""
    model = build("llama4")
    collector = ExpertCollector(model.blocks[0], "b", 48)
    with spied(model.blocks[0]) as seen:
        run(model, collector)
    x = seen[0][0].view(4, -1, N)
    wanted = (x != 0).any(2).sum(1)
    group = next(g for g in collector.sums if "gate_up" in g)
    assert torch.equal(collector.n_tokens[group], wanted.float())
    assert 0 < wanted.min() and wanted.sum() == 48
    own = x[2][(x[2] != 0).any(1)]
    assert torch.allclose(collector.means()[group][2], own.T @ own / len(own), atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_input_of_down_is_what_the_expert_made(name: str) -> None:
    """Its Hessian is as wide as the expert, and its tokens are as many as those of gate and up."""
    model = build(name)
    collector = ExpertCollector(model.blocks[0], "b", 48)
    run(model, collector)
    up, down = sorted(collector.sums, key=lambda g: "down" in g)
    assert collector.sums[down].shape[1:] == (16, 16)
    assert torch.equal(collector.n_tokens[up], collector.n_tokens[down])
    assert bool((collector.means()[down].diagonal(dim1=1, dim2=2).sum(1) > 0).all())


@pytest.mark.parametrize("name", MODELS)
def test_watching_changes_no_output_and_leaves_nothing_behind(name: str) -> None:
    model = build(name)
    ids = torch.randint(0, 60, (1, 12), generator=torch.Generator().manual_seed(1))
    before = model.model.config._experts_implementation_internal
    with torch.no_grad():
        plain = model.model(ids).logits
        collector = ExpertCollector(model.blocks[0], "b", 48)
        with collector.watching():
            watched = model.model(ids).logits
    assert torch.allclose(plain, watched, atol=1e-5)
    assert model.model.config._experts_implementation_internal == before
    assert not any(m._forward_pre_hooks for m in model.model.modules())
    count = next(iter(collector.n_tokens.values())).sum()
    model.model(ids)
    assert next(iter(collector.n_tokens.values())).sum() == count


def test_gate_and_up_in_parameters_of_their_own_share() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = (nn.Parameter(torch.randn(3, 5, 8)) for _ in range(2))
            self.down = nn.Parameter(torch.randn(3, 8, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = torch.zeros_like(x)
            for e in range(3):
                own = x[e::3]
                out[e::3] = F.linear(
                    F.linear(own, self.gate[e]) * F.linear(own, self.up[e]), self.down[e]
                )
            return out

    collector = ExpertCollector(Experts(), "b", 10)
    with torch.no_grad(), collector.watching():
        collector._block(torch.randn(10, 8))
    assert set(collector.members.values()) == {("b.gate", "b.up"), ("b.down",)}
    assert collector.n_tokens["b.gate"].tolist() == [4, 3, 3]


def starve(model: BlockwiseModel, expert: int) -> None:
    """Make the router never choose an expert."""
    router = model.blocks[0].mlp.gate
    router.weight[expert] = 0
    original = router.forward

    def forward(hidden: torch.Tensor) -> object:
        logits, _, _ = original(hidden)
        logits[:, expert] = -1e4
        top = logits.softmax(-1).topk(2, -1)
        return logits, top.values, top.indices

    router.forward = forward


def test_an_expert_without_tokens_is_lent_some() -> None:
    model = build("qwen3")
    starve(model, 3)
    collectors = {part: ExpertCollector(model.blocks[0], "b", 48) for part in ("train", "heldout")}
    for part, collector in collectors.items():
        run(model, collector, seed=len(part))
    counts = collectors["train"].n_tokens["b.mlp.experts.down_proj"].clone()
    assert counts[3] == 0 and bool((counts[[0, 1, 2, 4, 5, 6, 7]] > 0).all())
    found = BlockStatistics.of({part: HessianCollector({}) for part in collectors}, collectors)
    diagonals = found.diagonals()
    for statistics in found.experts:
        group = statistics.modules[0]
        assert np.flatnonzero(2 * statistics.n_tokens < statistics.weights).tolist() == [3]
        train, heldout = statistics.train[3], statistics.heldout[3]
        assert bool((train.diagonal() > 0).all()) and not torch.equal(train, heldout)
        assert np.array_equal(diagonals[group].diagonal[3], train.diagonal().numpy())
        assert torch.linalg.matrix_rank(train) > 1
    assert np.array_equal(diagonals["b.mlp.experts.down_proj"].n_tokens, counts)


def test_the_plan_knows_what_they_take() -> None:
    """Two Hessians for every expert and input."""
    model = build("qwen3")
    collectors = {part: ExpertCollector(model.blocks[0], "b", 48) for part in ("train", "heldout")}
    for collector in collectors.values():
        run(model, collector)
    found = BlockStatistics.of({part: HessianCollector({}) for part in collectors}, collectors)
    shapes = ((8, 16, N), (8, N, 16))  # gate and down, as GGUF has them
    expected = sum(_hessian_bytes(SimpleNamespace(shape=shape)) for shape in shapes)
    assert expected == 2 * 4 * 8 * (32 * 32 + 16 * 16)
    assert sum(s.train.nbytes + s.heldout.nbytes for s in found.experts) == expected


def test_what_is_lent_hardly_changes_an_expert_with_tokens() -> None:
    """60 tokens are lent to each of 8 experts, and count 6 beside 120 of its own."""
    model = build("qwen3")
    with_lent, without = (ExpertCollector(model.blocks[0], "b", 480, lent) for lent in (6, 0))
    for collector in (with_lent, without):
        run(model, collector, n=240)
    group = "b.mlp.experts.gate_up_proj"
    added = with_lent.weights[group] - without.weights[group]
    assert torch.allclose(added, torch.full((8,), 6.0), atol=1e-3)
    one, other = with_lent.means()[group], without.means()[group]
    change = (one - other).flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1)
    assert 0 < change.min() and change.max() < 0.2


def test_prices_of_experts_are_their_output_gradients() -> None:
    """The Fisher information of a stacked weight, against that of linear layers with the same
    weights.
    """

    class Loop(nn.Module):
        """The experts of Qwen3 as linear layers."""

        def __init__(self, stacked: nn.Module) -> None:
            super().__init__()
            up, down = stacked.gate_up_proj, stacked.down_proj
            self.ups, self.downs = (
                nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights)
                for weights in (up, down)
            )
            for layers, weights in ((self.ups, up), (self.downs, down)):
                for layer, weight in zip(layers, weights, strict=True):
                    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)

        def forward(
            self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
        ) -> torch.Tensor:
            out = torch.zeros_like(x)
            for expert, (up, down) in enumerate(zip(self.ups, self.downs, strict=True)):
                token, at = torch.where(chosen == expert)
                gate, own = up(x[token]).chunk(2, -1)
                out = out.index_add(0, token, down(F.silu(gate) * own) * weights[token, at, None])
            return out

    model = build("qwen3")
    ids = torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(3))
    stacked = output_fisher(model, ids, seed=0).modules
    mlp = model.blocks[0].mlp
    mlp.experts = Loop(mlp.experts)
    looped = output_fisher(model, ids, seed=0).modules
    for stack, layers in (("gate_up_proj", "ups"), ("down_proj", "downs")):
        found = stacked[f"model.layers.0.mlp.experts.{stack}"].view(8, -1)
        for expert in range(8):
            wanted = looped[f"model.layers.0.mlp.experts.{layers}.{expert}"]
            assert torch.allclose(found[expert], wanted, rtol=1e-3, atol=1e-9)
    assert torch.allclose(stacked["lm_head"], looped["lm_head"], rtol=1e-4)


def test_only_products_with_the_given_parameters_are_seen() -> None:
    known, other = (nn.Parameter(torch.randn(2, 4, 4)) for _ in range(2))
    seen = []
    with (
        ExpertProducts({"known": known}, lambda p: seen.append((p.parameter, p.first))),
        torch.no_grad(),
    ):
        x = torch.randn(3, 4)
        F.linear(x, other[1])
        x @ known[0].T
        torch.mm(x, known[torch.tensor(1)])
        F.linear(x, torch.randn(4, 4))
        x @ known[1][:2].T  # half of an expert's rows
    assert seen == [("known", 0), ("known", 1), ("known", 1)]


def test_grouped_experts_are_put_back_when_the_pass_fails() -> None:
    model = build("qwen3").model
    model.config._experts_implementation_internal = "eager"
    before = model.config._experts_implementation_internal
    with pytest.raises(RuntimeError), grouped_experts(model):
        assert model.config._experts_implementation_internal == "grouped_mm"
        raise RuntimeError
    assert model.config._experts_implementation_internal == before


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "gpt-oss"])
def test_grouped_products_give_what_a_loop_over_experts_does(name: str) -> None:
    """Hidden states, Hessians, token counts and what is lent, of some experts alone, too."""
    found = []
    for implementation in ("grouped_mm", "eager"):
        model = build(name)
        model.model.config._experts_implementation_internal = implementation
        some = ExpertCollector(model.blocks[0], "b", 48, wanted=lambda group, n: range(1, n - 1))
        with pytest.MonkeyPatch.context() as patch:
            if implementation == "eager":
                patch.setattr("quantkit.statistics.experts.grouped_experts", nullcontext)
            hidden = run(model, some)
        found.append((hidden, some.weights, some.n_tokens, some.members, some.means()))
    (hidden, *counts, members, means), (looped, *theirs, same, wanted) = found
    assert torch.allclose(hidden, looped, atol=1e-5) and members == same
    for ours, loops in zip(counts, theirs, strict=True):
        assert all(torch.allclose(ours[group], loops[group]) for group in loops)
    for group, hessians in wanted.items():
        assert len(hessians) == len(means[group]) > 1
        assert torch.allclose(means[group], hessians, rtol=1e-4, atol=1e-5)


@INTERPRETED
def test_the_kernel_sums_what_a_loop_does() -> None:
    from quantkit.statistics import kernels_cuda

    x = torch.randn(90, 150, generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([3, 3, 70, 90])  # rows before the third belong to none of them
    ours, loops = torch.ones(3, 150, 150), torch.ones(3, 150, 150)
    kernels_cuda.add_outers(ours, x, bounds, 0.25)
    add_outers(loops, x, bounds, 0.25)
    assert torch.allclose(symmetrize(ours), symmetrize(loops), rtol=1e-5, atol=1e-5)
    exact = 1 + 0.25 * x[3:70].T @ x[3:70]
    assert bool((ours[0] == 1).all()) and torch.allclose(ours[1], exact, rtol=1e-5, atol=1e-5)


def test_linears_beside_the_experts_are_collected_too() -> None:
    model = build("qwen3")
    linears = {n: m for n, m in model.blocks[0].named_modules() if is_linear(m)}
    plain, experts = HessianCollector(linears), ExpertCollector(model.blocks[0], "b", 48)
    ids = torch.randint(0, 60, (1, 9), generator=torch.Generator().manual_seed(1))
    hidden, calls = model.trace(ids)
    with torch.no_grad(), plain.watching(), experts.watching():
        model.run_block(0, hidden, calls[0])
    assert {"self_attn.q_proj", "self_attn.o_proj"} <= plain.sums.keys()
    assert set(plain.n_tokens.values()) == {9}
    assert len(experts.sums) == 2
