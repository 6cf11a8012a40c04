"""One pass over the blocks: what goes into every linear layer, a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from quantkit.config import N_CTX
from quantkit.machine.memory import free_memory
from quantkit.model.blockwise import BlockwiseModel
from quantkit.model.offload import States
from quantkit.ranks.group import ALONE, Ranks
from quantkit.statistics.experts import ExpertCollector, grouped_experts
from quantkit.statistics.hessian import HessianCollector, is_linear
from quantkit.statistics.inputs import BlockStatistics
from quantkit.statistics.turns import Everything, Turn, most_bytes, share_out

BATCH_TOKENS = 4096  # per forward call
ACTIVATIONS_SHARE = 0.25  # of the free memory; what is more lies in a file
HESSIANS_SHARE = 0.4  # of the free memory of the device; where a block has more, it is run in turns
HEAD = "head"

Batch = tuple[str, torch.Tensor]  # train or heldout, and token ids (n_sequences, n_ctx)
Use = Callable[[str, Iterable[BlockStatistics]], None]


def block_names(n_blocks: int) -> list[str]:
    """Return what `walk` calls the blocks of a model, in their order, and its head."""
    return [*(f"block-{index:03d}" for index in range(n_blocks)), HEAD]


def walk(
    model: BlockwiseModel,
    tokens: Mapping[str, NDArray[np.int64]],
    done: Container[str],
    use: Use,
    spill: Path,
    ranks: Ranks = ALONE,
    ran: Callable[[float], None] = lambda share: None,
) -> None:
    """Run all blocks over all tokens, int64 (n_sequences, n_ctx) each of `train` and `heldout`.
    Every rank runs its share of the batches, whose hidden states stay there; the statistics are
    those of all.

    `use` is called with the name and the statistics of every block that is not in `done`, and of
    the head. Where they do not fit in memory they come in turns, for each of which the block is run
    again: it has to let go of a turn before it takes the next, and has to take all. Blocks in
    `done` are run forward, unless nothing that is left comes after them. Hidden states that do not
    fit in memory go to the file `spill`. `ran` is told
    which share of a block's text was run, between the turns that `use` takes.
    """
    names = block_names(len(model.blocks))
    left = [position for position, name in enumerate(names) if name not in done]
    if not left:
        return
    batches = ranks.share(_batches(tokens, model.device))
    n_tokens = {part: ids.size for part, ids in tokens.items()}
    states = _embedded(model, batches, spill)
    for index, name in enumerate(names[: left[-1] + 1]):
        if name == HEAD:
            use(name, [_at_head(model, batches, states, n_tokens, ranks)])
        elif index in left:
            use(name, _in_turns(model, index, batches, states, n_tokens, ranks, ran))
        else:
            _run(model, index, batches, states, {})
    states.clear()


def _batches(tokens: Mapping[str, NDArray[np.int64]], device: torch.device | str) -> list[Batch]:
    step = BATCH_TOKENS // N_CTX
    return [
        (part, torch.from_numpy(ids[i : i + step]).to(device))
        for part, ids in tokens.items()
        for i in range(0, len(ids), step)
    ]


def _embedded(model: BlockwiseModel, batches: Sequence[Batch], spill: Path) -> States:
    """The hidden states before the first block: on the model's device where all have room there,
    for most of a pass would go by on their way to memory and back.
    """
    kind = model.device.type
    if not batches:  # fewer than there are ranks
        return States(spill, 0, kind)
    first = model.trace(batches[0][1])[0]
    if first.nbytes * len(batches) > ACTIVATIONS_SHARE * free_memory(kind):
        kind = "cpu"
    states = States(spill, int(ACTIVATIONS_SHARE * free_memory(kind)), kind)
    states.put(0, first, {})
    for i, (_, ids) in enumerate(batches[1:], 1):
        states.put(i, model.trace(ids)[0], {})
    return states


def _in_turns(
    model: BlockwiseModel,
    index: int,
    batches: Sequence[Batch],
    states: States,
    n_tokens: Mapping[str, int],
    ranks: Ranks,
    ran: Callable[[float], None],
) -> Iterator[BlockStatistics]:
    room = ranks.least(int(HESSIANS_SHARE * free_memory(model.device.type)))
    turns: list[Turn] = [Everything()]
    with model.holding(index):
        if most_bytes(model.blocks[index]) > room:
            watchers = _watchers(model, index, n_tokens, Turn(frozenset(), {}))
            _run(model, index, batches, states, watchers, is_last=False)
            _merge(watchers, ranks, model.device)
            turns = share_out(*watchers["train"], room)
    for i, turn in enumerate(turns):

        def in_all(share: float, before: int = i) -> None:
            ran((before + share) / len(turns))

        with model.holding(index):
            watchers = _watchers(model, index, n_tokens, turn)
            _run(model, index, batches, states, watchers, is_last=turn is turns[-1], ran=in_all)
            _merge(watchers, ranks, model.device)
        linears = {part: linear for part, (linear, _) in watchers.items()}
        experts = {part: expert for part, (_, expert) in watchers.items()}
        yield BlockStatistics.of(linears, experts)


Watchers = dict[str, tuple[HessianCollector, ExpertCollector]]  # by part


def _watchers(
    model: BlockwiseModel, index: int, n_tokens: Mapping[str, int], turn: Turn
) -> Watchers:
    """Collectors for linear layers and for stacked weights; `n_tokens` are those of all ranks."""
    block, prefix = model.blocks[index], model.block_name(index)
    linears = {f"{prefix}.{n}": m for n, m in block.named_modules() if is_linear(m)}
    return {
        part: (
            HessianCollector(linears, turn.takes),
            ExpertCollector(block, prefix, n, wanted=turn.experts_of),
        )
        for part, n in n_tokens.items()
    }


def _merge(watchers: Watchers, ranks: Ranks, device: torch.device) -> None:
    for collectors in watchers.values():
        for collector in collectors:
            collector.merge(ranks, device)


def _run(
    model: BlockwiseModel,
    index: int,
    batches: Sequence[Batch],
    states: States,
    watchers: Mapping[str, Sequence[HessianCollector | ExpertCollector]],
    is_last: bool = True,
    ran: Callable[[float], None] = lambda share: None,
) -> None:
    """Run a block over batches; its watchers see those of a part. The states become those behind
    the block unless it is run again. Whether it is watched or not, its experts are multiplied in
    one grouped product: loops round otherwise, and a killed run would go on with other states.
    """
    with model.holding(index), grouped_experts(model.blocks[index]), torch.no_grad():
        for i, (part, ids) in enumerate(batches):
            hidden, shared_kv = states.get(i, ids.device)
            call = model.trace(ids)[1][index].with_shared_kv(shared_kv)
            with ExitStack() as stack:
                for watcher in watchers.get(part, ()):
                    stack.enter_context(watcher.watching())
                hidden = model.run_block(index, hidden, call)
            if is_last:
                states.put(i, hidden, shared_kv)
            ran((i + 1) / len(batches))


def _at_head(
    model: BlockwiseModel,
    batches: Sequence[Batch],
    states: States,
    n_tokens: Mapping[str, int],
    ranks: Ranks,
) -> BlockStatistics:
    collectors = {part: HessianCollector(model.head_linears()) for part in n_tokens}
    for i, (part, ids) in enumerate(batches):
        with collectors[part].watching():
            model.head_input(states.get(i, ids.device)[0])
    for collector in collectors.values():
        collector.merge(ranks, model.device)
    return BlockStatistics.of(collectors)
