"""The precision of candidates' forward passes: 32 bits wherever rounding to 16 would be as large as
their differences, that is in the residual stream and the logits; products use the type of their
matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from quantkit.model.blockwise import BlockCall, BlockwiseModel, SharedKV


def prepare(model: BlockwiseModel) -> None:
    """Keep the text model in float32, in place, but for the matrices inside blocks; on a GPU, which
    gives float32 products of 16-bit matrices, also but for embeddings and head. Tables that are
    only looked up (Gemma 4's for every layer are half of the model) stay as they are.
    """
    dtype = matrix_dtype(model)
    narrow = dtype != torch.float32
    on_gpu = model.device.type == "cuda"
    tables = {id(m.weight) for m in model.model.modules() if isinstance(m, nn.Embedding)}
    tables -= {id(parameter) for parameter in model.model.get_input_embeddings().parameters()}
    for name, parameter in model.text_parameters():
        stays = id(parameter) in tables or (narrow and on_gpu and parameter.dim() >= 2)
        if model.block_of(name) is None and not stays:
            parameter.data = parameter.data.float()
    if not narrow:
        return
    for block in model.blocks:
        for module in block.modules():
            if _is_norm(module):
                module.register_forward_hook(lambda _module, _inputs, out: _narrow(out, dtype))
    for head in model.head_linears().values():
        assert isinstance(head, nn.Linear)
        _replace_forward(head, partial(_product_on_gpu if on_gpu else _product_on_cpu, head))


def prepare_block(block: nn.Module) -> None:
    """Prepare a block whose weights have just come from the checkpoint."""
    for parameter in block.parameters():
        if parameter.dim() < 2:
            parameter.data = parameter.data.float()


def products(model: BlockwiseModel) -> AbstractContextManager[object]:
    """Return the context in which blocks are run."""
    dtype = matrix_dtype(model)
    return torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32)


def begin(model: BlockwiseModel, ids: torch.Tensor) -> tuple[torch.Tensor, Sequence[BlockCall]]:
    """Start a trace whose hidden state, (batch, n_tokens, n_embd), is float32, and whose other
    arguments of blocks are what products take: rotary tables of 32 bits would make all of attention
    wide. What blocks leave for later ones is the pass's own.
    """
    dtype = matrix_dtype(model)
    with _surroundings(model):
        hidden, calls = model.trace(ids)
    shared_kv: SharedKV = {}
    narrowed = (
        replace(call, args=_narrow(call.args, dtype), kwargs=_narrow(call.kwargs, dtype))
        for call in calls
    )
    return hidden.float(), [call.with_shared_kv(shared_kv) for call in narrowed]


def logits(model: BlockwiseModel, states: torch.Tensor) -> torch.Tensor:
    """Return the logits float32 (n_sequences, n_ctx, n_vocab) of the last block's hidden states."""
    with _surroundings(model):
        return model.head(states).float()


def _surroundings(model: BlockwiseModel) -> AbstractContextManager[object]:
    """The context in which what lies outside of blocks is run: on a GPU matrices there are in 16
    bits, and norms and biases in 32.
    """
    return products(model) if model.device.type == "cuda" else nullcontext()


def matrix_dtype(model: BlockwiseModel) -> torch.dtype:
    """Return the type of the matrices inside blocks."""
    return next(p for b in model.blocks for p in b.parameters() if p.dim() >= 2).dtype


def _is_norm(module: nn.Module) -> bool:
    """A module that scales what the matrices after it read. Their inputs are rounded once here,
    not by each of them.
    """
    own = list(module.parameters())
    return "norm" in type(module).__name__.lower() and all(p.dim() < 2 for p in own)


def _narrow(value: Any, dtype: torch.dtype) -> Any:
    """Every floating-point tensor in a nest of containers as `dtype`."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _narrow(v, dtype) for key, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_narrow(v, dtype) for v in value)
    return value


def _replace_forward(module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
    module.forward = forward


def _product_on_gpu(head: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """float32 products of a head's 16-bit weights."""
    rows = states.flatten(0, -2).to(head.weight.dtype)
    with torch.autocast("cuda", enabled=False):
        found = torch.mm(rows, head.weight.T, out_dtype=torch.float32)
    if head.bias is not None:
        found += head.bias
    return found.unflatten(0, states.shape[:-1])


def _product_on_cpu(head: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """The same of its float32 weights, whose factors a CPU may round to 16 bits where that is
    faster (AMX); elsewhere oneDNN, which this calls, is a quarter faster in float32, too.
    """
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        return nn.functional.linear(states, head.weight, head.bias)
    finally:
        setting.fp32_precision = before
