"""Move powers of two between what writes a channel and what reads it, so that rounding costs less.

llama.cpp rounds the inputs of its products to 8 bits, in groups of 32 (Q8_0, Q8_1) or 256 (Q8_K)
under one scale: a channel with outliers spoils its group. A scale moves for free between a norm's
gain and the linear layers that read it, between `up` and `down`, and between `v` and `o`: the
channel's values shrink and their weights grow (SmoothQuant, arXiv:2211.10438; AWQ,
arXiv:2306.00978). Here scales are powers of two. So nothing is rounded: the model answers as
before, bit for bit, and its weights fit into the dtype that they had.

No architecture is written down here. Channels are tried: a place is one if its block answers as
before, bit for bit, when powers of two are moved there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quantkit.files import replacing
from quantkit.model.blockwise import BlockCall, BlockwiseModel, SharedKV

GROUP, WIDE_GROUP = 32, 256  # inputs under one scale: Q8_0's and Q8_1's; Q8_K's
WEIGHT_BITS = 5  # of a weight, for what its own rounding costs
N_TOKENS, N_ROWS = 512, 256  # that powers are fitted to, at most
N_TRIED = 16  # tokens that places are tried on
STEPS, RATE = 80, 0.12  # of Adam on log2 s
_ROWS, _COLUMNS = "/rows", "/columns"  # after a parameter's name, in a file
MOST = 12  # a channel's power of two, at most

_Answer = Callable[[], list[torch.Tensor]]


@dataclass(frozen=True)
class Powers:
    """The powers of two that parameters are multiplied by, int8: (n_rows,) by name, as writers; and
    (n_columns,), as readers.
    """

    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    columns: dict[str, torch.Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.rows or self.columns)

    def names(self) -> set[str]:
        """Return which parameters they change."""
        return self.rows.keys() | self.columns.keys()

    def apply(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return a parameter's values, multiplied: exact in their dtype."""
        for axis, powers in ((0, self.rows), (-1, self.columns)):
            if name in powers:
                factor = torch.exp2(powers[name].to(values.device).float()).to(values.dtype)
                shape = [1] * values.dim()
                shape[axis] = -1
                values = values * factor.view(shape)
        return values

    def save(self, path: Path) -> Path:
        """Write them as one file, and return it."""
        found = {f"{name}{_ROWS}": power.cpu() for name, power in self.rows.items()}
        found |= {f"{name}{_COLUMNS}": power.cpu() for name, power in self.columns.items()}
        with replacing(path) as part:
            save_file(found, part)
        return path

    @classmethod
    def load(cls, path: Path) -> Powers:
        """Read what `save` wrote."""
        found = load_file(path)

        def of(axis: str) -> dict[str, torch.Tensor]:
            return {n.removesuffix(axis): power for n, power in found.items() if n.endswith(axis)}

        return cls(of(_ROWS), of(_COLUMNS))

    def add(self, other: Powers, prefix: str) -> None:
        """Add those of parameters whose names begin with `prefix`."""
        for own, more in ((self.rows, other.rows), (self.columns, other.columns)):
            for name, power in more.items():
                own[prefix + name] = own.get(prefix + name, torch.zeros_like(power)) + power


@dataclass(frozen=True)
class Place:
    """Channels whose scale can move. Row `start` + c of the writer (a norm's gain, or a linear
    layer) writes channel c; input j of the readers is channel `channels[j]`, int64 (n_inputs,).
    Names are of modules inside their block.
    """

    writer: str
    start: int
    n_channels: int
    readers: tuple[str, ...]
    channels: torch.Tensor


def equalize(
    model: BlockwiseModel,
    ids: torch.Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Powers:
    """Return the powers that equalize the model's channels on the text `ids` (n_sequences,
    n_tokens). Parameters of a model that is not streamed are multiplied by them. A place whose
    powers would change an answer keeps what it has.
    """
    found = Powers()
    states, calls = model.trace(ids)
    tried, tried_calls = model.trace(ids[:1, :N_TRIED])
    shared: SharedKV = {}
    tried_shared: SharedKV = {}
    for index, block in enumerate(model.blocks):
        tried_call = tried_calls[index].with_shared_kv(tried_shared)
        answer = partial(_answer, model, index, tried, tried_call, tried_shared)
        with torch.no_grad(), model.holding(index):
            wanted = answer()
            places = _places(block, answer, wanted)
            with _inputs(block, {place.readers[0] for place in places}) as seen:
                states = model.run_block(index, states, calls[index].with_shared_kv(shared))
            for place in places:
                moved = _moved(block, place, _best_power(block, place, seen[place.readers[0]]))
                if not moved:
                    continue
                before = _multiply(block, moved)
                if _equal(answer(), wanted):
                    found.add(moved, f"{model.block_name(index)}.")
                else:
                    _put_back(block, before)
        tried = wanted[0]
        progress(index + 1, len(model.blocks))
    return found


def _answer(
    model: BlockwiseModel, index: int, hidden: torch.Tensor, call: BlockCall, shared: SharedKV
) -> list[torch.Tensor]:
    """The block's answer, and what it leaves for later blocks."""
    answer = model.run_block(index, hidden, call)
    return [answer, *(values for left in shared.values() for values in left)]


def _equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def moved_cost(
    inputs: torch.Tensor, weight: torch.Tensor, log2_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean squared errors at the outputs when inputs / s (n_tokens, n) are rounded to 8
    bits and weight * s (n_rows, n) to `WEIGHT_BITS`, each in groups under one scale: a step is the
    group's largest over half the number of steps, and its error a twelfth of its square.

    The sums over groups of sums of exponentials times maxima of them: convex in log s.
    """
    square = torch.exp2(2 * log2_scale)
    group = WIDE_GROUP if inputs.shape[1] % WIDE_GROUP == 0 else GROUP
    x, w = inputs.square() / square, weight.square() * square
    of_x = _in_groups(x, w.sum(0), group) / 127**2
    of_w = _in_groups(w, x.mean(0), GROUP) * len(w) / (2 ** (WEIGHT_BITS - 1) - 0.5) ** 2
    return of_x / 12, of_w / 12


def _in_groups(squares: torch.Tensor, price: torch.Tensor, group: int) -> torch.Tensor:
    """The mean over rows of a group's largest square times its price, summed over groups."""
    pad = -squares.shape[1] % group
    largest = nn.functional.pad(squares, (0, pad)).unflatten(1, (-1, group)).amax(2).mean(0)
    return (largest * nn.functional.pad(price, (0, pad)).unflatten(0, (-1, group)).sum(1)).sum()


def _best_power(block: nn.Module, place: Place, inputs: torch.Tensor) -> torch.Tensor:
    """The powers of two, float32 (n_channels,), by which a place's inputs are divided at the least
    cost; 0 where nothing is won.
    """
    rows = []
    for name in place.readers:
        weight = _weight(block, name).float()
        outputs = inputs @ weight.T
        some = weight[:: max(1, -(-len(weight) // N_ROWS))]
        # Errors are relative to a layer's outputs, and some rows stand for all of them.
        rows.append(some * (len(weight) / len(some) / outputs.square().sum(1).mean()).sqrt())
    weight = torch.cat(rows)
    channels = place.channels.to(weight.device)

    def cost(log2_scale: torch.Tensor) -> torch.Tensor:
        return torch.stack(moved_cost(inputs, weight, log2_scale[channels])).sum()

    none = torch.zeros(place.n_channels, device=weight.device)
    found = none.clone()
    with torch.enable_grad():
        found.requires_grad_(True)
        optimizer = torch.optim.Adam([found], lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            optimizer.zero_grad()
            cost(found).log().backward()
            optimizer.step()
            schedule.step()
    found = found.detach()
    power = (found - found.median()).round().clamp(-MOST, MOST)
    return power if cost(power) < cost(none) else none


def _moved(block: nn.Module, place: Place, power: torch.Tensor) -> Powers:
    """What a place's parameters are multiplied by. A channel one of whose weights its dtype could
    not hold stays.
    """
    made = _spread(block, place, power)
    for name in made.names():
        own = block.get_parameter(name).detach()
        times = made.apply(name, own)
        back = _spread(block, place, -power).apply(name, times)
        lost = ((back != own) | ~times.isfinite()).nonzero()
        if len(lost):
            channels = place.channels.to(lost.device)[lost[:, -1]]
            if name in made.rows:
                channels = lost[:, 0] - place.start
            power = power.clone()
            power[channels.to(power.device)] = 0
            return _moved(block, place, power)
    return made if power.any() else Powers()


def _spread(block: nn.Module, place: Place, power: torch.Tensor) -> Powers:
    made, power = Powers(), power.to(torch.int8)
    for name, parameter in block.get_submodule(place.writer).named_parameters():
        rows = torch.zeros(len(parameter), dtype=torch.int8, device=power.device)
        rows[place.start : place.start + place.n_channels] = -power
        made.rows[f"{place.writer}.{name}"] = rows
    for name in place.readers:
        made.columns[f"{name}.weight"] = power[place.channels.to(power.device)]
    return made


def _multiply(block: nn.Module, powers: Powers) -> dict[str, torch.Tensor]:
    """Multiply parameters. Return their values before."""
    before = {name: block.get_parameter(name).data for name in powers.names()}
    for name, values in before.items():
        block.get_parameter(name).data = powers.apply(name, values)
    return before


def _put_back(block: nn.Module, before: Mapping[str, torch.Tensor]) -> None:
    for name, values in before.items():
        block.get_parameter(name).data = values


# Where scales can move


@dataclass(frozen=True)
class _Group:
    """Linear layers that read the same values, the norms that wrote them, and the linear layers
    that ran before, by name.
    """

    readers: tuple[str, ...]
    norms: tuple[str, ...]
    before: tuple[str, ...]


def _places(block: nn.Module, answer: _Answer, wanted: list[torch.Tensor]) -> list[Place]:
    """The places of a block, each tried: whether it answers what is `wanted`."""
    found = []
    for group in _groups(block, answer):
        for place in _candidates(block, group):
            if _holds(block, place, answer, wanted):
                found.append(place)
                break
    return found


def _groups(block: nn.Module, answer: _Answer) -> list[_Group]:
    ran: list[tuple[str, nn.Module, torch.Tensor, torch.Tensor]] = []

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[torch.Tensor, ...], output: object) -> None:
            if given and isinstance(given[0], torch.Tensor) and isinstance(output, torch.Tensor):
                ran.append((name, module, given[0], output))  # alive, so that addresses are theirs

        return hook

    leaves = [(name, module) for name, module in block.named_modules() if not [*module.children()]]
    handles = [module.register_forward_hook(hook_of(name)) for name, module in leaves]
    try:
        answer()
    finally:
        for handle in handles:
            handle.remove()
    readers: dict[int, list[str]] = {}
    before: dict[int, tuple[str, ...]] = {}
    linears: list[str] = []
    for name, module, given, _ in ran:
        if isinstance(module, nn.Linear):
            before.setdefault(given.data_ptr(), tuple(linears))
            readers.setdefault(given.data_ptr(), []).append(name)
            linears.append(name)
    norms: dict[int, list[str]] = {}
    for name, module, _, output in ran:
        own = [*module.parameters()]
        if own and all(p.shape == output.shape[-1:] for p in own):
            norms.setdefault(output.data_ptr(), []).append(name)
    return [
        _Group(tuple(names), tuple(norms.get(at, ())), before[at]) for at, names in readers.items()
    ]


def _candidates(block: nn.Module, group: _Group) -> Iterator[Place]:
    n = _weight(block, group.readers[0]).shape[1]
    same = torch.arange(n)
    for name in group.norms:
        if len(next(block.get_submodule(name).parameters())) == n:  # else one of every head
            yield Place(name, 0, n, group.readers, same)
    known = (getattr(module, "head_dim", None) for module in block.modules())
    sizes = {size for size in known if isinstance(size, int)}
    for name in group.before if not group.norms else ():
        n_rows = len(_weight(block, name))
        if n_rows >= n:  # of a layer that is several in one, the last rows
            yield Place(name, n_rows - n, n, group.readers, same)
        elif n % n_rows == 0:  # heads that share their values
            for size in (size for size in sizes if n_rows % size == 0):
                heads = torch.arange(n_rows).view(-1, 1, size)
                channels = heads.expand(-1, n // n_rows, -1).reshape(-1)
                yield Place(name, 0, n_rows, group.readers, channels)


def _holds(block: nn.Module, place: Place, answer: _Answer, wanted: list[torch.Tensor]) -> bool:
    """Whether the block answers as before when powers of two are moved at a place."""
    generator = torch.Generator().manual_seed(0)
    power = torch.randint(-2, 3, (place.n_channels,), generator=generator).float()
    before = _multiply(block, _spread(block, place, power))
    try:
        return _equal(answer(), wanted)
    finally:
        _put_back(block, before)


@contextmanager
def _inputs(block: nn.Module, names: set[str]) -> Iterator[Mapping[str, torch.Tensor]]:
    """What linear layers read: every so many tokens, float32 (n_tokens, n_inputs)."""
    seen: dict[str, torch.Tensor] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            rows = given[0].flatten(0, -2)
            seen[name] = rows[:: max(1, len(rows) // N_TOKENS)].float()

        return hook

    handles = [block.get_submodule(n).register_forward_pre_hook(hook_of(n)) for n in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _weight(block: nn.Module, linear: str) -> torch.Tensor:
    return block.get_parameter(f"{linear}.weight").data
