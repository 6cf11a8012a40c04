"""Collect Hessians of experts: linear layers whose weights are stacked in one 3-D parameter that no
nn.Linear owns.

Which tokens an expert reads is decided inside its layer's forward. So the matrix products are
watched while it runs: one of the factors lies in the memory of a 3-D parameter, and where it lies
there says which experts they are. No architecture is written down here; transformers' own grouped
product, which sorts tokens by expert once and multiplies all of them, is asked for.

Experts that are rarely chosen have few tokens. Their layer is asked once more, with every token
sent to experts in turn, and all inputs that an expert is *lent* so count `LENT` routed tokens
together: next to nothing for an expert with tokens of its own, everything for one without.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from quantkit.ranks.group import Ranks
from quantkit.statistics.hessian import add_outers, symmetrize

LENT = 64  # tokens that all inputs count which an expert would not have been given: dev/LOG.md

_PRODUCTS = {
    F.linear,
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.Tensor.matmul,
    torch.Tensor.mm,
    torch.Tensor.bmm,
    torch.Tensor.__matmul__,
}
_GROUPED: set[Any] = {F.grouped_mm, torch._grouped_mm}


@dataclass(frozen=True)
class Product:
    """A product of inputs with the weights of some experts of one parameter.

    `x` (n_rows, n_columns) are the inputs, expert after expert: those of expert `first + i` end
    before row `ends[i]`, int (n,) on their device. `output` has as many rows, in one axis or two.
    Layers that hand all tokens to all experts (`is_handed_all`) blank those that are not theirs.
    """

    parameter: str
    first: int
    ends: torch.Tensor
    x: torch.Tensor
    output: torch.Tensor
    is_handed_all: bool = False


Note = Callable[[Product], None]


def stacked_parameters(block: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    """Return the 3-D parameters of a block by their names in the model."""
    return {f"{prefix}.{n}": p for n, p in block.named_parameters() if p.dim() == 3}


class ExpertProducts(TorchFunctionMode):
    """While entered, calls `note` for every product of inputs with experts' weights."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], note: Note) -> None:
        super().__init__()
        self._note = note
        known = sorted((p.data_ptr(), name) for name, p in parameters.items())
        self._starts = [start for start, _ in known]
        self._names = [name for _, name in known]
        self._parameters = dict(parameters)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__ and self._is_choice(args):
            return args[0].select(0, int(args[1]))  # a view, whose place says which expert it is
        answer = func(*args, **kwargs)
        if func in _PRODUCTS:
            weight = args[1] if len(args) > 1 else kwargs.get("weight", kwargs.get("other"))
            if isinstance(weight, torch.Tensor):
                self._see(args[0] if args else kwargs["input"], weight, answer)
        elif func in _GROUPED and (found := self._find(args[1])) is not None:
            self._note(Product(*found, kwargs["offs"], args[0], answer))
        return answer

    def _is_choice(self, args: Any) -> bool:
        """Whether one expert is picked by a number in a tensor, which would copy its weight."""
        index = args[1]
        return (
            isinstance(index, torch.Tensor)
            and index.dim() == 0
            and index.dtype in (torch.int64, torch.int32)
            and args[0].dim() == 3
            and self._find(args[0]) is not None
        )

    def _find(self, weight: torch.Tensor) -> tuple[str, int] | None:
        """The parameter in whose memory `weight` begins, and the expert there."""
        address = weight.data_ptr()
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        name = self._names[at]
        parameter = self._parameters[name]
        expert = (address - self._starts[at]) // (parameter.stride(0) * parameter.element_size())
        return (name, expert) if expert < len(parameter) else None

    def _see(self, x: torch.Tensor, weight: torch.Tensor, answer: torch.Tensor) -> None:
        found = self._find(weight)
        if found is None:
            return
        if weight.dim() == 2:
            x = x.reshape(-1, x.shape[-1])
            self._note(Product(*found, torch.full((1,), len(x), device=x.device), x, answer))
        elif weight.dim() == 3 and x.dim() == 3 and len(x) == len(weight):
            ends = torch.arange(1, len(x) + 1, device=x.device) * x.shape[1]
            self._note(Product(*found, ends, x.flatten(0, 1), answer, is_handed_all=True))


@contextmanager
def grouped_experts(model: nn.Module) -> Iterator[None]:
    """Use transformers' grouped products of experts, whatever the config asks for, for a while."""
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    configs = [c for c in found.values() if hasattr(c, "_experts_implementation_internal")]
    before = [c._experts_implementation_internal for c in configs]
    for config in configs:
        config._experts_implementation_internal = "grouped_mm"
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._experts_implementation_internal = implementation


class ExpertCollector:
    """Sums of x xᵀ for every expert and every distinct input of one block's stacked weights, or for
    those experts of a group that are wanted.

    Groups are named after their first parameter. Sums are float32 (n_experts, n, n), token counts
    float32 (n_experts,), on the device of the activations; `n_tokens` are those that the router
    sent, `weights` what the lent ones add.
    """

    def __init__(
        self,
        block: nn.Module,
        prefix: str,
        n_tokens: int,
        lent: float = LENT,
        wanted: Callable[[str, int], range] = lambda group, n_experts: range(n_experts),
    ) -> None:
        """`n_tokens` is how many will be run in all."""
        self._block, self._wanted = block, wanted
        self._parameters = stacked_parameters(block, prefix)
        self._n_total, self._lent = n_tokens, lent
        self._share = 1.0  # what a token counts now
        self._is_lent = False
        self._last: tuple[torch.Tensor, str] | None = None
        self._calls: list[tuple[nn.Module, tuple[Any, ...]]] = []
        self.members: dict[str, tuple[str, ...]] = {}
        self.widths: dict[str, int] = {}
        self.n_experts: dict[str, int] = {}
        self.experts: dict[str, range] = {}  # those that are wanted of a group
        self.sums: dict[str, torch.Tensor] = {}
        self.n_tokens: dict[str, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Add the inputs of one forward call, and then those that are lent."""
        if not self._parameters:
            yield
            return
        self._calls.clear()
        handles = [
            module.register_forward_pre_hook(self._keep)
            for module in self._block.modules()
            if any(p.dim() == 3 for p in module.parameters(recurse=False))
        ]
        try:
            with ExpertProducts(self._parameters, self._add), grouped_experts(self._block):
                yield
                for handle in handles:
                    handle.remove()
                if self._lent:
                    self._lend()
        finally:
            self._last = None
            self._calls.clear()
            for handle in handles:
                handle.remove()

    def _keep(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._calls.append((module, args))

    def _lend(self) -> None:
        """Send every token of the call to experts in turn, where the layer takes the choice."""
        for module, args in self._calls:
            if len(args) < 3 or not _is_routed(args[0], args[1]):
                continue
            hidden, chosen, weights = args[:3]
            n_experts = max(len(p) for p in module.parameters() if p.dim() == 3)
            turn = torch.arange(len(hidden), device=hidden.device) % n_experts
            self._share = min(1.0, self._lent * n_experts / self._n_total)
            self._is_lent = True
            try:
                module(hidden, turn[:, None].to(chosen.dtype), weights[:, :1])
            finally:
                self._share, self._is_lent = 1.0, False

    def _add(self, product: Product) -> None:
        name, x = product.parameter, product.x
        last, group = self._last or (None, name)
        if last is not None and (last.data_ptr(), last.shape) == (x.data_ptr(), x.shape):
            # Gate and up read one tensor. It was kept, so its address is nobody else's.
            if name not in self.members[group]:
                self.members[group] += (name,)
            return
        group = next((g for g, names in self.members.items() if name in names), name)
        self._last = (x, group)
        if group not in self.members:
            self.members[group] = (name,)
            self._begin(group, x.shape[-1], len(self._parameters[name]), x.device)
        ends = product.ends
        if product.is_handed_all:
            own = (x != 0).any(1)
            x, ends = x[own], own.view(len(ends), -1).sum(1).cumsum(0)
        # The experts that are both wanted and in the product, counted from the first of either.
        wanted, first = self.experts[group], product.first
        low, high = max(wanted.start, first), min(wanted.stop, first + len(ends))
        if low >= high:
            return
        bounds = F.pad(ends, (1, 0))[low - first : high - first + 1]
        counts = bounds.diff()
        here = slice(low - wanted.start, high - wanted.start)
        add_outers(self.sums[group][here], x, bounds, self._share)
        self.weights[group][here] += self._share * counts
        if not self._is_lent:
            self.n_tokens[group][here] += counts

    def merge(self, ranks: Ranks, device: torch.device) -> None:
        """Make groups, sums and counts those of all ranks together, lent tokens included."""
        if ranks.is_alone:
            return
        known = ranks.union(
            {g: [names, self.widths[g], self.n_experts[g]] for g, names in self.members.items()}
        )
        for group, (names, n, n_experts) in known.items():
            self.members[group] = tuple(names)
            if group not in self.widths:
                self._begin(group, n, n_experts, device)
        self.members = {group: self.members[group] for group in known}  # in the order of all ranks
        self.widths = {group: self.widths[group] for group in known}
        self.sums = {group: self.sums[group] for group in known}
        ranks.sum(
            tensor
            for group in known
            for tensor in (self.sums[group], self.n_tokens[group], self.weights[group])
        )

    def _begin(self, group: str, n: int, n_experts: int, device: torch.device) -> None:
        """Begin the sums of a group."""
        self.widths[group], self.n_experts[group] = n, n_experts
        wanted = self.experts[group] = self._wanted(group, n_experts)
        self.sums[group] = torch.zeros((len(wanted), n, n), device=device)
        self.n_tokens[group] = torch.zeros(len(wanted), device=device)
        self.weights[group] = torch.zeros(len(wanted), device=device)

    def means(self) -> dict[str, torch.Tensor]:
        """Return the Hessians, float32 (n_experts, n, n) by group; the sums are used up.

        An expert that no token reached gets the mean of its layer, of which what is wanted stands
        for all.
        """
        for group, total in self.sums.items():
            weights = self.weights[group]
            missing = weights == 0
            symmetrize(total).div_(weights.clamp_min(1e-9)[:, None, None])
            if bool(missing.any()) and not bool(missing.all()):
                total[missing] = torch.tensordot(weights / weights.sum(), total, 1)
        found, self.sums = self.sums, {}
        return {group: hessians for group, hessians in found.items() if len(hessians)}


def _is_routed(hidden: Any, chosen: Any) -> bool:
    return (
        isinstance(hidden, torch.Tensor)
        and isinstance(chosen, torch.Tensor)
        and hidden.dim() == chosen.dim() == 2
        and len(hidden) == len(chosen)
        and not chosen.is_floating_point()
    )
