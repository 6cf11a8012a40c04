"""The Hessians that tensors are solved with, factorized when the first of them needs it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock

import torch

from quantkit.config import RunConfig
from quantkit.gptq.errors import Damping
from quantkit.gptq.select import Inputs
from quantkit.gptq.solver import Factor, factorize
from quantkit.model.row_maps import RowMap
from quantkit.ranks.group import Ranks
from quantkit.statistics.inputs import BlockStatistics, InputStatistics
from quantkit.statistics.stored import Gradients
from quantkit.tensors import ONE_INPUT

DAMPING = 0.1  # of the median of diag H: dev/LOG.md


def modules_of(tensors: Iterable[str], maps: Mapping[str, RowMap]) -> dict[str, str]:
    """Return for each tensor the module whose input its columns are. A tensor that is not found in
    the model borrows that of a tensor of its block that reads the same input, if there is one.
    """
    found = {}
    for name in tensors:
        lender = name if name in maps else sibling_of(name, maps)
        if lender is not None:
            found[name] = maps[lender].module
    return found


def sibling_of(tensor: str, maps: Mapping[str, RowMap]) -> str | None:
    """Return a tensor found in the model that reads the same input as this one, columns in their
    order.
    """
    parts = tensor.split(".")
    for kinds in ONE_INPUT:
        if parts[0] == "blk" and parts[2] in kinds:
            for kind in kinds:
                map_ = maps.get(".".join((*parts[:2], kind, *parts[3:])))
                if map_ is not None and map_.module and map_.columns is None:
                    return map_.tensor
    return None


class KnownInputs:
    """What is known of the inputs of some tensors: factorized when the first of those that share
    them is solved, the factor forgotten after the last. The widest take gigabytes.
    """

    def __init__(
        self,
        statistics: BlockStatistics | None,
        tensors: Sequence[str],
        maps: Mapping[str, RowMap],
        config: RunConfig,
        gradients: Gradients,
        uses: Mapping[str, int] | None = None,
    ) -> None:
        """`uses` is how often `borrowed` will be called for a tensor; without it once for each."""
        self._maps, self._config, self._gradients = maps, config, gradients
        self.groups: list[tuple[InputStatistics, list[str]]] = []
        modules = modules_of(tensors, maps)
        for shared in statistics.inputs if statistics else ():
            own = [name for name in tensors if modules[name] in shared.modules]
            if own:
                self.groups.append((shared, own))
        self._group_of = {t: i for i, (_, own) in enumerate(self.groups) for t in own}
        self._left = [
            sum(1 if uses is None else uses.get(name, 0) for name in own) for _, own in self.groups
        ]
        self._made: dict[int, Inputs] = {}
        self._escalated: dict[int, float] = {}
        self._lock = Lock()

    def group_of(self, tensor: str) -> int:
        """Return which of `groups` a tensor reads, -1 for none."""
        return self._group_of.get(tensor, -1)

    def has(self, tensor: str) -> bool:
        return tensor in self._group_of

    @contextmanager
    def borrowed(self, tensor: str) -> Iterator[Inputs | None]:
        """Yield the inputs of a tensor, None without statistics. Call it as often as was said."""
        group = self._group_of.get(tensor)
        if group is None:
            yield None
            return
        with self._lock:
            if group not in self._made:
                self._made[group] = self._make(group)
            inputs = self._made[group]
            self._left[group] -= 1
            if not self._left[group]:
                del self._made[group]
        if tensor not in self._maps:
            # Nothing shows that its columns are these inputs as they come: importances do little
            # harm then, GPTQ would.
            yield replace(inputs, factor=None)
            return
        columns = self._maps[tensor].columns
        yield inputs if columns is None else _reordered(inputs, columns, self._config.methods)

    def _make(self, group: int) -> Inputs:
        statistics, _ = self.groups[group]
        config = self._config
        train = self._train(group)
        inputs = make_inputs(train, statistics.heldout, config.methods, config.device)
        if inputs.factor is not None and inputs.factor.escalated:
            self._escalated[group] = inputs.factor.damping
        return inputs

    def _train(self, group: int) -> torch.Tensor:
        """What decides. An error e in a tied table costs s e H eᵀ / 2 as the head's row and
        f e C eᵀ / 2 as the token's embedding. A token is looked up about as often as it is
        predicted: f is near s / Σs in every row, and (Σs) H + C is right for all of them.
        """
        statistics, tensors = self.groups[group]
        modules = self._gradients.fisher.modules
        maps = [self._maps[name] for name in tensors if name in self._maps]
        prices = [modules[m.module] for m in maps if m.is_lookup and m.module in modules]
        if not prices or "gptq" not in self._config.methods:
            return statistics.train
        lookups = self._gradients.lookups.train.to(statistics.train.device)
        return prices[0].sum() * statistics.train + lookups

    def merge(self, ranks: Ranks) -> None:
        """Know the dampings of all ranks' Hessians."""
        told = ranks.union({str(group): damping for group, damping in self._escalated.items()})
        self._escalated = {int(group): damping for group, damping in told.items()}

    def dampings(self) -> tuple[Damping, ...]:
        """Return the dampings of Hessians that were not positive definite at the usual one."""
        return tuple(
            Damping(self.groups[i][0].modules, damping)
            for i, damping in sorted(self._escalated.items())
        )


def _reordered(inputs: Inputs, columns: torch.Tensor, methods: tuple[str, ...]) -> Inputs:
    """Of a tensor whose columns are not in the module's order."""
    at = columns.to(inputs.train.device)
    train, heldout = (h[at][:, at] for h in (inputs.train, inputs.heldout))
    return make_inputs(train, heldout, methods, train.device.type)


def make_inputs(
    train: torch.Tensor, heldout: torch.Tensor, methods: tuple[str, ...], device: str
) -> Inputs:
    """Make inputs of two Hessians, float32 (n, n), on the device; factorized where gptq is a
    method.
    """
    importance = train.diagonal().cpu().numpy().copy()
    train, heldout = train.to(device), heldout.to(device)
    factor: Factor | None = factorize(train, DAMPING) if "gptq" in methods else None
    return Inputs(importance, train, heldout, factor)
