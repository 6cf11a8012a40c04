"""Hidden states between blocks, and what Gemma 4's blocks leave for later ones beside them."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, write_checkpoint

from quantkit.errors import QuantkitError
from quantkit.model.blockwise import BlockwiseModel, load_model
from quantkit.model.offload import States


@pytest.mark.parametrize("room", [0, 1 << 20])
def test_what_is_put_is_got(tmp_path: Path, room: int) -> None:
    states = States(tmp_path / "states", room, "cpu")
    kept = {}
    for i in range(3):
        hidden, key = torch.randn(2, 5, 4), torch.randn(2, 1, 5, 8)
        kept[i] = hidden, {"full_attention": (key, 2 * key)} if i else {}
        states.put(i, torch.zeros(2, 5, 4), {})
        states.put(i, *kept[i])
    assert (tmp_path / "states").exists() == (room == 0)
    for i, (hidden, left) in kept.items():
        found, found_left = states.get(i, "cpu")
        assert found.equal(hidden) and found_left.keys() == left.keys()
        for name, tensors in left.items():
            assert all(a.equal(b) for a, b in zip(found_left[name], tensors, strict=True))
    states.clear()
    assert not (tmp_path / "states").exists()


def test_no_disk_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(QuantkitError, match="no disk space left"):
        States(tmp_path / "states", 0, "cpu").put(0, torch.zeros(3), {})


@pytest.mark.slow
@torch.no_grad()
def test_gemma_4_a_block_at_a_time(tmp_path: Path) -> None:
    """Its last blocks read keys and values of blocks before, and every batch has its own."""
    model = load_model(write_checkpoint(FAMILIES["Gemma 4"], tmp_path / "model"), torch.float32)
    batches = [torch.randint(10, 700, (2, 24)) for _ in range(2)]
    wanted = [model(input_ids=ids, use_cache=False).logits for ids in batches]
    blocks = BlockwiseModel(model)
    states = States(tmp_path / "states", 0, "cpu")
    for i, ids in enumerate(batches):
        states.put(i, blocks.trace(ids)[0], {})
    for index in range(len(blocks.blocks)):
        for i, ids in enumerate(batches):
            hidden, left = states.get(i, "cpu")
            call = blocks.trace(ids)[1][index]
            assert call.shared
            states.put(i, blocks.run_block(index, hidden, call.with_shared_kv(left)), left)
    for i, logits in enumerate(wanted):
        hidden, left = states.get(i, "cpu")
        assert left.keys() == {"sliding_attention", "full_attention"}
        torch.testing.assert_close(blocks.head(hidden), logits)
