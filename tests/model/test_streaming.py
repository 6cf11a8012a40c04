"""Models that are streamed: the same numbers as those that are whole, one block at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from quantkit.errors import QuantkitError
from quantkit.model.blockwise import BlockwiseModel
from quantkit.model.streaming import open_model
from quantkit.statistics.fisher import output_fisher
from quantkit.statistics.hessian import HessianCollector

QUICK = ("Llama 3", "GPT-2", "Qwen3-MoE", "Mistral 3", "LFM2")  # tied, transposed, stacked, sees


def opened(
    folder: Path, memory: str, dtype: torch.dtype | str = "auto", n_beside: int = 0
) -> BlockwiseModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTKIT_MEMORY", memory)
        return open_model(folder, dtype, n_beside=n_beside)


def both(folder: Path, dtype: torch.dtype | str = "auto") -> tuple[BlockwiseModel, BlockwiseModel]:
    """The model whole, and streamed."""
    whole, streamed = (opened(folder, memory, dtype) for memory in ("1TB", "1kB"))
    assert streamed.is_streamed
    return whole, streamed


def is_empty(model: BlockwiseModel) -> bool:
    return all(p.is_meta for block in model.blocks for p in block.parameters())


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES],
)
def test_every_family(name: str, tmp_path: Path) -> None:
    """Weights, logits and hidden states are the same bits, and blocks are empty afterwards."""
    folder = write_checkpoint(FAMILIES[name], tmp_path / "model")
    ids = torch.randint(0, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    for dtype in ("auto", torch.float32):
        whole, streamed = both(folder, dtype)
        for parameter, values in whole.model.named_parameters():
            found = streamed.weight(parameter)
            assert found.dtype == values.dtype
            assert torch.equal(found, values), parameter
        with torch.no_grad():
            expected = whole.model(input_ids=ids, use_cache=False).logits
            assert torch.equal(streamed.model(input_ids=ids, use_cache=False).logits, expected)
        hidden, calls = streamed.trace(ids)
        for index, call in enumerate(calls):
            hidden = streamed.run_block(index, hidden, call)
        assert torch.equal(streamed.head(hidden), expected)
        assert is_empty(streamed)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(FAMILIES["Llama 3"], tmp_path_factory.mktemp("llama") / "model")


def test_shards(checkpoint: Path, tmp_path: Path) -> None:
    """The tensors of one block may lie in several files."""
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    table = {}
    for i, name in enumerate(tensors):
        table[name] = f"model-{i % 3}.safetensors"
    for file_name in set(table.values()):
        own = {n: t for n, t in tensors.items() if table[n] == file_name}
        save_file(own, tmp_path / file_name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": table}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    whole, streamed = both(tmp_path)
    for name, values in whole.model.named_parameters():
        assert torch.equal(streamed.weight(name), values)


def test_generation(checkpoint: Path) -> None:
    """Calibration text is written by the model's own `generate`."""
    found = []
    for model in both(checkpoint):
        torch.manual_seed(0)
        ids = torch.arange(5, 13).view(2, 4)
        found.append(model.model.generate(ids, max_new_tokens=8, do_sample=True, pad_token_id=0))  # type: ignore[operator]
    assert torch.equal(*found)


def test_gradients(checkpoint: Path) -> None:
    ids = torch.randint(0, 200, (5, 16), generator=torch.Generator().manual_seed(1))
    lookups = [{"train": HessianCollector({}), "heldout": HessianCollector({})} for _ in range(2)]
    whole, streamed = (
        output_fisher(model, ids, 3, own)
        for model, own in zip(both(checkpoint), lookups, strict=True)
    )
    assert list(whole.modules) == list(streamed.modules)
    assert all(torch.equal(whole.modules[name], streamed.modules[name]) for name in whole.modules)
    for part in ("train", "heldout"):
        one, other = (own[part].means()["model.embed_tokens"] for own in lookups)
        assert torch.equal(one, other)


def test_one_block_at_a_time(checkpoint: Path) -> None:
    """While a block is held no other is there, and it is read once."""
    _, model = both(checkpoint)
    assert len(model.blocks) > 1
    prepared: list[int] = []
    model.prepare_with(prepared.append)
    with model.holding(1), model.holding(1):
        assert [model.is_held(i) for i in (0, 1)] == [False, True]
        assert not any(p.is_meta for p in model.blocks[1].parameters())
        assert all(p.is_meta for p in model.blocks[0].parameters())
    assert prepared == [1]
    assert is_empty(model)


def test_what_is_put_into_a_block_lasts_as_long_as_it_is_held(checkpoint: Path) -> None:
    """And never reaches the file, which its weights are mapped from."""
    before = (checkpoint / "model.safetensors").read_bytes()
    _, model = both(checkpoint)
    with model.holding(0), torch.no_grad():
        for parameter in model.blocks[0].parameters():
            parameter.zero_()
        assert not any(p.any() for p in model.blocks[0].parameters())
    with model.holding(0):
        assert all(p.any() for p in model.blocks[0].parameters())
    assert (checkpoint / "model.safetensors").read_bytes() == before


def test_a_block_whose_run_fails_is_dropped(checkpoint: Path) -> None:
    _, model = both(checkpoint)
    with pytest.raises(ZeroDivisionError), model.holding(0):
        raise ZeroDivisionError
    assert is_empty(model)


def test_half_of_what_is_free(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    n = sum(p.numel() for p in model.parameters())
    assert opened(tmp_path, f"{4 * n + 4096}").is_streamed is False
    assert opened(tmp_path, f"{4 * n - 4096}").is_streamed is True
    assert opened(tmp_path, f"{4 * n + 4096}", torch.float32).is_streamed is True
    assert opened(tmp_path, f"{8 * n + 8192}", torch.float32).is_streamed is False
    assert opened(tmp_path, f"{4 * n + 4096}", n_beside=2 * n).is_streamed is False
    assert opened(tmp_path, f"{4 * n + 4096}", n_beside=2 * n + 8192).is_streamed is True


def test_a_tensor_that_is_not_there(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantkitError, match=r"lacks model\.norm\.weight"):
        opened(tmp_path, "1kB")
