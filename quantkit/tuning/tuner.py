"""Tune a found allocation by gradients: block after block, codes and scales of all its tensors move
together, so that the block gives what the original's gives.

GPTQ and the descent judge a tensor by its own outputs, for inputs of the original model. Here a
block reads what the tuned blocks before it leave, so that it makes up for their errors, too, and
tensors make up for each other. Roundings are passed straight through (Bengio et al.,
arXiv:1308.3432); types, sizes and the integer scales of K-quants stay. What a block became is kept
where it is nearer to the original on sequences that it was not tuned on.

Where there are several ranks, every one passes its own sequences through the blocks, and tunes its
own rows of every tensor (`quantkit.tuning.shards`). All call the same methods in the same order.

Hidden states are (n_batch, n_ctx, n_embd), float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.func import functional_call

from quantkit.ggml import native
from quantkit.ggml.codebooks import CODEBOOKS
from quantkit.ggml.decode import READABLE, values_of
from quantkit.ggml.types import QuantType
from quantkit.machine.memory import free_memory
from quantkit.model.blockwise import BlockCall, BlockwiseModel, SharedKV, compute_dtype
from quantkit.model.offload import States
from quantkit.model.row_maps import RowMap
from quantkit.ranks.group import ALONE, Ranks
from quantkit.tuning.shards import Shards
from quantkit.tuning.tunable import Tunable
from quantkit.tuning.tunable_units import TunableUnits

STATES_SHARE = 0.1  # of the free memory, for each of the streams of hidden states
ROUNDS = 3  # how often a sequence is seen, where there are enough of them
_BETAS, _EPSILON = (0.9, 0.95), 1e-12  # Adam's


@dataclass(frozen=True)
class Effort:
    """Steps of Adam for every block, and how many sequences each of them sees. Rates fall to zero:
    `rate_codes` is in steps between codes, `rate_scales` relative to d and dmin.
    """

    n_steps: int
    n_batch: int
    rate_codes: float = 5e-3
    rate_scales: float = 5e-4
    rate_units: float = 1e-2
    rate_integers: float = 0.0


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it: packed rows uint8 (n_rows, row_bytes). `is_kept`: they are a
    quantized source's own, and stay.
    """

    qtype: QuantType
    packed: native.Bytes
    is_kept: bool = False


@dataclass(frozen=True)
class TunedBlock:
    """The result of tuning a block. Errors are squared, over the power of the original's output, on
    held-out sequences; `rows` by tensor, none where tuning did not help.
    """

    before: float
    after: float
    rows: dict[str, native.Bytes]


@dataclass(frozen=True)
class _Batch:
    ids: torch.Tensor
    calls: list[BlockCall]


class Tuner:
    """Takes the blocks of a model in their order, each once.

    Three streams of hidden states pass the blocks: the original's, that of the file as it is being
    tuned, and on held-out sequences that of the file as it was.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        maps: Mapping[str, RowMap],
        stored: Mapping[str, Stored],
        train: torch.Tensor,
        heldout: torch.Tensor,
        effort: Effort,
        scratch: Path,
        exact: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        """`model` holds the original's weights in float32 and gets them back; `stored` are the
        tensors of the file. `train` and `heldout` are token ids (n_sequences, n_ctx); `scratch` is
        a folder. `exact`: products in float32 where bf16 would be faster.
        """
        self._model, self._maps, self._effort, self._exact = model, maps, effort, exact
        self._ranks = ranks
        self._stored = {name: s for name, s in stored.items() if name in maps}
        self._of_block: dict[int | None, list[str]] = {}
        for name in self._stored:
            block = model.block_of(maps[name].parameter)
            self._of_block.setdefault(block, []).append(name)
        n = effort.n_batch
        train = train[: max(n, effort.n_steps * n // ROUNDS)]
        parts = [p for ids in (train, heldout) for p in ids.to(model.device).split(n)]
        self._n_train = len(train.split(n))
        self._batches = [_Batch(ids, model.trace(ids)[1]) for ids in parts]
        self._n_embd = model.trace(parts[0])[0].shape[-1]
        # What blocks leave beside hidden states is not sent to others.
        leaves = any(call.shared for batch in self._batches for call in batch.calls)
        self._is_shared_out = not ranks.is_alone and not leaves
        self._own = list(range(len(parts)))
        if self._is_shared_out:
            self._own = ranks.share(range(self._n_train)) + ranks.share(self._heldout)
        room = int(STATES_SHARE * free_memory(str(model.device)))
        names = ("original", "tuned", "plain")
        self._streams = {
            s: States(scratch / f"tuning-{s}.partial", room, model.device) for s in names
        }
        self._embed()
        self._lay_outside("cpu")  # no block reads it

    @property
    def is_streamed(self) -> bool:
        """Return whether the model's blocks are read one by one."""
        return self._model.is_streamed

    @property
    def n_blocks(self) -> int:
        return len(self._model.blocks)

    @property
    def _heldout(self) -> range:
        return range(self._n_train, len(self._batches))

    @property
    def _own_heldout(self) -> list[int]:
        """Those of the held-out batches that this rank passes through the blocks."""
        return [i for i in self._own if i >= self._n_train]

    def _embed(self) -> None:
        """The first block's inputs: of the original, and of the file's table of embeddings."""
        for i in self._own:
            self._put("original", i, self._model.trace(self._batches[i].ids)[0], {})
        with self._outside_as_stored():
            for i in self._own:
                hidden = self._model.trace(self._batches[i].ids)[0]
                self._put("tuned", i, hidden, {})
                if i in self._heldout:
                    self._put("plain", i, hidden, {})

    def _put(self, stream: str, batch: int, hidden: torch.Tensor, shared_kv: SharedKV) -> None:
        self._streams[stream].put(batch, hidden, shared_kv)

    def _get(self, stream: str, batch: int) -> tuple[torch.Tensor, SharedKV]:
        return self._streams[stream].get(batch, self._model.device)

    def _wanted(self, batch: int) -> torch.Tensor:
        """The original's hidden state."""
        return self._get("original", batch)[0]

    def _lay_outside(self, device: str | torch.device) -> None:
        """Move the table of embeddings and the head, as the original and as the file has them."""
        for name, changed in self._outside.items():
            parameter = self._model.model.get_parameter(name)
            parameter.data = parameter.data.to(device)
            self._outside[name] = changed.to(device)

    @contextmanager
    def _outside_as_stored(self) -> Iterator[None]:
        """What lies outside of blocks as the file holds it, for a while."""
        parameters = {name: self._model.model.get_parameter(name) for name in self._outside}
        before = {name: parameter.data for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.data = self._outside[name]
        try:
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = before[name]

    @cached_property
    def _outside(self) -> dict[str, torch.Tensor]:
        """Parameters outside of blocks as the file holds them."""
        found: dict[str, torch.Tensor] = {}
        for name in self._of_block.get(None, ()):
            map_ = self._maps[name]
            if map_.parameter not in found:
                found[map_.parameter] = self._model.weight(map_.parameter).clone()
            changed = found[map_.parameter]
            map_.scatter(self._decoded(name).to(changed.device), changed)
        return found

    def _decoded(self, name: str) -> torch.Tensor:
        """float32 (n_rows, n_columns) of a tensor of the file."""
        return self._values({name: self._stored[name].packed})[name]

    def _values(self, packed: Mapping[str, native.Bytes]) -> dict[str, torch.Tensor]:
        """float32 (n_rows, n_columns) of tensors with these rows."""
        types = {name: self._stored[name].qtype for name in packed}
        return {
            name: values_of(rows, types[name], self._model.device) for name, rows in packed.items()
        }

    def block(self, index: int, known: TunedBlock | None = None) -> TunedBlock:
        """Tune block `index`, or take what is `known` of it, to rank 0, from an earlier run; all
        streams have passed the block then.
        """
        names = self._of_block.get(index, [])
        known = self._told(known)
        with self._model.holding(index):
            self._pass("original", index, self._own, {})
            plain = {name: self._decoded(name) for name in names}
            self._pass("plain", index, self._own_heldout, self._weights(index, plain))
            tuned = known or self._tune(index, plain)
            rows = self._values(tuned.rows)
            self._pass("tuned", index, self._own, self._weights(index, plain | rows))
        return tuned

    def _told(self, known: TunedBlock | None) -> TunedBlock | None:
        """What rank 0 has of a block."""
        if self._ranks.is_alone:
            return known
        told = self._ranks.tell(known and [known.before, known.after, list(known.rows)])
        if told is None:
            return None
        before, after, names = told
        rows = {}
        for name in names:
            packed = known.rows[name] if known else np.empty_like(self._stored[name].packed)
            rows[name] = self._ranks.broadcast(torch.from_numpy(packed.copy())).numpy()
        return TunedBlock(before, after, rows)

    def kl(self) -> tuple[float, float]:
        """Return KL(original || file) in nats per token on the held-out sequences, before and
        after. All blocks must have been taken.
        """
        self._lay_outside(self._model.device)
        streams = "plain", "tuned"
        sums = torch.zeros(len(self._batches), self._effort.n_batch, len(streams)).double()
        for i in self._own_heldout:
            for n in range(len(self._batches[i].ids)):
                wanted = self._logits("original", i, n).log_softmax(-1)
                with self._outside_as_stored():
                    for k, stream in enumerate(streams):
                        found = self._logits(stream, i, n).log_softmax(-1)
                        sums[i, n, k] = float((wanted.exp() * (wanted - found)).sum())
        self._complete(sums)
        n_tokens = sum(self._batches[i].ids.numel() for i in self._heldout)
        plain, tuned = (sums.sum((0, 1)) / n_tokens).tolist()
        return plain, tuned

    def _complete(self, found: torch.Tensor) -> None:
        """Bring what other ranks found of their batches: zeros here."""
        if self._is_shared_out:
            self._ranks.sum([found])

    def _logits(self, stream: str, batch: int, sequence: int) -> torch.Tensor:
        """float32 (n_ctx, n_vocab) of one sequence."""
        hidden = self._get(stream, batch)[0][sequence : sequence + 1]
        return self._model.head(hidden)[0].float()

    @torch.no_grad()
    def _pass(
        self, stream: str, index: int, batches: Sequence[int], weights: Mapping[str, torch.Tensor]
    ) -> None:
        for i in batches:
            hidden, shared_kv = self._get(stream, i)
            with self._products():
                answer = self._run(index, i, hidden, shared_kv, weights)
            self._put(stream, i, answer.float(), shared_kv)

    def _batch(self, batch: int) -> tuple[torch.Tensor, SharedKV, torch.Tensor]:
        """What the block reads of a batch, and the original's hidden state after it: on every rank,
        whoever passes the batch through the blocks.
        """
        if batch in self._own:
            hidden, shared_kv = self._get("tuned", batch)
            both = torch.stack([hidden, self._wanted(batch)])
        else:
            shape = 2, *self._batches[batch].ids.shape, self._n_embd
            both, shared_kv = torch.zeros(shape, device=self._model.device), {}
        self._complete(both)
        return both[0], shared_kv, both[1]

    def _run(
        self,
        index: int,
        batch: int,
        hidden: torch.Tensor,
        shared_kv: SharedKV,
        weights: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """The hidden state after a block with other `weights`, by the names of its parameters; what
        it leaves for later blocks is added to `shared_kv`.
        """
        call = self._batches[batch].calls[index].with_shared_kv(shared_kv)
        block, arguments = self._model.blocks[index], (hidden, *call.args)
        answer = functional_call(block, dict(weights), arguments, call.kwargs)
        return answer[0] if isinstance(answer, tuple) else answer

    def _weights(self, index: int, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The block's parameters with these values (n_rows, n_columns) of the file's tensors,
        gradients included.
        """
        prefix = self._model.block_name(index) + "."
        found: dict[str, torch.Tensor] = {}
        for name, rows in values.items():
            map_ = self._maps[name]
            key = map_.parameter.removeprefix(prefix)
            original = self._model.model.get_parameter(map_.parameter).data
            rows = rows.to(original.device, original.dtype)
            if map_.is_identity:
                found[key] = rows.view(original.shape)
                continue
            if key not in found:
                found[key] = original.clone()
            map_.scatter(rows, found[key])
        return found

    def _tune(self, index: int, plain: Mapping[str, torch.Tensor]) -> TunedBlock:
        stored = {name: self._stored[name] for name in plain}
        names = [n for n, s in stored.items() if s.qtype in READABLE and not s.is_kept]
        before = self._error(index, plain)
        if not names or not before:
            return TunedBlock(before, before, {})
        shards = self._shards(index, list(plain))
        fixed = {n: shards.fixed(n, values) for n, values in plain.items() if n not in names}
        device = self._model.device
        own = {n: shards.own(n, torch.from_numpy(self._stored[n].packed.copy())) for n in names}
        own = {name: packed.to(device) for name, packed in own.items()}
        rows = {name: self._tunable(name, own[name], shards) for name in names if len(own[name])}
        groups = _groups(list(rows.values()), self._effort)
        # Of many weights each has a small share of the gradient: the usual epsilon would hide it.
        on_gpu = self._model.device.type == "cuda"  # there it is one pass over memory
        optimizer = torch.optim.Adam(groups, betas=_BETAS, eps=_EPSILON, fused=on_gpu)
        n_steps = self._effort.n_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / n_steps)
        for batch in self._order(index):
            optimizer.zero_grad(set_to_none=True)
            hidden, shared_kv, wanted = self._batch(batch)
            with torch.enable_grad(), self._products(), shards.running():
                values = fixed | {n: shards.tuned(n, r.weight()) for n, r in rows.items()}
                weights = shards.weights(values, names)
                answer = self._run(index, batch, hidden, shared_kv, weights)
                loss = _distance(answer.float(), wanted) / before
            with self._products():
                loss.backward()
            optimizer.step()
            schedule.step()
        own |= {name: r.packed() for name, r in rows.items()}
        packed = {name: shards.whole(name, own[name]).cpu().numpy() for name in names}
        after = self._error(index, {**plain, **self._values(packed)})
        return TunedBlock(before, after, packed if after < before else {})

    def _shards(self, index: int, names: Sequence[str]) -> Shards:
        maps = {name: self._maps[name] for name in names}
        n_rows = {name: len(self._stored[name].packed) for name in names}
        return Shards(self._ranks, self._model, index, maps, n_rows)

    def _tunable(self, name: str, packed: torch.Tensor, shards: Shards) -> Tunable | TunableUnits:
        """This rank's rows of a tensor, which are stored as `packed`."""
        qtype = self._stored[name].qtype
        if qtype in CODEBOOKS:
            return TunableUnits(qtype, packed)
        map_ = self._maps[name]
        original = map_.gather(self._model.model.get_parameter(map_.parameter).data)
        return Tunable(qtype, packed, shards.own(name, original))

    def _order(self, index: int) -> Iterator[int]:
        """The batches of the steps: all of them in a new order, over and over."""
        generator = torch.Generator().manual_seed(index)
        left: list[int] = []
        for _ in range(self._effort.n_steps):
            left = left or torch.randperm(self._n_train, generator=generator).tolist()
            yield left.pop()

    @torch.no_grad()
    def _error(self, index: int, values: Mapping[str, torch.Tensor]) -> float:
        """The distance of the block's output from the original's, on held-out sequences, for what
        the tuned blocks before it give.
        """
        weights = self._weights(index, values)
        found = torch.zeros(len(self._batches), device=self._model.device)
        for i in self._own_heldout:
            with self._products():
                answer = self._run(index, i, *self._get("tuned", i), weights)
            found[i] = _distance(answer.float(), self._wanted(i))
        self._complete(found)
        return float(found[self._n_train :].mean())

    @contextmanager
    def _products(self) -> Iterator[None]:
        """bf16 on a CPU that has it, TF32 on a GPU; float32 where files are nearer to the original
        than that rounds.
        """
        if self._model.device.type == "cpu":
            enabled = not self._exact and compute_dtype("cpu") == torch.bfloat16
            with torch.autocast("cpu", torch.bfloat16, enabled):
                yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest" if self._exact else "high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def _groups(rows: Sequence[Tunable | TunableUnits], effort: Effort) -> list[dict[str, Any]]:
    """What Adam moves, and how fast."""
    units = [r for r in rows if isinstance(r, TunableUnits)]
    by_rate = [
        (effort.rate_codes, [r.level for r in rows if isinstance(r, Tunable)]),
        (effort.rate_units, [r.level for r in units]),
        (effort.rate_scales, [r.scales for r in rows]),
        (effort.rate_integers, [r.integers for r in units]),
    ]
    return [{"params": moved, "lr": rate} for rate, moved in by_rate if moved]


def _distance(answer: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The mean squared error of hidden states over the mean power of what is wanted."""
    return (answer - wanted).square().mean() / wanted.square().mean()
