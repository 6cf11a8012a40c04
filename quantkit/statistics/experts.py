"""Collect Hessians of experts: linear layers whose weights are stacked in one 3-D parameter that no
nn.Linear owns.

Which tokens an expert reads is decided inside its layer's forward. So the matrix products are
watched while it runs: one of the factors lies in the memory of a 3-D parameter, and where it lies
there says which expert it is. No architecture is written down here; transformers' own loop over
experts, its "eager" implementation, is asked for while watching.

Experts that are rarely chosen have few tokens. Their layer is asked once more, with every token
sent to experts in turn, and all inputs that an expert is *lent* so count `LENT` routed tokens
together: next to nothing for an expert with tokens of its own, everything for one without.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from quantkit.statistics.hessian import add_outer, symmetrize

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

Note = Callable[[str, int, torch.Tensor, torch.Tensor], None]
"""Told of a product: parameter, expert, its input (n_tokens, n_columns), its output. An input
with three axes is that of all experts from that one on.
"""


def stacked_parameters(block: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    """Return the 3-D parameters of a block by their names in the model."""
    return {f"{prefix}.{n}": p for n, p in block.named_parameters() if p.dim() == 3}


class ExpertProducts(TorchFunctionMode):
    """While entered, calls `note` for every product of inputs with one expert's weight."""

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
            self._note(*found, x.reshape(-1, x.shape[-1]), answer)
        elif weight.dim() == 3 and x.dim() == 3 and len(x) == len(weight):
            self._note(*found, x, answer)


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Use transformers' loop over experts instead of its grouped products, for a while."""
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    configs = [c for c in found.values() if hasattr(c, "_experts_implementation_internal")]
    before = [c._experts_implementation_internal for c in configs]
    for config in configs:
        config._experts_implementation_internal = "eager"
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
            with ExpertProducts(self._parameters, self._add), eager_experts(self._block):
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

    def _add(self, name: str, expert: int, x: torch.Tensor, _: torch.Tensor) -> None:
        last, group = self._last or (None, name)
        if last is not None and (last.data_ptr(), last.shape) == (x.data_ptr(), x.shape):
            # Gate and up read one tensor. It was kept, so its address is nobody else's.
            if name not in self.members[group]:
                self.members[group] += (name,)
            return
        group = next((g for g, names in self.members.items() if name in names), name)
        self._last = (x, group)
        if group not in self.members:
            n = x.shape[-1]
            self.members[group], self.widths[group] = (name,), n
            self.n_experts[group] = len(self._parameters[name])
            wanted = self.experts[group] = self._wanted(group, self.n_experts[group])
            self.sums[group] = torch.zeros((len(wanted), n, n), device=x.device)
            self.n_tokens[group] = torch.zeros(len(wanted), device=x.device)
            self.weights[group] = torch.zeros(len(wanted), device=x.device)
        wanted = self.experts[group]
        for position, own in enumerate(x if x.dim() == 3 else x[None], expert):
            if position not in wanted:
                continue
            index = position - wanted.start
            # Layers that hand all tokens to all experts blank those that are not theirs.
            own = own[(own != 0).any(1)]
            add_outer(self.sums[group][index], own if self._share == 1 else own * self._share**0.5)
            self.weights[group][index] += self._share * len(own)
            if not self._is_lent:
                self.n_tokens[group][index] += len(own)

    def means(self) -> dict[str, torch.Tensor]:
        """Return the Hessians, float32 (n_experts, n, n) by group; the sums are used up.

        An expert that no token reached gets the mean of its layer, of which what is wanted stands
        for all.
        """
        for group, total in self.sums.items():
            weights = self.weights[group]
            missing = weights == 0
            for expert in range(len(total)):
                total[expert] = symmetrize(total[expert]) / weights[expert].clamp_min(1e-9)
            if bool(missing.any()) and not bool(missing.all()):
                shares = (weights / weights.sum())[:, None, None]
                total[missing] = (total * shares).sum(0)
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
