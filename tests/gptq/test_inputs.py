"""What tensors are solved with: factorized once for all that share it; a tied table for both its
uses.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from quantkit.config import RunConfig
from quantkit.gptq.inputs import KnownInputs, modules_of, sibling_of
from quantkit.model.row_maps import RowMap
from quantkit.statistics.fisher import Fisher
from quantkit.statistics.hessian import HessianCollector
from quantkit.statistics.inputs import BlockStatistics, InputStatistics
from quantkit.statistics.stored import Gradients, sensitivity_of


@pytest.fixture
def known() -> KnownInputs:
    """Two inputs: q and k read one, o another."""
    linears = {name: torch.nn.Linear(n, 8) for name, n in (("q", 32), ("k", 32), ("o", 48))}
    collectors = {part: HessianCollector(dict(linears)) for part in ("train", "heldout")}
    for collector in collectors.values():
        with collector.watching():
            shared = torch.randn(1, 200, 32)
            linears["q"](shared), linears["k"](shared), linears["o"](torch.randn(1, 200, 48))
    statistics = BlockStatistics.of(collectors)
    maps = {n: RowMap(n, f"{n}.weight", False, None, n, False) for n in linears}
    gradients = Gradients(Fisher({}, torch.zeros(8)), statistics.inputs[0])
    return KnownInputs(statistics, tuple(linears), maps, RunConfig("m"), gradients)


def test_inputs_are_forgotten_after_their_last_tensor(known: KnownInputs) -> None:
    assert [tensors for _, tensors in known.groups] == [["q", "k"], ["o"]]
    with known.borrowed("q") as first:
        assert first is not None
        with known.borrowed("k") as second:
            assert second is first  # factorized once
        left = weakref.ref(first)
    del first, second
    gc.collect()
    assert left() is None
    with known.borrowed("o") as other:
        assert other is not None and len(other.train) == 48
    assert known.has("o") and not known.has("norm")
    with known.borrowed("norm") as nothing:
        assert nothing is None
    assert known.dampings() == ()


def hessians(module: str, seed: int) -> InputStatistics:
    """A train and a held-out Hessian of one module."""
    generator = torch.Generator().manual_seed(seed)
    collectors = {part: HessianCollector({}) for part in ("train", "heldout")}
    for collector in collectors.values():
        collector.add((module,), torch.randn(50, 16, generator=generator))
    (inputs,) = BlockStatistics.of(collectors).inputs
    return inputs


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("methods", [("gptq", "imatrix"), ("imatrix",)])
def test_a_tied_table_is_solved_for_both_uses(methods: tuple[str, ...], device: str) -> None:
    head, lookups = hessians("lm_head", 0), hessians("embed", 1)
    # Inputs are summed where the model is; the gradients come from a file.
    head = replace(head, train=head.train.to(device), heldout=head.heldout.to(device))
    prices = torch.tensor([0.1, 0.2, 0.3])
    gradients = Gradients(Fisher({"lm_head": prices}, torch.tensor([0.5, 0.5, 0.0])), lookups)
    tied = RowMap("token_embd.weight", "embed.weight", False, None, "lm_head", True)
    config, maps = RunConfig("m", methods=methods, device=device), {tied.tensor: tied}
    known = KnownInputs(BlockStatistics((head,)), [tied.tensor], maps, config, gradients)
    with known.borrowed(tied.tensor) as inputs:
        assert inputs is not None
        # llama.cpp's imatrix knows nothing of lookups, and has to find itself in ours.
        wanted = head.train
        if "gptq" in methods:
            wanted = 0.6 * head.train + lookups.train.to(device)
        assert torch.allclose(inputs.train, wanted)
        assert torch.allclose(inputs.heldout, head.heldout)
    sensitivity = sensitivity_of(gradients, tied, "cpu")
    assert sensitivity is not None and sensitivity.outputs is not None
    assert torch.equal(sensitivity.outputs, prices)
    assert sensitivity.lookups is not None and torch.equal(sensitivity.lookups, lookups.heldout)


def test_a_table_that_is_only_looked_up() -> None:
    lookups = hessians("embed", 1)
    gradients = Gradients(Fisher({}, torch.ones(3) / 3), lookups)
    table = RowMap("token_embd.weight", "embed.weight", False, None, "embed", True)
    statistics, maps = BlockStatistics((lookups,)), {table.tensor: table}
    known = KnownInputs(statistics, [table.tensor], maps, RunConfig("m"), gradients)
    with known.borrowed(table.tensor) as inputs:
        assert inputs is not None and torch.equal(inputs.train, lookups.train)
    sensitivity = sensitivity_of(gradients, table, "cpu")
    assert sensitivity is not None and sensitivity.outputs is None


def found(tensor: str, module: str, columns: torch.Tensor | None = None) -> RowMap:
    return RowMap(tensor, f"{module}.weight", False, None, module, False, columns=columns)


def test_what_is_not_found_borrows_from_what_reads_the_same() -> None:
    maps = {
        m.tensor: m
        for m in (
            found("blk.0.attn_q.weight", "q", torch.tensor([1, 0])),
            found("blk.0.attn_v.weight", "v"),
            found("blk.1.ffn_up.weight", "up"),
            found("blk.1.ffn_down.weight", "down"),
        )
    }
    assert sibling_of("blk.0.attn_k.weight", maps) == "blk.0.attn_v.weight", "columns in order"
    assert sibling_of("blk.1.ffn_gate.weight", maps) == "blk.1.ffn_up.weight"
    strangers = ("blk.0.ffn_gate.weight", "blk.1.attn_k.weight", "blk.1.attn_output.weight", "x")
    assert not any(sibling_of(name, maps) for name in strangers)
    assert modules_of([*maps, "blk.0.attn_k.weight", *strangers], maps) == {
        "blk.0.attn_q.weight": "q",
        "blk.0.attn_v.weight": "v",
        "blk.1.ffn_up.weight": "up",
        "blk.1.ffn_down.weight": "down",
        "blk.0.attn_k.weight": "v",
    }
