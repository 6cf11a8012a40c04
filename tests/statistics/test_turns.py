"""The pass over the blocks: in turns where memory is short, and no further than it has to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st

from quantkit.model.blockwise import BlockwiseModel
from quantkit.statistics import collect
from quantkit.statistics.collect import HEAD, block_names, walk
from quantkit.statistics.inputs import BlockStatistics
from quantkit.statistics.turns import most_bytes, share_out

_ROOM = 600_000  # bytes: a few of the Hessians of these models


def model(family: str, dtype: torch.dtype = torch.float32) -> BlockwiseModel:
    torch.manual_seed(0)
    return BlockwiseModel(FAMILIES[family].build(64).to(dtype).requires_grad_(False).eval())


def tokens() -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, 64, (3, 512))
    return {"train": ids[:2], "heldout": ids[2:]}


def walked(
    family: str, spill: Path, done: tuple[str, ...] = (), dtype: torch.dtype = torch.float32
) -> tuple[dict[str, torch.Tensor], list[str], list[int]]:
    """All Hessians by module, part and expert; the names of units, and how many turns each took."""
    found: dict[str, torch.Tensor] = {}
    names, n_turns = [], []

    def use(name: str, turns: Iterable[BlockStatistics]) -> None:
        names.append(name)
        n_turns.append(0)
        for turn in turns:
            n_turns[-1] += 1
            for inputs in turn.inputs:
                for module in inputs.modules:
                    assert f"{module} train" not in found, "summed twice"
                    found[f"{module} train"] = inputs.train
                    found[f"{module} heldout"] = inputs.heldout
            for experts in turn.experts:
                for i in range(len(experts.train)):
                    for module in experts.modules:
                        key = f"{module} {experts.first + i}"
                        assert f"{key} train" not in found, "summed twice"
                        found[f"{key} train"] = experts.train[i]
                        found[f"{key} heldout"] = experts.heldout[i]
                        found[f"{key} tokens"] = torch.tensor(experts.n_tokens[i])

    walk(model(family, dtype), tokens(), done, use, spill / "states")
    return found, names, n_turns


@pytest.mark.parametrize("family", ["Llama 3", "Qwen3-MoE", "gpt-oss"])
def test_turns_change_nothing(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, names, n_turns = walked(family, tmp_path)
    assert names == block_names(len(names) - 1) and set(n_turns) == {1}
    monkeypatch.setattr(collect, "free_memory", lambda device="cpu": int(_ROOM / 0.4))
    parts, again, n_turns = walked(family, tmp_path)
    assert again == names and max(n_turns) > 1 == n_turns[-1]
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[key], whole[key]) for key in whole)


def test_experts_that_are_not_watched_compute_the_same(tmp_path: Path) -> None:
    """Products of 16 bits round otherwise when experts are multiplied one by one: a killed run must
    not go on from other states, whatever its config asks for.
    """
    whole, names, _ = walked("Mixtral", tmp_path, dtype=torch.bfloat16)
    found, left, _ = walked("Mixtral", tmp_path, tuple(names[:1]), torch.bfloat16)
    assert left == names[1:]
    assert all(torch.equal(found[key], whole[key]) for key in found) and found.keys() < whole.keys()


def test_what_is_done_is_only_run_forward(tmp_path: Path) -> None:
    whole, names, _ = walked("Llama 3", tmp_path)
    found, left, _ = walked("Llama 3", tmp_path, done=tuple(names[:1]))
    assert left == names[1:]
    assert all(torch.equal(found[key], whole[key]) for key in found) and found.keys() < whole.keys()
    found, left, _ = walked("Llama 3", tmp_path, done=(*names[1:-1], HEAD))
    assert left == names[:1]
    assert walked("Llama 3", tmp_path, done=tuple(names))[1] == []


@given(
    linears=st.lists(st.integers(1, 60), max_size=5),
    experts=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 60)), max_size=3),
    room=st.integers(0, 50_000),
)
def test_shares(linears: list[int], experts: list[tuple[int, int]], room: int) -> None:
    """Every group and expert once, no turn above the room but one that is a single Hessian."""
    plain = SimpleNamespace(widths={f"l{i}": n for i, n in enumerate(linears)})
    stacked = SimpleNamespace(
        widths={f"e{i}": n for i, (_, n) in enumerate(experts)},
        n_experts={f"e{i}": n for i, (n, _) in enumerate(experts)},
    )
    turns = share_out(plain, stacked, room)  # type: ignore[arg-type]
    assert sorted(g for t in turns for g in t.linears) == sorted(plain.widths)
    for group, n_experts in stacked.n_experts.items():
        met = [e for t in turns for e in t.experts_of(group, n_experts)]
        assert met == list(range(n_experts))
    for turn in turns:
        sizes = [8 * plain.widths[g] ** 2 for g in turn.linears]
        sizes += [8 * stacked.widths[g] ** 2 for g, own in turn.experts.items() for _ in own]
        assert sum(sizes) <= room or len(sizes) == 1


def test_the_bound_is_one() -> None:
    """What decides whether a block is looked at first is no less than what its Hessians take."""
    for family in ("Llama 3", "Qwen3-MoE", "gpt-oss", "GPT-2"):
        blockwise = model(family)
        n_bytes = 0

        def use(name: str, turns: Iterable[BlockStatistics]) -> None:
            nonlocal n_bytes
            for turn in turns:
                if name == "block-000":
                    n_bytes += sum(s.train.nbytes + s.heldout.nbytes for s in turn.inputs)
                    n_bytes += sum(s.train.nbytes + s.heldout.nbytes for s in turn.experts)

        walk(blockwise, tokens(), block_names(len(blockwise.blocks))[1:], use, Path("unused"))
        assert 0 < n_bytes <= most_bytes(blockwise.blocks[0])
