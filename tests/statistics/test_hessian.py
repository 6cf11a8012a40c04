"""Hessians collected by hooks, against xᵀx of inputs that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from quantkit.model.blockwise import BlockwiseModel
from quantkit.statistics.fisher import Fisher
from quantkit.statistics.hessian import HessianCollector, add_outer, is_linear, symmetrize
from quantkit.statistics.inputs import BlockStatistics, InputDiagonal
from quantkit.statistics.stored import (
    embedding_file,
    fisher_file,
    load_gradients,
    load_importances,
    save_gradients,
    save_importances,
)


class Attention(nn.Module):
    """q, k and v read one tensor; o another; `late` a copy equal to the first in every value."""

    def __init__(self, n: int = 24) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(n, n, bias=False) for _ in range(4))
        self.late = nn.Linear(n, n, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.q(x) + self.k(x) * self.v(x)) + self.late(x.clone())


def linears(module: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in module.named_modules() if is_linear(m)}


@pytest.mark.parametrize("n", [1, 31, 255, 256, 257, 600])
def test_sums_are_the_outer_products(n: int) -> None:
    """Over several batches, at widths around the 256-column panels."""
    generator = torch.Generator().manual_seed(n)
    batches = [torch.randn(rows, n, generator=generator) for rows in (1, 50, 7)]
    total = torch.zeros(n, n)
    for batch in batches:
        add_outer(total, batch)
    x = torch.cat(batches).double()
    wanted = x.T @ x
    found = symmetrize(total)
    assert torch.equal(found, found.T)
    assert torch.allclose(found.double(), wanted, atol=1e-5 * float(wanted.diagonal().max()))


def test_half_precision_inputs_are_summed_in_float32() -> None:
    """In bfloat16 a sum of 4096 ones would stop at 256."""
    total = torch.zeros(3, 3)
    add_outer(total, torch.ones(4096, 3, dtype=torch.bfloat16))
    assert torch.equal(symmetrize(total), torch.full((3, 3), 4096.0))


def collect(
    module: nn.Module, batches: list[torch.Tensor], known: dict[str, nn.Module] | None = None
) -> HessianCollector:
    collector = HessianCollector(linears(module) if known is None else known)
    for batch in batches:
        with collector.watching(), torch.no_grad():
            module(batch)
    return collector


def test_modules_that_read_one_tensor_share_and_others_do_not() -> None:
    module = Attention()
    batches = [torch.randn(2, 5, 24), torch.randn(3, 7, 24)]
    collector = collect(module, batches)
    groups = {frozenset(members) for members in collector.members.values()}
    assert groups == {frozenset("qkv"), frozenset(["o"]), frozenset(["late"])}
    assert set(collector.n_tokens.values()) == {2 * 5 + 3 * 7}
    x = torch.cat([batch.flatten(0, 1) for batch in batches])
    means = collector.means()
    assert torch.allclose(means["q"], x.T @ x / 31, rtol=1e-4, atol=1e-5)
    assert torch.allclose(means["q"], means["late"])
    with torch.no_grad():
        y = module.q(x) + module.k(x) * module.v(x)
    assert torch.allclose(means["o"], y.T @ y / 31, rtol=1e-4, atol=1e-5)


def test_the_same_address_in_the_next_batch_is_another_input() -> None:
    """A batch freed and its memory reused between calls must not merge two groups."""
    module = Attention()
    collector = HessianCollector(linears(module))
    for seed in range(5):
        batch = torch.randn(1, 9, 24, generator=torch.Generator().manual_seed(seed))
        with collector.watching(), torch.no_grad():
            module(batch)
        del batch
    assert len(collector.sums) == 3 and collector.n_tokens["q"] == 45


def test_hooks_are_gone_afterwards_even_when_the_pass_fails() -> None:
    module = Attention()
    collector = HessianCollector(linears(module))
    with pytest.raises(RuntimeError), collector.watching():
        module(torch.randn(2, 5, 23))
    assert not any(m._forward_pre_hooks for m in module.modules())


def test_transposed_linears_count_their_inputs() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.proj = Conv1D(20, 8), Conv1D(8, 20)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(self.fc(x).relu())

    x = torch.randn(1, 30, 8)
    collector = collect(Mlp(), [x])
    assert {name: len(h) for name, h in collector.means().items()} == {"fc": 8, "proj": 20}


def test_a_real_block_shares_as_llama_does() -> None:
    """q, k, v; gate, up; o; down: four distinct inputs of 64, 64, 64 and 128 columns."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = BlockwiseModel(LlamaForCausalLM(config).eval())
    ids = torch.randint(0, 100, (2, 16))
    hidden, calls = model.trace(ids)
    known = {f"b.{n}": m for n, m in linears(model.blocks[1]).items()}
    collector = HessianCollector(known)
    with torch.no_grad():
        hidden = model.run_block(0, hidden, calls[0])
        with collector.watching():
            model.run_block(1, hidden, calls[1])
    short = {tuple(name.rsplit(".", 1)[1] for name in m) for m in collector.members.values()}
    assert short == {
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
    }
    assert sorted(len(h) for h in collector.means().values()) == [64, 64, 64, 128]


def test_statistics_of_a_block() -> None:
    module = Attention()
    parts = {"train": [torch.randn(2, 5, 24)], "heldout": [torch.randn(1, 4, 24)]}
    found = BlockStatistics.of({part: collect(module, xs) for part, xs in parts.items()})
    assert [s.modules for s in found.inputs] == [("q", "k", "v"), ("o",), ("late",)]
    modules = tuple(module for inputs in found.inputs for module in inputs.modules)
    assert modules == ("q", "k", "v", "o", "late") and not found.experts
    for part, (x,) in parts.items():
        rows = x.reshape(-1, 24)
        assert torch.allclose(getattr(found.inputs[0], part), rows.T @ rows / len(rows), atol=1e-6)
    diagonals = found.diagonals()
    assert set(diagonals) == set(modules)
    assert np.array_equal(diagonals["k"].diagonal, found.inputs[0].train.diagonal())
    assert diagonals["k"].n_tokens == 10 == found.inputs[0].n_train


def test_a_module_that_only_met_train_tokens() -> None:
    """As an expert that the router chose for no held-out token."""
    module = Attention()
    known = linears(module)
    train = collect(module, [torch.randn(1, 4, 24)], known)
    heldout = collect(module.q, [torch.randn(1, 4, 24)], known)
    found = BlockStatistics.of({"train": train, "heldout": heldout})
    assert "o" in found.diagonals()
    inputs = {s.modules[0]: s for s in found.inputs}
    assert inputs["o"].is_judged_on_train and inputs["o"].heldout is inputs["o"].train
    assert not inputs["q"].is_judged_on_train
    assert not torch.equal(inputs["q"].heldout, inputs["q"].train)


def test_importances_round_trip(tmp_path: Path) -> None:
    made = {
        "blk.0.attn_q.weight": InputDiagonal(np.arange(4, dtype=np.float32), 70_000),
        "blk.0.ffn_up_exps.weight": InputDiagonal(np.ones((2, 4), np.float32), np.float32([3, 0])),
    }
    save_importances(tmp_path / "b", made)
    loaded = load_importances(tmp_path / "b")
    assert set(loaded) == set(made)
    for name, wanted in made.items():
        assert np.array_equal(loaded[name].diagonal, wanted.diagonal)
        assert np.array_equal(loaded[name].n_tokens, np.atleast_1d(wanted.n_tokens))


def test_gradients_round_trip(tmp_path: Path) -> None:
    fisher = Fisher({"a.b": torch.rand(5), "lm_head": torch.rand(9)}, torch.rand(9))
    lookups = {part: HessianCollector({}) for part in ("train", "heldout")}
    rows = {part: torch.randn(7, 6) for part in lookups}
    for part, collector in lookups.items():
        collector.add(("embed",), rows[part])
    save_gradients(tmp_path, fisher, lookups)
    loaded = load_gradients(fisher_file(tmp_path), embedding_file(tmp_path))
    assert set(loaded.fisher.modules) == {"a.b", "lm_head"}
    assert all(torch.equal(loaded.fisher.modules[k], v) for k, v in fisher.modules.items())
    assert torch.equal(loaded.fisher.frequency, fisher.frequency)
    assert loaded.lookups.modules == ("embed",) and loaded.lookups.n_train == 7
    for part, x in rows.items():
        assert torch.allclose(getattr(loaded.lookups, part), x.T @ x / 7, atol=1e-6)
