"""Of `quantizer_trials.py`: gradients at layers' outputs, and what they say of rows that make up
for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantkit.model.blockwise import BlockwiseModel


@dataclass(frozen=True)
class Curvature:
    """Of one layer, for labels drawn from the model: `inputs`, the mean of |g|^2 x x^T over tokens
    with gradients g at its output, and `rooted`, that of |g| x x^T; `outputs`, the sums of g g^T
    over the batches with even and with odd numbers; `capped`, the same with g / (|g| + its mean
    square's root).
    """

    inputs: torch.Tensor
    rooted: torch.Tensor
    outputs: tuple[torch.Tensor, torch.Tensor]
    capped: tuple[torch.Tensor, torch.Tensor]


def curvatures(
    base: BlockwiseModel, calibration: Sequence[torch.Tensor], names: Sequence[str]
) -> dict[str, Curvature]:
    """By module, from one backward pass over every batch."""
    modules = dict(base.model.named_modules())
    table = base.model.get_input_embeddings()
    generator = torch.Generator(base.device).manual_seed(0)
    sums: dict[str, list[torch.Tensor]] = {}
    for number, ids in enumerate(calibration):
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def note(name: str, seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = seen) -> Any:
            def hook(_: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
                seen[name] = args[0].detach(), out

            return hook

        handles = [modules[name].register_forward_hook(note(name)) for name in names]
        with torch.enable_grad():
            embedded = table(ids).detach().requires_grad_()
            logits = base.model(inputs_embeds=embedded, use_cache=False).logits.flatten(0, 1)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            loss = logits.log_softmax(-1).gather(-1, drawn).sum()
            gradients = torch.autograd.grad(loss, [seen[name][1] for name in names])
        for handle in handles:
            handle.remove()
        for name, g in zip(names, gradients, strict=True):
            x, g = seen[name][0].flatten(0, -2), g.flatten(0, -2)
            squares = g.square().sum(1, keepdim=True)
            capped = g / (squares.sqrt() + squares.mean().sqrt())
            if name not in sums:
                n, m = x.shape[1], g.shape[1]
                sums[name] = [x.new_zeros(each, each) for each in (n, n, m, m, m, m)]
            sums[name][0].addmm_(x.T, x * squares)
            sums[name][1].addmm_(x.T, x * squares.sqrt())
            sums[name][2 + number % 2].addmm_(g.T, g)
            sums[name][4 + number % 2].addmm_(capped.T, capped)
    n_tokens = sum(ids.numel() for ids in calibration)
    return {
        name: Curvature(
            found[0] / n_tokens, found[1] / n_tokens, (found[2], found[3]), (found[4], found[5])
        )
        for name, found in sums.items()
    }


def stream_curvatures(
    base: BlockwiseModel, calibration: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Of every block's output, the mean over tokens of g g^T, g the gradient of the loss of labels
    drawn from the model: (n_embd, n_embd).
    """
    generator = torch.Generator(base.device).manual_seed(0)
    sums: list[torch.Tensor] = []
    for ids in calibration:
        outputs: list[torch.Tensor] = []

        def note(_: nn.Module, args: Any, out: Any, outputs: list[torch.Tensor] = outputs) -> None:
            outputs.append(out[0] if isinstance(out, tuple) else out)

        handles = [block.register_forward_hook(note) for block in base.blocks]
        with torch.enable_grad():
            embedded = base.model.get_input_embeddings()(ids).detach().requires_grad_()
            logits = base.model(inputs_embeds=embedded, use_cache=False).logits.flatten(0, 1)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            loss = logits.log_softmax(-1).gather(-1, drawn).sum()
            gradients = torch.autograd.grad(loss, outputs)
        for handle in handles:
            handle.remove()
        flat = [g.flatten(0, -2) for g in gradients]
        sums = sums or [g.new_zeros(g.shape[1], g.shape[1]) for g in flat]
        for total, g in zip(sums, flat, strict=True):
            total.addmm_(g.T, g)
    n_tokens = sum(ids.numel() for ids in calibration)
    return [total / n_tokens for total in sums]


def feedback(g: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper U with (g + damping)^-1 = U^T U, through which rows pass their errors on."""
    damped = g.clone()
    damped.diagonal().add_(damping * g.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def gain(upper: torch.Tensor, unseen: torch.Tensor, step: int) -> float:
    """What errors of equal size in all rows cost under `unseen` when later rows make up for those
    of earlier ones, over what they cost when none does.
    """
    passed = upper.T.clone()
    for first in range(0, len(upper), step):
        own = slice(first, first + step)
        passed[:, own] = torch.linalg.solve_triangular(
            upper[own, own].T, passed[:, own], upper=False, left=False
        )
    return float((passed * (unseen @ passed)).sum() / unseen.trace())
