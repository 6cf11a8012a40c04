"""Share out a block's weights over ranks while it is tuned: tensor parallelism.

A step sees few sequences, and most of its work is done for every weight: roundings, gradients,
Adam. So ranks share the rows, not the sequences, and the steps are those of one rank. Of a linear
layer every rank computes the outputs of its own rows, and exchanges activations, which are far
smaller than weights (the column-parallel layers of Shoeybi et al., Megatron-LM, arXiv:1909.08053).
Of any other weight (experts, which the model multiplies in ways of its own) every rank keeps its
rows' codes and scales, and values are exchanged before they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from quantkit.model.blockwise import BlockwiseModel
from quantkit.model.row_maps import RowMap
from quantkit.ranks.group import Ranks

# Weights of the smallest matrix that is shared out: in less time than two exchanges take, a GPU
# rounds and updates all of a smaller one.
_LEAST_WEIGHTS = {"cpu": 0, "cuda": 1 << 22}


@dataclass(frozen=True)
class _Part:
    """Which rows of a tensor a rank tunes: int64, in rising order; None for all. `map`: where those
    go in the rank's part of the parameter.
    """

    rows: torch.Tensor | None
    map: RowMap
    is_exchanged: bool = False  # the values of these rows, before they are used


class Shards:
    """This rank's part of the tensors of one block."""

    def __init__(
        self,
        ranks: Ranks,
        model: BlockwiseModel,
        index: int,
        maps: Mapping[str, RowMap],
        n_rows: Mapping[str, int],
    ) -> None:
        """`maps` and `n_rows` are those of the block's tensors, whose weights are there."""
        self._ranks, self._model, self._maps, self._n_rows = ranks, model, maps, n_rows
        self._prefix = model.block_name(index) + "."
        self._least = _LEAST_WEIGHTS[model.device.type]
        of_parameter: dict[str, list[str]] = {}
        for name, map_ in maps.items():
            of_parameter.setdefault(map_.parameter, []).append(name)
        self._linears: dict[str, nn.Linear] = {}
        self._parts: dict[str, _Part] = {}
        for parameter, names in of_parameter.items():
            linear = None if ranks.is_alone else self._linear(parameter, names)
            if linear is not None:
                self._linears[parameter] = linear
            for name in names:
                self._parts[name] = self._part(name, linear)

    def _linear(self, parameter: str, names: Sequence[str]) -> nn.Linear | None:
        """The layer whose outputs are shared out, if a parameter is the weight of one that runs
        whatever the tokens are.
        """
        path, _, kind = parameter.rpartition(".")
        module = self._model.model.get_submodule(path)
        if type(module) is not nn.Linear or kind != "weight":
            return None
        within = path.removeprefix(self._prefix).split(".")[:-1]
        if any(part.isdigit() for part in within):  # of a list of experts
            return None
        if any(self._maps[n].transposed or self._maps[n].flipped for n in names):
            return None
        is_large = module.weight.numel() >= self._least
        return module if is_large and module.out_features >= self._ranks.size else None

    def _part(self, name: str, linear: nn.Linear | None) -> _Part:
        map_, n_rows = self._maps[name], self._n_rows[name]
        if linear is not None:
            low, high = bounds(self._ranks, linear.out_features)
            if map_.rows is None:
                return _Part(torch.arange(low, high), map_)
            own = torch.nonzero((map_.rows >= low) & (map_.rows < high))[:, 0]
            return _Part(own, replace(map_, rows=map_.rows[own] - low))
        n_weights = self._model.model.get_parameter(map_.parameter).numel()
        if self._ranks.is_alone or n_weights < self._least or n_rows < self._ranks.size:
            return _Part(None, map_)
        return _Part(torch.arange(*bounds(self._ranks, n_rows)), map_, is_exchanged=True)

    def own(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return those of a tensor's rows (n_rows, ...) that this rank tunes."""
        part = self._parts[name]
        return rows if part.rows is None else rows[part.rows.to(rows.device)]

    def fixed(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return what `weights` takes of the values (n_rows, n_columns) of a tensor that is not
        tuned.
        """
        return values if self._parts[name].is_exchanged else self.own(name, values)

    def tuned(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return what `weights` takes of the values of this rank's rows of a tensor that is."""
        if not self._parts[name].is_exchanged:
            return values
        joined: torch.Tensor = _Joined.apply(values, self._ranks, self._n_rows[name], 0)
        return joined

    def weights(
        self, values: Mapping[str, torch.Tensor], tuned: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """Return the block's parameters for a pass within `running`, gradients included: with these
        values, as `fixed` and `tuned` give them. `tuned` are the tensors that any rank tunes.
        """
        found: dict[str, torch.Tensor] = {}
        for name, rows in values.items():
            map_ = self._parts[name].map
            original = self._own_parameter(map_.parameter)
            rows = rows.to(original.device, original.dtype)
            if map_.is_identity:
                found[map_.parameter] = rows.view(original.shape)
                continue
            if map_.parameter not in found:
                found[map_.parameter] = original.clone()
            map_.scatter(rows, found[map_.parameter])
        for name in tuned:  # also what others tune: the backward pass is the same everywhere
            parameter = self._maps[name].parameter
            if parameter not in found:
                found[parameter] = self._own_parameter(parameter).clone()
            if not found[parameter].requires_grad:
                found[parameter].requires_grad_()
        return {parameter.removeprefix(self._prefix): w for parameter, w in found.items()}

    def _own_parameter(self, parameter: str) -> torch.Tensor:
        values = self._model.model.get_parameter(parameter).data
        if parameter in self._linears:
            low, high = bounds(self._ranks, len(values))
            return values[low:high]
        return values

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have linear layers work with what `weights` gives, for a while."""
        for linear in self._linears.values():
            _replace_forward(linear, partial(_column_parallel, linear, self._ranks))
        try:
            yield
        finally:
            for linear in self._linears.values():
                del linear.forward

    def whole(self, name: str, own: torch.Tensor) -> torch.Tensor:
        """Return all rows of a tensor, of this rank's as `own` gives them: uint8 (n_rows,
        row_bytes).
        """
        part = self._parts[name]
        if part.rows is None:
            return self._ranks.broadcast(own.contiguous())
        found = own.new_zeros((self._n_rows[name], own.shape[1]))
        found[part.rows.to(own.device)] = own
        self._ranks.sum([found])
        return found


def bounds(ranks: Ranks, n_rows: int) -> tuple[int, int]:
    """Return the first row of a rank, and the first of the next rank."""
    return n_rows * ranks.rank // ranks.size, n_rows * (ranks.rank + 1) // ranks.size


def _replace_forward(module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
    module.forward = forward


def _column_parallel(linear: nn.Linear, ranks: Ranks, x: torch.Tensor) -> torch.Tensor:
    """The outputs of a linear layer whose weight holds this rank's rows alone."""
    low, high = bounds(ranks, linear.out_features)
    bias = None if linear.bias is None else linear.bias[low:high]
    part = nn.functional.linear(_Summed.apply(x, ranks), linear.weight, bias)
    joined: torch.Tensor = _Joined.apply(part, ranks, linear.out_features, part.dim() - 1)
    return joined


class _Summed(torch.autograd.Function):
    """Forward as it is; the gradients of all ranks are summed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        found = gradient.float().contiguous()
        found = found.clone() if found is gradient else found
        ctx.ranks.sum([found])
        return found.to(gradient.dtype), None


class _Joined(torch.autograd.Function):
    """Parts of all ranks side by side in one dimension; of the gradient, a rank's part."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, ranks: Ranks, n: int, dim: int) -> torch.Tensor:
        ctx.bounds, ctx.dim = bounds(ranks, n), dim
        shape = list(part.shape)
        shape[dim] = n
        joined = part.new_zeros(shape)
        _own(joined, ctx).copy_(part)
        ranks.sum([joined.view(torch.uint8)])  # zeros everywhere but on one rank
        return joined

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _own(gradient, ctx).contiguous(), None, None, None


def _own(whole: torch.Tensor, ctx: Any) -> torch.Tensor:
    low, high = ctx.bounds
    return whole.narrow(ctx.dim, low, high - low)
