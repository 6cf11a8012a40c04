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
from quantkit.statistics.stored import (
    block_file,
    load_fisher,
    load_statistics,
    save_fisher,
    save_statistics,
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


def test_statistics_round_trip(tmp_path: Path) -> None:
    module = Attention()
    collectors = {
        "train": collect(module, [torch.randn(2, 5, 24)]),
        "heldout": collect(module, [torch.randn(1, 4, 24)]),
    }
    path = block_file(tmp_path, 3)
    diagonals = save_statistics(path, collectors, in_blocks=True)
    loaded = load_statistics(path)
    assert [s.modules for s in loaded] == [("q", "k", "v"), ("o",), ("late",)]
    for s in loaded:
        group = s.modules[0]
        assert torch.equal(s.train, collectors["train"].means()[group])
        assert torch.equal(s.heldout, collectors["heldout"].means()[group])
        assert s.n_train == 10
    assert set(diagonals) == {"q", "k", "v", "o", "late"}
    assert np.array_equal(diagonals["k"].diagonal, collectors["train"].means()["q"].diagonal())
    assert diagonals["k"].n_tokens == 10 and diagonals["k"].in_blocks


def test_statistics_that_are_there_are_kept(tmp_path: Path) -> None:
    """A resumed run reads a finished block's file; its collectors are empty then."""
    module = Attention()
    both = {part: collect(module, [torch.randn(1, 4, 24)]) for part in ("train", "heldout")}
    path = block_file(tmp_path, 0)
    first = save_statistics(path, both, in_blocks=True)
    empty = {part: HessianCollector(linears(module)) for part in both}
    again = save_statistics(path, empty, in_blocks=True)
    assert all(np.array_equal(first[m].diagonal, again[m].diagonal) for m in first)


def test_a_module_that_only_met_train_tokens(tmp_path: Path) -> None:
    """As an expert that the router chose for no held-out token."""
    module = Attention()
    known = linears(module)
    train = collect(module, [torch.randn(1, 4, 24)], known)
    heldout = collect(module.q, [torch.randn(1, 4, 24)], known)
    diagonals = save_statistics(
        block_file(tmp_path, 0), {"train": train, "heldout": heldout}, in_blocks=True
    )
    assert "o" in diagonals
    loaded = {s.modules[0]: s for s in load_statistics(block_file(tmp_path, 0))}
    assert loaded["o"].is_judged_on_train and torch.equal(loaded["o"].heldout, loaded["o"].train)
    assert not loaded["q"].is_judged_on_train
    assert torch.equal(loaded["q"].heldout, heldout.means()["q"])


def test_fisher_round_trip(tmp_path: Path) -> None:
    fisher = Fisher({"a.b": torch.rand(5), "lm_head": torch.rand(9)}, torch.rand(9))
    save_fisher(tmp_path / "f.safetensors", fisher)
    loaded = load_fisher(tmp_path / "f.safetensors")
    assert set(loaded.modules) == {"a.b", "lm_head"}
    assert all(torch.equal(loaded.modules[k], v) for k, v in fisher.modules.items())
    assert torch.equal(loaded.frequency, fisher.frequency)
