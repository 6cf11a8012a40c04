"""What free scales win where llama.cpp rounds activations to 8 bits.

    python dev/experiments/activation_scales.py ceiling MODEL --fit wiki-a.txt --text wiki-b.txt
    python dev/experiments/activation_scales.py rewrite MODEL OUT --fit wiki-a.txt --weights 1
    python dev/experiments/activation_scales.py agree RUN FILE.gguf --text wiki-b.txt

A scale s of every channel moves for free between a norm's gain and the linears that read it,
between `up` and `down`, between `v` and `o`: x / s is what is rounded, W s is what is quantized.
MODEL is a checkpoint's folder. `ceiling` simulates the rounding in PyTorch with weights as they
are: the KL that the best scales can win. `rewrite` writes the checkpoint with its scales moved, a
model of the same outputs, which `quantkit run` quantizes like any other; `python -m evaluators.kl`
measures both files against the original's `base.gguf`. `agree` compares the simulation with
llama.cpp's own logits of a file that a run made.

The scales of a place minimize what the two roundings cost by the Fisher information. A group of 32
(or 256) activations is rounded in steps of max|x / s| / 127, which costs the sum of the gradients
(s dl/dx)^2 times a twelfth of the step squared; weights likewise, gradients and activations
exchanged. Both are sums of exponentials of log s and of maxima of them: convex, so that descent
finds the best. `--weights` is how much the second counts, 0 for nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import nn

from evaluators import agreement
from quantkit.ggml.types import QuantType
from quantkit.gguf_file.read import GgufFile
from quantkit.model.blockwise import load_model, load_tokenizer
from quantkit.model.row_maps import load_row_maps
from quantkit.run.folder import RunDir
from quantkit.sources.snapshot import load_snapshot

N_CTX = 512
STEPS, RATE = 80, 0.08  # of Adam on log s
FITTED = 512  # tokens and rows of weights that a scale is fitted to, at most


# Rounding, as llama.cpp does it


def group_of(qtype: QuantType) -> int:
    """Return how many activations share a scale under weights of a type on a CPU: Q8_K's 256 or
    Q8_0's and Q8_1's 32; 0 where activations are not rounded to integers.
    """
    if not qtype.is_quantized:
        return 0
    return 256 if qtype.block_size == 256 else 32


def rounded(x: torch.Tensor, group: int) -> torch.Tensor:
    """Round activations (..., n), float32, to 8 bits in groups of 32 (Q8_0) or 256 (Q8_K)."""
    parts = x.unflatten(-1, (-1, group))
    step = parts.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(step > 0, parts / step, 0).round()
    stored = step if group == 256 else step.half().float()  # Q8_K has a scale of 32 bits
    return (codes * stored).flatten(-2)


@contextmanager
def rounding(model: nn.Module, groups: Mapping[str, int]) -> Iterator[None]:
    """Round the inputs of linear layers, by name, for a while."""

    def round_input(group: int) -> Any:
        return lambda _, given: (rounded(given[0], group), *given[1:])

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(round_input(group))
        for name, group in groups.items()
        if group
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# Where scales can move


@dataclass(frozen=True)
class Place:
    """Channels whose scale can move from what writes them to what reads them.

    `writers` are parameters whose first axis is the channels; the readers' inputs are
    `channels[j]` of them, or the channels in their order.
    """

    name: str
    writers: tuple[str, ...]
    readers: tuple[str, ...]  # modules
    channels: torch.Tensor | None = None  # int64 (n_inputs,)

    def spread(self, per_channel: torch.Tensor) -> torch.Tensor:
        """Return values of channels for the inputs of the readers."""
        return per_channel if self.channels is None else per_channel[self.channels]


def places_of(model: nn.Module) -> list[Place]:
    """Return the places of a model of Llama's kind: RMS norms whose gain is their weight, gated
    layers, values by groups of heads. Raise ValueError for another.
    """
    config = model.config
    if config.model_type not in ("llama", "qwen2", "mistral"):
        raise ValueError(f"the places of {config.model_type} are not known")
    n_kv = config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    own = torch.arange(n_kv * size).view(n_kv, 1, size)
    of_heads = own.expand(-1, config.num_attention_heads // n_kv, -1).reshape(-1)
    names = dict(model.named_parameters())
    found = []
    for index in range(config.num_hidden_layers):
        block = f"model.layers.{index}."
        attn, mlp = f"{block}self_attn.", f"{block}mlp."

        def rows(linear: str) -> tuple[str, ...]:
            return tuple(n for n in (f"{linear}.weight", f"{linear}.bias") if n in names)

        qkv = tuple(f"{attn}{kind}_proj" for kind in "qkv")
        gate_up = (f"{mlp}gate_proj", f"{mlp}up_proj")
        found += [
            Place(f"{index}.attn", (f"{block}input_layernorm.weight",), qkv),
            Place(f"{index}.o", rows(f"{attn}v_proj"), (f"{attn}o_proj",), of_heads),
            Place(f"{index}.ffn", (f"{block}post_attention_layernorm.weight",), gate_up),
            Place(f"{index}.down", rows(f"{mlp}up_proj"), (f"{mlp}down_proj",)),
        ]
    return found


def moved(
    weights: Mapping[str, torch.Tensor], place: Place, scale: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the parameters that change when what is written is divided by `scale` (n_channels,)
    and what reads it multiplied: the same function.
    """
    found = {
        name: (weights[name].mT / scale).mT if weights[name].dim() > 1 else weights[name] / scale
        for name in place.writers
    }
    return found | {
        f"{name}.weight": weights[f"{name}.weight"] * place.spread(scale) for name in place.readers
    }


@torch.no_grad()
def move(model: nn.Module, places: Sequence[Place], scales: Mapping[str, torch.Tensor]) -> None:
    """Move scales in a model, in place; a place without one stays."""
    for place in places:
        if place.name in scales:
            own = dict(model.named_parameters())
            for name, values in moved(own, place, scales[place.name]).items():
                own[name].copy_(values)


# What roundings cost


@dataclass(frozen=True)
class Seen:
    """One place on some tokens, everything squared: the readers' input and the gradients of a drawn
    token's log-probability by it, float32 (n_tokens, n_inputs); the readers' weights, some rows of
    all, times the mean gradient by their outputs, (n_rows, n_inputs); how many times as many rows
    there are.
    """

    x: torch.Tensor
    gradient: torch.Tensor
    weight: torch.Tensor
    times: float

    @classmethod
    def of(
        cls, x: torch.Tensor, gradient: torch.Tensor, weight: torch.Tensor, outputs: torch.Tensor
    ) -> Seen:
        """Take every n-th token and row, so many as are fitted to."""
        step, stride = (max(1, -(-len(t) // FITTED)) for t in (x, weight))
        rows = weight[::stride].square() * outputs[::stride, None]
        return cls(x[::step].square(), gradient[::step].square(), rows, len(weight) / len(rows))


def see(
    model: nn.Module, places: Sequence[Place], ids: torch.Tensor, seed: int = 0
) -> dict[str, Seen]:
    """Run `ids` (n_sequences, n_ctx) forward and back, one by one, and return what every place
    sees.
    """
    xs: dict[str, list[torch.Tensor]] = {place.name: [] for place in places}
    gradients: dict[str, list[torch.Tensor]] = {place.name: [] for place in places}
    outputs: dict[str, torch.Tensor] = {}
    live: dict[str, torch.Tensor] = {}
    hooks = []

    def note_input(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[torch.Tensor]) -> None:
            live[name] = given[0]
            given[0].retain_grad()

        return hook

    def note_output(name: str) -> Any:
        def hook(_: nn.Module, __: Any, given: tuple[torch.Tensor]) -> None:
            squares = given[0].flatten(0, -2).square().sum(0)
            outputs[name] = outputs.get(name, 0) + squares

        return hook

    for place in places:
        first = model.get_submodule(place.readers[0])
        hooks.append(first.register_forward_pre_hook(note_input(place.name)))
        for name in place.readers:
            hooks.append(model.get_submodule(name).register_full_backward_hook(note_output(name)))
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)  # all that gradients have to reach
    try:
        for sequence in ids:
            log_p = model(sequence[None], use_cache=False).logits[0].float().log_softmax(-1)
            drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            log_p.gather(1, drawn).sum().backward()
            model.zero_grad(set_to_none=True)
            for place in places:
                x = live.pop(place.name)
                xs[place.name].append(x.detach()[0])
                assert x.grad is not None
                gradients[place.name].append(x.grad[0])
                x.grad = None
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for place in places:
        weight = torch.cat([model.get_submodule(name).weight.detach() for name in place.readers])
        squares = torch.cat([outputs[name] / ids.numel() for name in place.readers])
        x, gradient = torch.cat(xs.pop(place.name)), torch.cat(gradients.pop(place.name))
        found[place.name] = Seen.of(x, gradient, weight, squares)
    return found


def step_cost(rows: torch.Tensor, price: torch.Tensor, group: int) -> torch.Tensor:
    """Return the mean over rows of max(rows)^2 times the sum of `price`, summed over groups of
    columns: what rounding in steps of the largest of a group costs, but for a factor.

    `rows` (n, n_columns) are magnitudes squared; `price` has its shape or (n_columns,).
    """
    largest = rows.unflatten(-1, (-1, group)).amax(-1)
    prices = price.unflatten(-1, (-1, group)).sum(-1)
    return (largest * prices).mean(0).sum()


def costs(
    seen: Seen, log_scale: torch.Tensor, groups: tuple[int, int], of_weights: bool = True
) -> tuple[Any, Any]:
    """Return what rounding activations in groups of `groups[0]` to 8 bits costs with x / s, in nats
    per token, and what rounding W s in groups of `groups[1]` to 5 bits would by itself; 0 for it
    where it is not asked for.
    """
    square = (2 * log_scale).exp()
    of_x = step_cost(seen.x / square, seen.gradient * square, groups[0])
    of_x = of_x / 127**2 / 24
    if not of_weights:
        return of_x, 0.0
    of_w = step_cost(seen.weight * square, seen.x.mean(0) / square, groups[1])
    n_rows = len(seen.weight) * seen.times
    return of_x, of_w * n_rows * (2 / 31) ** 2 / 24


def best_scale(
    seen: Seen, place: Place, groups: tuple[int, int], weights: float
) -> tuple[torch.Tensor, tuple[float, float], tuple[float, float]]:
    """Return the scale (n_channels,) of a place that costs least, and both costs before and after.

    Weights are reached through `weights`, how much their cost counts. The power of a group's
    weights stays what it was.
    """
    n = seen.x.shape[1] if place.channels is None else int(place.channels.max()) + 1
    log_scale = torch.zeros(n, requires_grad=True)
    optimizer = torch.optim.Adam([log_scale], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    before = tuple(float(c) for c in costs(seen, torch.zeros(seen.x.shape[1]), groups))
    whole = before[0] + weights * before[1]
    for _ in range(STEPS):
        of_x, of_w = costs(seen, place.spread(log_scale), groups, weights > 0)
        loss = (of_x + weights * of_w).log()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    found = log_scale.detach()
    after = tuple(float(c) for c in costs(seen, place.spread(found), groups))
    if after[0] + weights * after[1] > whole:
        found, after = torch.zeros(n), before
    return (found - found.mean()).exp(), before, after


def fit(
    model: nn.Module, places: Sequence[Place], ids: torch.Tensor, weights: float, down: int
) -> dict[str, torch.Tensor]:
    """Return the best scale of every place; `down` is the group of what `down` reads."""
    seen, found = see(model, places, ids), {}
    total: dict[str, list[float]] = {}
    for place in places:
        kind = place.name.split(".")[1]
        groups = (down if kind == "down" else 32, 32)
        found[place.name], before, after = best_scale(seen.pop(place.name), place, groups, weights)
        sums = total.setdefault(kind, [0.0] * 4)
        total[kind] = [a + b for a, b in zip(sums, (*before, *after), strict=True)]
    for kind, (x, w, new_x, new_w) in total.items():
        print(
            f"  {kind:5} activations {x:.5f} -> {new_x:.5f}, weights {w:.5f} -> {new_w:.5f}",
            flush=True,
        )
    return found


# Judged


class Judge:
    """KL to the original on the second halves of windows of a text."""

    def __init__(self, model: nn.Module, folder: Path, text: Path, n_windows: int) -> None:
        ids = load_tokenizer(folder)(text.read_text("utf-8"), verbose=False).input_ids
        n = min(n_windows, len(ids) // N_CTX)
        self._windows = torch.tensor(ids[: n * N_CTX]).view(n, 1, N_CTX)
        self._wanted = [self._log_p(model, ids) for ids in self._windows]

    @torch.no_grad()
    def _log_p(self, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        states = model.model(ids, use_cache=False).last_hidden_state[0, N_CTX // 2 :]
        found: torch.Tensor = model.lm_head(states).float().log_softmax(-1)
        return found

    def kl(self, model: nn.Module) -> torch.Tensor:
        """Return the mean KL in nats per token of every window."""
        found = []
        for ids, wanted in zip(self._windows, self._wanted, strict=True):
            log_q = self._log_p(model, ids)
            found.append((wanted.exp() * (wanted - log_q)).sum(-1).mean())
        return torch.stack(found)


def said(kl: torch.Tensor, first: torch.Tensor | None = None) -> str:
    text = f"{kl.mean():.5f} ± {kl.std() / len(kl) ** 0.5:.5f}"
    if first is not None:
        text += f"  ratio {kl.mean() / first.mean():.3f}"
    return text


KINDS = {
    "attn": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "ffn": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
    "head": ("lm_head",),
}


def groups_of(model: nn.Module, kinds: Sequence[str], down: int) -> dict[str, int]:
    """Return the group of every linear layer of these kinds, by name: 32, and `down`."""
    wanted = {suffix: kind for kind in kinds for suffix in KINDS[kind]}
    return {
        name: down if wanted[name.rpartition(".")[2]] == "down" else 32
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in wanted
    }


def ceiling(given: argparse.Namespace) -> None:
    """Print the KL of rounding activations alone, by place, before and after scales moved."""
    folder, ids = given.model, fitted_to(given)
    model = load_model(folder, torch.float32, "cpu").eval()
    judge = Judge(model, folder, given.text, given.windows)
    whole = groups_of(model, tuple(KINDS), given.down)
    with rounding(model, whole):
        plain = judge.kl(model)
    print(f"all rounded: {said(plain)}", flush=True)
    blocks = groups_of(model, tuple(KINDS)[:-1], given.down)
    with rounding(model, blocks):
        alone = judge.kl(model)
    print(f"all but the head: {said(alone)}", flush=True)
    for kind in KINDS if given.kinds else ():
        with rounding(model, groups_of(model, (kind,), given.down)):
            print(f"{kind} rounded: {said(judge.kl(model))}", flush=True)
    places = places_of(model)
    for weights in given.weights:
        begun = time.perf_counter()
        changed = load_model(folder, torch.float32, "cpu").eval()
        move(changed, places, fit(changed, places, ids, weights, given.down))
        taken = time.perf_counter() - begun
        print(f"scales, weights count {weights}: {taken:.0f} s", flush=True)
        print(f"  not rounded {said(judge.kl(changed))}", flush=True)
        for name, groups, first in (("all", whole, plain), ("all but the head", blocks, alone)):
            with rounding(changed, groups):
                print(f"  {name} {said(judge.kl(changed), first)}", flush=True)


def rewrite(given: argparse.Namespace) -> None:
    """Write the checkpoint with its scales moved, in float32."""
    model = load_model(given.model, torch.float32, "cpu").eval()
    places = places_of(model)
    move(model, places, fit(model, places, fitted_to(given), given.weights[0], given.down))
    shutil.copytree(given.model, given.out, ignore=shutil.ignore_patterns("*.safetensors*"))
    model.save_pretrained(given.out)


@torch.no_grad()
def agree(given: argparse.Namespace) -> None:
    """Print how far llama.cpp's logits of a file are from PyTorch's with its weights, activations
    rounded and not.
    """
    folder = load_snapshot(RunDir(given.model)).folder
    model, file = load_model(folder, torch.float32, "cpu").eval(), GgufFile(given.file)
    maps = load_row_maps(RunDir(given.run).artifacts.row_maps)
    groups = {}
    for name, row_map in maps.items():
        values, parameter = file.values(name), model.get_parameter(row_map.parameter)
        row_map.scatter(torch.from_numpy(values).view(-1, values.shape[-1]), parameter.data)
        if isinstance(model.get_submodule(row_map.module), nn.Linear):
            groups[row_map.module] = group_of(file.tensors[name].qtype)
    ids = agreement.tokens_of(given.file, given.text.read_text("utf-8"), N_CTX)
    for name, used in (("rounded", groups), ("as they are", {})):
        with rounding(model, used):
            logits = model(torch.from_numpy(ids)[None].long(), use_cache=False).logits[0]
        print(name, agreement.measure(given.file, ids, logits.numpy()), flush=True)


def fitted_to(given: argparse.Namespace) -> torch.Tensor:
    """Token ids (n_sequences, N_CTX) from all over the text that scales are fitted to."""
    text = given.fit.read_text("utf-8")
    ids = torch.tensor(load_tokenizer(given.model)(text, verbose=False).input_ids)
    ids = ids[: len(ids) // N_CTX * N_CTX].view(-1, N_CTX)
    return ids[:: max(1, len(ids) // given.sequences)][: given.sequences]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    for command in (ceiling, rewrite, agree):
        own = commands.add_parser(command.__name__)
        own.set_defaults(command=command)
        own.add_argument("model", type=Path, metavar="RUN" if command is agree else "MODEL")
        own.add_argument("--fit", type=Path, required=command is not agree)
        own.add_argument("--sequences", type=int, default=4, help="of 512 tokens, to fit scales")
        own.add_argument("--weights", type=float, nargs="+", default=[0.0])
        own.add_argument("--down", type=int, default=256, help="activations of a group of down's")
        if command is rewrite:
            own.add_argument("out", type=Path)
        if command is agree:
            own.add_argument("file", type=Path)
        if command is not rewrite:
            own.add_argument("--text", type=Path, required=True)
            own.add_argument("--windows", type=int, default=12)
            own.add_argument("--kinds", action="store_true", help="each kind rounded alone, too")
    given = parser.parse_args()
    given.command(given)


if __name__ == "__main__":
    main()
