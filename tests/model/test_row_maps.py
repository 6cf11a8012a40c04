"""Row maps: GGUF rows made from a model's weights by known permutations, found again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from quantkit.ggml.types import BF16, F16, F32, QuantType
from quantkit.model.row_maps import (
    RowMap,
    RowMatcher,
    load_row_maps,
    row_digests,
    save_row_maps,
)
from quantkit.tensors import TensorSpec

_CAST = {BF16: torch.bfloat16, F16: torch.float16, F32: torch.float32}


def llama(tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype).requires_grad_(False)


def stored(
    rows: torch.Tensor, qtype: QuantType = BF16, name: str = "t"
) -> tuple[TensorSpec, np.ndarray]:
    """Rows as base.gguf would hold them."""
    packed = rows.to(_CAST[qtype]).contiguous().view(torch.uint8).numpy()
    return TensorSpec(name, tuple(rows.shape), qtype, True), packed.reshape(len(packed), -1)


def match(model: nn.Module, rows: torch.Tensor, qtype: QuantType = BF16) -> RowMap | None:
    return RowMatcher(model).match(*stored(rows, qtype))  # type: ignore[arg-type]


def gathered(map_: RowMap, model: nn.Module) -> torch.Tensor:
    """The rows that a map says a tensor has."""
    return map_.gather(model.get_parameter(map_.parameter))


@pytest.mark.parametrize("qtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whole_weights_are_the_identity(qtype: QuantType, dtype: torch.dtype) -> None:
    model = llama(dtype=dtype)
    matcher = RowMatcher(model)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            found = matcher.match(*stored(weight, qtype, name))
            module = name.removesuffix(".weight")
            lookup = module == "model.embed_tokens"
            assert found == RowMap(name, name, False, None, module, lookup)


@examples(25)
@given(seed=st.integers(0, 2**32 - 1))
def test_permuted_rows_are_found(seed: int) -> None:
    """As the converter permutes q and k for RoPE; here by any permutation."""
    model = llama()
    weight = model.model.layers[1].self_attn.q_proj.weight
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))
    found = match(model, weight[order])
    assert found is not None and found.rows is not None
    assert torch.equal(found.rows, order)
    assert found.module == "model.layers.1.self_attn.q_proj"


def test_a_part_of_a_fused_weight() -> None:
    """The converter splits what the model fuses: part of the rows, in their order or not."""
    model = llama()
    weight = model.model.layers[0].mlp.gate_proj.weight
    found = match(model, weight[16:48])
    assert found is not None and torch.equal(found.rows, torch.arange(16, 48))
    found = match(model, weight[:32])  # a prefix is no identity
    assert found is not None and torch.equal(found.rows, torch.arange(32))


def test_two_weights_in_one_tensor_are_not_mapped() -> None:
    """Nothing says which of two inputs such a tensor has: None, and the report names it."""
    model = llama()
    attention = model.model.layers[0].self_attn
    assert match(model, torch.cat([attention.q_proj.weight, attention.k_proj.weight])) is None


def test_a_row_that_is_not_the_models() -> None:
    model = llama()
    weight = model.model.layers[0].mlp.up_proj.weight.clone()
    weight[17, 3] += 1
    assert match(model, weight) is None
    assert match(model, model.model.layers[0].mlp.up_proj.weight + 1) is None
    assert match(model, torch.zeros(4, 63)) is None  # no weight is that wide


def test_types_that_the_matcher_cannot_cast_to() -> None:
    spec = TensorSpec("t", (2, 64), QuantType("Q8_0"), True)
    assert RowMatcher(llama()).match(spec, np.zeros((2, 68), np.uint8)) is None


@given(counts=st.lists(st.integers(1, 4), min_size=2, max_size=6), seed=st.integers(0, 1000))
def test_equal_rows_are_mapped_one_to_one(counts: list[int], seed: int) -> None:
    model = llama()
    weight = model.model.layers[0].self_attn.o_proj.weight
    at = 0
    for i, n in enumerate(counts):  # runs of equal rows
        weight[at : at + n] = torch.full((64,), float(i))
        at += n
    order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
    found = match(model, weight[order])
    assert found is not None
    rows = torch.arange(64) if found.rows is None else found.rows
    assert sorted(rows.tolist()) == list(range(64))
    assert torch.equal(weight[rows], weight[order])


def test_more_equal_rows_than_the_model_has() -> None:
    """Padded vocabularies repeat a row: the map repeats it then, and every row is right."""
    model = llama()
    weight = model.model.embed_tokens.weight
    rows = torch.cat([weight, weight[-1:].repeat(8, 1)])
    found = match(model, rows)
    assert found is not None and torch.equal(gathered(found, model), rows)


def test_transposed_linears() -> None:
    """GPT-2 keeps linear weights (in, out); GGUF has them (out, in)."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=48, n_layer=1, n_head=4, n_positions=32)
    model = GPT2LMHeadModel(config).requires_grad_(False)
    weight = model.transformer.h[0].attn.c_attn.weight
    assert weight.shape == (48, 144)
    found = match(model, weight.T, F32)
    assert found is not None and found.transposed and found.rows is None
    assert found.module == "transformer.h.0.attn.c_attn"
    order = torch.randperm(144, generator=torch.Generator().manual_seed(0))
    found = match(model, weight.T[order], F32)
    assert found is not None and torch.equal(found.rows, order)
    values = torch.randn(144, 48)
    found.scatter(values, weight)
    assert torch.equal(weight.T[order], values)


def test_tied_embeddings_belong_to_the_head() -> None:
    """One tensor, looked up and multiplied: its columns are the head's inputs."""
    found = match(llama(tied=True), llama(tied=True).lm_head.weight)
    assert found is not None
    assert found.parameter == "model.embed_tokens.weight"
    assert found.module == "lm_head" and found.is_lookup


def test_untied_embeddings_and_head_are_told_apart() -> None:
    model = llama()
    table, head = match(model, model.model.embed_tokens.weight), match(model, model.lm_head.weight)
    assert table is not None and table.is_lookup and table.module == "model.embed_tokens"
    assert head is not None and not head.is_lookup and head.module == "lm_head"


class Experts(nn.Module):
    """A mixture as transformers stores it: (n_experts, n_out, n_in) in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 10, 16))

    def get_input_embeddings(self) -> None:
        return None


def test_stacked_experts() -> None:
    """The gates of all experts are one GGUF tensor: every other half of the fused parameter."""
    torch.manual_seed(0)
    model = Experts().requires_grad_(False)
    gates = model.gate_up_proj[:, :5].reshape(20, 16)
    found = match(model, gates, F32)
    assert found is not None and found.parameter == "gate_up_proj"
    assert torch.equal(gathered(found, model), gates)
    values = torch.randn(20, 16)
    ups = model.gate_up_proj[:, 5:].clone()
    found.scatter(values, model.gate_up_proj)
    assert torch.equal(model.gate_up_proj[:, :5].reshape(20, 16), values)
    assert torch.equal(model.gate_up_proj[:, 5:], ups)


def test_experts_multiplied_from_the_left() -> None:
    """gpt-oss keeps (n_experts, n_in, n_out), gates and ups in turn; GGUF has the gates alone."""
    torch.manual_seed(0)
    model = Experts().requires_grad_(False)
    gates = model.gate_up_proj[:, :, ::2].mT.reshape(4 * 8, 10)
    found = match(model, gates, F32)
    assert found is not None and found.transposed and found.n_columns(model.gate_up_proj) == 10
    assert torch.equal(gathered(found, model), gates)
    values, ups = torch.randn(32, 10), model.gate_up_proj[:, :, 1::2].clone()
    found.scatter(values, model.gate_up_proj)
    assert torch.equal(gathered(found, model), values)
    assert torch.equal(model.gate_up_proj[:, :, 1::2], ups)


def test_a_part_that_is_absorbed_transposed() -> None:
    """The k_b of latent attention: the first rows of every head, each head transposed."""
    model = llama()
    weight = model.model.layers[1].self_attn.o_proj.weight  # 4 heads of 16 rows
    stack = weight.view(4, 16, 64)[:, :12].mT.contiguous()
    packed = stack.view(torch.uint8).numpy().reshape(4 * 64, -1)
    spec = TensorSpec("blk.1.attn_k_b.weight", tuple(stack.shape), BF16, True)
    found = RowMatcher(model).match(spec, packed)
    assert found is not None and found.flipped == 4 and found.module == ""
    assert found.n_columns(weight) == 12
    assert torch.equal(gathered(found, model), stack.reshape(-1, 12))
    values, rest = torch.randn(256, 12).bfloat16(), weight.view(4, 16, 64)[:, 12:].clone()
    found.scatter(values, weight)
    assert torch.equal(gathered(found, model), values)
    assert torch.equal(weight.view(4, 16, 64)[:, 12:], rest)


@given(seed=st.integers(0, 1000))
def test_permuted_columns_are_found(seed: int) -> None:
    """Heads in another order, seen from the projection that reads them."""
    model = llama()
    weight = model.model.layers[1].self_attn.o_proj.weight
    order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
    spec, packed = stored(weight[:, order], name="blk.1.attn_output.weight")
    found = RowMatcher(model).match(spec, packed)
    assert found is not None and found.columns is not None and found.rows is None
    assert torch.equal(found.columns, order)
    values = torch.randn(64, 64).bfloat16()
    found.scatter(values, weight)
    assert torch.equal(weight[:, order], values)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_repeated_layers_keep_apart(order: tuple[int, int]) -> None:
    """Depth-upscaled and self-merged models repeat layers bit for bit. Each must get its own input
    and its own parameter: else the search puts one layer's candidate into the other.
    """
    model = llama()
    model.model.layers[1].load_state_dict(model.model.layers[0].state_dict())
    matcher = RowMatcher(model)
    found = [
        matcher.match(*stored(model.model.layers[i].mlp.down_proj.weight, name=f"blk.{i}"))
        for i in order
    ]
    assert [m.module for m in found if m] == [f"model.layers.{i}.mlp.down_proj" for i in order]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_head_equal_to_the_embeddings_keeps_apart(order: tuple[int, int]) -> None:
    """Untied, and never trained apart."""
    model = llama()
    model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    matcher = RowMatcher(model)
    names = [("token_embd.weight", "model.embed_tokens"), ("output.weight", "lm_head")]
    for name, module in (names[i] for i in order):
        found = matcher.match(*stored(model.lm_head.weight, name=name))
        assert found is not None and found.module == module


def test_equal_halves_of_a_fused_weight_keep_apart() -> None:
    model = llama()
    weight = model.model.layers[0].mlp.gate_proj.weight
    weight[40:] = weight[:40]
    matcher = RowMatcher(model)
    found = [matcher.match(*stored(weight[:40], name=name)) for name in "ab"]
    rows = torch.cat([m.rows for m in found if m is not None and m.rows is not None])
    assert torch.equal(rows, torch.arange(80))


def test_constant_weights_keep_apart() -> None:
    """A zero-initialized projection is not the padding row of the embeddings."""
    model = llama()
    model.model.embed_tokens.weight[-1] = 0
    model.model.layers[1].self_attn.o_proj.weight.zero_()
    found = match(model, torch.zeros(64, 64))
    assert found is not None and found.module == "model.layers.1.self_attn.o_proj"


def test_save_and_load(tmp_path: Path) -> None:
    maps = {
        "a": RowMap("a", "x.a.weight", False, None, "x.a", False),
        "b": RowMap("b", "x.b.weight", True, torch.tensor([2, 0, 1]), "x.b", True, 3),
        "c": RowMap("c", "c", False, None, "c", False, columns=torch.tensor([1, 0])),
    }
    save_row_maps(maps, tmp_path / "maps.safetensors")
    loaded = load_row_maps(tmp_path / "maps.safetensors")
    assert torch.equal(loaded["c"].columns, torch.tensor([1, 0])) and loaded["c"].rows is None
    assert list(loaded) == ["a", "b", "c"] and loaded["a"] == maps["a"]
    assert torch.equal(loaded["b"].rows, maps["b"].rows)
    assert {**vars(loaded["b"]), "rows": 0} == {**vars(maps["b"]), "rows": 0}


@pytest.mark.parametrize("maps", [{}, {"a": RowMap("a", "w", False, None, "m", False)}])
def test_save_and_load_without_any_index(maps: dict[str, RowMap], tmp_path: Path) -> None:
    save_row_maps(maps, tmp_path / "maps.safetensors")
    assert load_row_maps(tmp_path / "maps.safetensors") == maps


@given(seed=st.integers(0, 1000), transposed=st.booleans(), identity=st.booleans())
def test_scatter_undoes_the_map(seed: int, transposed: bool, identity: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = None if identity else torch.randperm(12, generator=generator)
    map_ = RowMap("t", "w", transposed, rows, "m", False)
    weight = torch.randn((8, 12) if transposed else (12, 8), generator=generator)
    flat = weight.T if transposed else weight
    values = (flat if rows is None else flat[rows]).clone()
    other = torch.zeros_like(weight)
    map_.scatter(values, other)
    assert torch.equal(other, weight)


def test_scatter_into_half_precision_and_a_part() -> None:
    map_ = RowMap("t", "w", False, torch.tensor([3, 1]), "m", False)
    weight = torch.zeros(4, 6, dtype=torch.bfloat16)
    map_.scatter(torch.full((2, 6), 1.5), weight)
    assert weight[[1, 3]].eq(1.5).all() and weight[[0, 2]].eq(0).all()


@pytest.mark.parametrize("n_bytes", [2, 4, 6, 1280, 300_000])
def test_digests_tell_rows_apart(n_bytes: int) -> None:
    """Rows that differ in one bit, or in two words that swapped, and rows that do not differ."""
    rng = np.random.default_rng(n_bytes)
    row = rng.integers(0, 256, n_bytes, np.uint8)
    bits = rng.permutation(8 * n_bytes)[:64]
    changed = np.repeat(row[None], len(bits) + 2, axis=0)
    changed[np.arange(len(bits)), bits // 8] ^= (1 << bits % 8).astype(np.uint8)
    if n_bytes >= 8:
        changed[-1, :8] = np.roll(row[:8], 4)
    n_apart = len(np.unique(changed, axis=0))
    digests = row_digests(changed)
    assert digests.dtype == np.uint64 and len(np.unique(digests)) == n_apart
    assert (row_digests(changed[::-1].copy())[::-1] == digests).all()
