"""Of `quantizer_trials.py`: what layers read in the original and in the changed model, and weights
moved to make up for the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from quantkit.gptq.solver import factorize
from quantkit.model.blockwise import BlockCall, BlockwiseModel
from quantkit.statistics.hessian import is_linear

DAMPING = 0.1  # of the median of diag H, as in the package
RIDGES = (0.1, 1.0, 10.0)  # the same for the moves of weights, where they are fitted


class Reference:
    """The original on the calibration text: `hidden[i]` before block i, by batch."""

    def __init__(
        self, base: BlockwiseModel, calibration: Sequence[torch.Tensor], n_blocks: int
    ) -> None:
        self._base = base
        self.hidden = [[base.trace(ids)[0] for ids in calibration]]
        self.calls = base.trace(calibration[0])[1]
        for index in range(n_blocks):
            call = self.calls[index]
            self.hidden.append([base.run_block(index, h, call) for h in self.hidden[index]])

    def inputs(self, index: int) -> dict[tuple[str, ...], list[torch.Tensor]]:
        """What every group of layers of a block reads, by batch. Groups are in the order of their
        calls; those in one read one tensor.
        """
        linears = linears_of(self._base.blocks[index])
        groups: dict[tuple[str, ...], list[torch.Tensor]] = {}
        for before in self.hidden[index]:
            seen: dict[str, torch.Tensor] = {}
            with noting(linears, seen):
                self._base.run_block(index, before, self.calls[index])
            for names in sharing(seen):
                groups.setdefault(names, []).append(seen[names[0]])
        return groups


@contextmanager
def noting(linears: dict[str, nn.Module], seen: dict[str, torch.Tensor]) -> Iterator[None]:
    """Put what the layers read into `seen`, in the order of their calls."""

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen[name] = args[0]

        return hook

    handles = [m.register_forward_pre_hook(note(name)) for name, m in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sharing(seen: dict[str, torch.Tensor]) -> list[tuple[str, ...]]:
    """Layers that read the very same tensor, together."""
    found: dict[int, list[str]] = {}
    for name, x in seen.items():
        found.setdefault(id(x), []).append(name)
    return [tuple(names) for names in found.values()]


class Replay:
    """A block of the changed model, gone through once for every group: layers that are settled
    answer with what they gave, so that each is multiplied once.
    """

    def __init__(self, model: BlockwiseModel, index: int, call: BlockCall) -> None:
        self._model, self._index, self._call = model, index, call
        self.linears = linears_of(model.blocks[index])
        self.kept: dict[str, list[torch.Tensor]] = {}

    def inputs(self, name: str, hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What layer `name` reads, by batch; nothing behind it is run."""

        def stop(x: torch.Tensor) -> torch.Tensor:
            raise _ReachedError(x)

        found = []
        for batch, before in enumerate(hidden):
            try:
                with self._answering(batch, {name: stop}):
                    self._model.run_block(self._index, before, self._call)
            except _ReachedError as reached:
                found.append(reached.x)
        return found

    def settle(self, name: str, inputs: Sequence[torch.Tensor]) -> None:
        self.kept[name] = [self.linears[name](x) for x in inputs]

    def outputs(self, hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The hidden states after the block."""
        found = []
        for batch, before in enumerate(hidden):
            with self._answering(batch, {}):
                found.append(self._model.run_block(self._index, before, self._call))
        return found

    @contextmanager
    def _answering(self, batch: int, forwards: dict[str, Callable[..., Any]]) -> Iterator[None]:
        known = {name: partial(_answer, kept[batch]) for name, kept in self.kept.items()}
        for name, forward in (known | forwards).items():
            self.linears[name].forward = forward
        try:
            yield
        finally:
            for layer in self.linears.values():
                layer.__dict__.pop("forward", None)


class _ReachedError(Exception):
    """Leaves a block at the layer that is asked for."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.x = x


def _answer(kept: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return kept


def linears_of(block: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in block.named_modules() if is_linear(m)}


@dataclass(frozen=True)
class Moments:
    """Means over tokens, for what a group reads now (y): `own` is y y^T, `gap` (what the original
    reads minus y) y^T, `stream` (the original's residual stream before the group minus ours) y^T.
    """

    own: torch.Tensor
    gap: torch.Tensor
    stream: torch.Tensor

    @staticmethod
    def of(
        x: Sequence[torch.Tensor], y: Sequence[torch.Tensor], behind: Sequence[torch.Tensor]
    ) -> Moments:
        """Of batches (..., n) of what the original and we read, and of streams (..., n_embd)."""
        n, n_embd = y[0].shape[-1], behind[0].shape[-1]
        own, gap = y[0].new_zeros(n, n), y[0].new_zeros(n, n)
        stream, n_tokens = y[0].new_zeros(n_embd, n), 0
        for theirs, ours, rest in zip(x, y, behind, strict=True):
            flat = ours.reshape(-1, n)
            own.addmm_(flat.T, flat)
            if theirs is not ours:
                gap.addmm_((theirs.reshape(-1, n) - flat).T, flat)
                stream.addmm_(rest.reshape(-1, n_embd).T, flat)
            n_tokens += len(flat)
        return Moments(own / n_tokens, gap / n_tokens, stream / n_tokens)


def moved(
    weight: torch.Tensor, moments: Moments, halves: Sequence[Moments], share: float, stream: bool
) -> torch.Tensor:
    """`weight` (n_rows, n_columns), moved so that it gives the original's outputs for what it reads
    now, or makes up for the stream's difference too. With `halves` of the tokens, ridge and share
    are those at which a move made from one half helps the other most.
    """

    def wanted(of: Moments) -> torch.Tensor:
        return weight @ of.gap + of.stream if stream else weight @ of.gap

    def move(of: Moments, ridge: float) -> torch.Tensor:
        root = torch.linalg.cholesky(factorized(of.own, ridge))
        return torch.cholesky_solve(wanted(of).T, root).T

    ridge = DAMPING
    if halves:
        tried = []
        for each in RIDGES:
            gain = cost = 0.0
            for made, unseen in (halves, reversed(halves)):
                change = move(made, each)
                gain += float((change * wanted(unseen)).sum())
                cost += float(((change @ unseen.own) * change).sum())
            best = min(max(gain / max(cost, 1e-30), 0.0), 1.0)
            tried.append((2 * best * gain - best**2 * cost, best, each))
        _, share, ridge = max(tried)
    return weight + share * move(moments, ridge)


def factorized(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """The Hessian as it is factorized, damped."""
    factor = factorize(hessian, damping)
    damped = hessian.clone()
    damped.diagonal().copy_(factor.diagonal)
    return damped
