"""Measure how much an error at the output of each linear layer affects the model's predictions.

To second order, KL(p || p') = ½ E[(d log p(y))²] for y drawn from p: the Fisher information. With
one label drawn per position and the gradient δ of its log-probability at a layer's output, an error
e_r of row r of the weight costs about ½ G_r e_r H e_rᵀ nats per token, where G_r = mean δ_r² and H
is the Hessian of the layer's input (a Kronecker factorization with the diagonal of its output side;
Martens & Grosse 2015, arXiv:1503.05671). One backward pass prices every type of every tensor.

An error e in the row of the input embeddings that is looked up with frequency f costs about
½ f e C eᵀ, where C = mean g gᵀ of the gradients g at what is looked up: the same form, with
gradients for inputs. So GPTQ solves a table of embeddings, too; a tied one, which is also the head,
under the sum of both.

The pass runs one block at a time, as the forward pass does: only block boundaries are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from quantkit.model.blockwise import BlockCall, BlockwiseModel
from quantkit.ranks.group import ALONE, Ranks
from quantkit.statistics.experts import (
    ExpertProducts,
    Product,
    grouped_experts,
    stacked_parameters,
)
from quantkit.statistics.hessian import HessianCollector, is_linear

_HEAD = "(head)"


@dataclass(frozen=True)
class Fisher:
    """Mean squared gradients: by module per output feature (n_out,), float32, all experts' counted
    through; of the output head, p(1 - p).

    `frequency` (n_vocab,) is how often each token was looked up, as a share of all positions.
    """

    modules: dict[str, torch.Tensor]
    frequency: torch.Tensor


def output_fisher(
    model: BlockwiseModel,
    ids: torch.Tensor,
    seed: int,
    lookups: Mapping[str, HessianCollector] | None = None,
    batch: int = 4,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks = ALONE,
) -> Fisher:
    """Estimate the Fisher information on sequences `ids` (n_sequences, n_ctx), labels drawn with
    `seed`. Every rank runs its share of the batches; all have the sums.

    `lookups` are given C by the name of the embedding module: its first collector of the first
    sequence and every second after it, the other one of the others. `progress` is called with the
    blocks that are done, of all batches, and how many there are.
    """
    batch = min(batch, -(-len(ids) // ranks.size))
    starts = range(0, len(ids), batch)
    own = ranks.share(starts)
    device, n_blocks, n_batches = model.device, len(model.blocks), len(own)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    sums: dict[str, torch.Tensor] = {}
    for start in starts:
        part = ids[start : start + batch].to(device)
        if start not in own:  # its labels are drawn all the same: those after it are as alone
            for _ in part:
                torch.rand(ids.shape[1], 1, generator=generator)
            continue
        states, calls = _boundaries(model, part)
        grads, squares = [], []
        for state in states[-1]:
            grad, probability = _label_gradient(model, state[None], generator)
            grads.append(grad)
            squares.append((probability * (1 - probability)).sum(0))
        total = torch.stack(squares).sum(0)
        sums[_HEAD] = sums[_HEAD] + total if _HEAD in sums else total
        gradient = torch.cat(grads)
        for index in reversed(range(len(model.blocks))):
            with model.holding(index):
                gradient = _backward(model, index, states[index], calls[index], gradient, sums)
            progress(own.index(start) * n_blocks + n_blocks - index, n_batches * n_blocks)
        scale = _embedding_scale(model, part, states[0]) if lookups else 1.0
        for parity, collector in enumerate((lookups or {}).values()):
            rows = gradient[(start + parity) % 2 :: 2]
            if len(rows):
                collector.add((model.embedding_name,), scale * rows.float())
    sums = _merged(sums, ranks, device)
    for collector in (lookups or {}).values():
        collector.merge(ranks, device)
    n_tokens, head = ids.numel(), sums.pop(_HEAD)
    n_vocab = head.shape[0]
    frequency = torch.bincount(ids.flatten(), minlength=n_vocab)[:n_vocab].float() / n_tokens
    sums |= {name: head for name in model.head_linears()}
    return Fisher(
        {name: (total / n_tokens).cpu() for name, total in sums.items()},
        frequency.cpu(),
    )


def _merged(
    sums: dict[str, torch.Tensor], ranks: Ranks, device: torch.device
) -> dict[str, torch.Tensor]:
    """The sums of all ranks, which may have met fewer modules than another."""
    shapes = ranks.union({name: list(total.shape) for name, total in sums.items()})
    found = {
        name: sums[name] if name in sums else torch.zeros(shape, device=device)
        for name, shape in shapes.items()
    }
    ranks.sum(found.values())
    return found


@torch.no_grad()
def _boundaries(model: BlockwiseModel, ids: torch.Tensor) -> tuple[list[torch.Tensor], list]:
    hidden, calls = model.trace(ids)
    states = [hidden]
    for index, call in enumerate(calls):
        states.append(model.run_block(index, states[-1], call))
    return states, calls


def _embedding_scale(model: BlockwiseModel, ids: torch.Tensor, hidden: torch.Tensor) -> float:
    """What embeddings are multiplied with before the first block (Gemma: √n_embd), by least
    squares: what else is added does not point their way.
    """
    table = model.model.get_input_embeddings().get_parameter("weight")[ids].float()
    return float((table * hidden.float()).sum() / table.square().sum())


def _label_gradient(
    model: BlockwiseModel, state: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of Σ_t log p(y_t), y_t ~ p_t, at the last hidden state (1, n, n_embd), and p (n,
    n_vocab).
    """
    state = state.detach().requires_grad_()
    with torch.enable_grad():
        log_p = torch.log_softmax(model.head_with_grad(state)[0].float(), -1)
        p = log_p.detach().exp()
        drawn = torch.rand(len(p), 1, generator=generator).to(p.device)
        labels = torch.searchsorted(p.cumsum(-1), drawn * p.sum(-1, keepdim=True)).clamp_max(
            p.shape[-1] - 1
        )
        (gradient,) = torch.autograd.grad(log_p.gather(-1, labels).sum(), state)
    return gradient, p


def _backward(
    model: BlockwiseModel,
    index: int,
    hidden: torch.Tensor,
    call: BlockCall,
    gradient: torch.Tensor,
    sums: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Back through block `index`; adds the squared output gradients of its linear layers to
    `sums`.
    """
    prefix = model.block_name(index)
    handles = []

    def watch(name: str) -> object:
        def hook(_module: object, _args: object, output: torch.Tensor) -> None:
            def add(grad: torch.Tensor) -> None:
                squares = grad.float().square().flatten(0, -2).sum(0)
                sums[name] = sums[name] + squares if name in sums else squares

            output.register_hook(add)

        return hook

    experts = stacked_parameters(model.blocks[index], prefix)

    def watch_experts(product: Product) -> None:
        name, output = product.parameter, product.output
        if not output.requires_grad:
            return

        def add(grad: torch.Tensor) -> None:
            n = grad.shape[-1]
            squares = grad.float().square().reshape(-1, n)
            counts = F.pad(product.ends, (1, 0)).diff()
            squares = torch.segment_reduce(squares, "sum", lengths=counts.long(), unsafe=True)
            if name not in sums:
                sums[name] = torch.zeros(len(experts[name]) * n, device=grad.device)
            own = slice(product.first, product.first + len(squares))
            sums[name].view(-1, n)[own] += squares

        output.register_hook(add)

    for name, module in model.blocks[index].named_modules():
        if is_linear(module):
            handles.append(module.register_forward_hook(watch(f"{prefix}.{name}")))
    hidden = hidden.detach().requires_grad_()
    seeing = ExpertProducts(experts, watch_experts)
    try:
        with torch.enable_grad(), grouped_experts(model.blocks[index]), seeing:
            out = model.run_block(index, hidden, call)
            (result,) = torch.autograd.grad(out, hidden, gradient)
    finally:
        for handle in handles:
            handle.remove()
    return result
