"""Hessians of linear layers, H = mean over tokens of x xᵀ, collected while a block runs.

Modules that read the very same tensor (q, k and v; gate and up) share one Hessian: which do is seen
from the tensors themselves, not written down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from quantkit.ranks.group import Ranks

# Columns; H is symmetric, so only panels on and above the diagonal are multiplied.
_PANEL = 256
_PANEL_CUDA = 1024  # narrower ones leave a GPU's matrix units waiting


def add_outer(hessian: torch.Tensor, x: torch.Tensor) -> None:
    """Add xᵀx to `hessian` on and above the diagonal panels, float32 (n, n); x is (n_tokens, n)."""
    n = x.shape[1]
    if x.is_cuda and x.dtype != torch.float32:
        # Products of 16-bit floats are exact in float32; the matrix units sum them in float32.
        for start in range(0, n, _PANEL_CUDA):
            end = min(start + _PANEL_CUDA, n)
            panel = torch.mm(x[:, start:end].T, x[:, start:], out_dtype=torch.float32)
            hessian[start:end, start:] += panel
        return
    x = x.float()
    for start in range(0, n, _PANEL):
        end = min(start + _PANEL, n)
        hessian[start:end, start:].addmm_(x[:, start:end].T, x[:, start:])


def add_outers(hessians: torch.Tensor, x: torch.Tensor, bounds: torch.Tensor, share: float) -> None:
    """Add share * xᵀx of an expert's rows to its matrix, as `add_outer` does: float32 (n_experts,
    n, n). Those of expert i are rows bounds[i] to bounds[i + 1] of x (n_rows, n).
    """
    if x.is_cuda:
        from quantkit.statistics import kernels_cuda  # needs triton

        kernels_cuda.add_outers(hessians, x, bounds, share)
        return
    limits = bounds.tolist()
    for hessian, first, last in zip(hessians, limits, limits[1:], strict=False):
        own = x[first:last]
        add_outer(hessian, own if share == 1 else own * share**0.5)


def symmetrize(hessian: torch.Tensor) -> torch.Tensor:
    """Fill whole matrices (..., n, n) from their upper triangles, in place."""
    n = hessian.shape[-1]
    for start in range(0, n, _PANEL):
        end = min(start + _PANEL, n)
        own = hessian[..., start:end, start:end].triu()
        hessian[..., start:end, start:end] = own + own.triu(1).mT
        hessian[..., end:, start:end] = hessian[..., start:end, end:].mT
    return hessian


def is_linear(module: nn.Module) -> bool:
    """Return whether it is nn.Linear, or transformers' Conv1D (a linear layer with a transposed
    weight).
    """
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


class HessianCollector:
    """Sums of x xᵀ for every distinct input of the linear layers of one block, or for those groups
    that are wanted.

    Groups are named after their first module. Sums are float32 on the device of the activations.
    """

    def __init__(
        self, linears: dict[str, nn.Module], wanted: Callable[[str], bool] = lambda group: True
    ) -> None:
        self._linears, self._wanted = linears, wanted
        self._inputs: dict[str, torch.Tensor] = {}  # of the call under way
        self.members: dict[str, tuple[str, ...]] = {}  # group -> its modules
        self.widths: dict[str, int] = {}
        self.sums: dict[str, torch.Tensor] = {}
        self.n_tokens: dict[str, int] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record the inputs of one forward call; sums are updated when it ends."""
        handles = [
            m.register_forward_pre_hook(self._hook(name)) for name, m in self._linears.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._accumulate()

    def _hook(self, name: str) -> Any:
        def note(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self._inputs[name] = args[
                0
            ]  # keeping it alive also keeps its address from being reused

        return note

    def _accumulate(self) -> None:
        groups: dict[tuple[int, ...], list[str]] = {}
        for name, x in self._inputs.items():
            groups.setdefault((x.data_ptr(), *x.shape, *x.stride()), []).append(name)
        for names in groups.values():
            self.add(tuple(names), self._inputs[names[0]])
        self._inputs.clear()

    def add(self, names: tuple[str, ...], x: torch.Tensor) -> None:
        """Add the rows x (..., n) to the sum of what modules `names` share."""
        group, n = names[0], x.shape[-1]
        self.members[group], self.widths[group] = names, n
        if not self._wanted(group):
            return
        x = x.reshape(-1, n)
        if group not in self.sums:
            self.sums[group] = torch.zeros((n, n), dtype=torch.float32, device=x.device)
            self.n_tokens[group] = 0
        add_outer(self.sums[group], x)
        self.n_tokens[group] += len(x)

    def merge(self, ranks: Ranks, device: torch.device) -> None:
        """Make groups, sums and counts those of all ranks together. A rank may have met fewer
        groups than another, or none.
        """
        if ranks.is_alone:
            return
        known = ranks.union({g: [names, self.widths[g]] for g, names in self.members.items()})
        self.members = {group: tuple(names) for group, (names, _) in known.items()}
        self.widths = {group: n for group, (_, n) in known.items()}
        wanted = {group: n for group, n in self.widths.items() if self._wanted(group)}
        self.sums = {
            group: self.sums[group] if group in self.sums else torch.zeros((n, n), device=device)
            for group, n in wanted.items()
        }
        counts = torch.tensor([self.n_tokens.get(group, 0) for group in wanted])
        ranks.sum([*self.sums.values(), counts])
        self.n_tokens = dict(zip(wanted, counts.tolist(), strict=True))

    def means(self) -> dict[str, torch.Tensor]:
        """Return the Hessians, float32 (n, n) by group; the sums are used up."""
        for group, total in self.sums.items():
            symmetrize(total).div_(max(self.n_tokens[group], 1))
        found, self.sums = self.sums, {}
        return found
