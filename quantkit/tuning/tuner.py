"""Tune a found allocation by gradients: block after block, codes and scales of all its tensors move
together, so that the block gives what the original's gives.

GPTQ and the descent judge a tensor by its own outputs, for inputs of the original model. Here a
block reads what the tuned blocks before it leave, so that it makes up for their errors, too, and
tensors make up for each other. Roundings are passed straight through (Bengio et al.,
arXiv:1308.3432); types, sizes and the integer scales of K-quants stay. What a block became is kept
where it is nearer to the original on sequences that it was not tuned on.

Hidden states are (n_batch, n_ctx, n_embd), float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch.func import functional_call

from quantkit.ggml import native
from quantkit.ggml.formats import FORMATS
from quantkit.ggml.types import QuantType
from quantkit.machine.memory import free_memory
from quantkit.model.blockwise import BlockCall, BlockwiseModel, SharedKV, compute_dtype
from quantkit.model.offload import States
from quantkit.model.row_maps import RowMap
from quantkit.tuning.tunable import Tunable

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


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it: packed rows uint8 (n_rows, row_bytes)."""

    qtype: QuantType
    packed: native.Bytes


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
    ) -> None:
        """`model` holds the original's weights in float32 and gets them back; `stored` are the
        tensors of the file. `train` and `heldout` are token ids (n_sequences, n_ctx); `scratch` is
        a folder. `exact`: products in float32 where bf16 would be faster.
        """
        self._model, self._maps, self._effort, self._exact = model, maps, effort, exact
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
        room = int(STATES_SHARE * free_memory(str(model.device)))
        names = ("original", "tuned", "plain")
        self._streams = {
            s: States(scratch / f"tuning-{s}.partial", room, model.device) for s in names
        }
        self._embed()

    @property
    def n_blocks(self) -> int:
        return len(self._model.blocks)

    @property
    def _heldout(self) -> range:
        return range(self._n_train, len(self._batches))

    def _embed(self) -> None:
        """The first block's inputs: of the original, and of the file's table of embeddings."""
        everything = range(len(self._batches))
        for i in everything:
            self._put("original", i, self._model.trace(self._batches[i].ids)[0], {})
        with self._outside_as_stored():
            for i in everything:
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
        return _values(self._stored[name])

    def block(self, index: int, known: TunedBlock | None = None) -> TunedBlock:
        """Tune block `index`, or take what is `known` of it from an earlier run; all streams have
        passed the block then.
        """
        names, everything = self._of_block.get(index, []), range(len(self._batches))
        with self._model.holding(index):
            self._pass("original", index, everything, {})
            plain = {name: self._decoded(name) for name in names}
            self._pass("plain", index, self._heldout, self._weights(index, plain))
            tuned = known or self._tune(index, plain)
            rows = {n: _values(Stored(self._stored[n].qtype, p)) for n, p in tuned.rows.items()}
            self._pass("tuned", index, everything, self._weights(index, plain | rows))
        return tuned

    def kl(self) -> tuple[float, float]:
        """Return KL(original || file) in nats per token on the held-out sequences, before and
        after. All blocks must have been taken.
        """
        sums = {"plain": 0.0, "tuned": 0.0}
        for i in self._heldout:
            for n in range(len(self._batches[i].ids)):
                wanted = self._logits("original", i, n).log_softmax(-1)
                with self._outside_as_stored():
                    for stream in sums:
                        found = self._logits(stream, i, n).log_softmax(-1)
                        sums[stream] += float((wanted.exp() * (wanted - found)).sum())
        n_tokens = sum(self._batches[i].ids.numel() for i in self._heldout)
        return sums["plain"] / n_tokens, sums["tuned"] / n_tokens

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
        rows = {name: self._tunable(name) for name in plain if self._stored[name].qtype in FORMATS}
        before = self._error(index, plain)
        if not rows or not before:
            return TunedBlock(before, before, {})
        fixed = {name: values for name, values in plain.items() if name not in rows}
        groups = [
            {"params": [r.level for r in rows.values()], "lr": self._effort.rate_codes},
            {"params": [r.scales for r in rows.values()], "lr": self._effort.rate_scales},
        ]
        # Of many weights each has a small share of the gradient: the usual epsilon would hide it.
        on_gpu = self._model.device.type == "cuda"  # there it is one pass over memory
        optimizer = torch.optim.Adam(groups, betas=_BETAS, eps=_EPSILON, fused=on_gpu)
        n_steps = self._effort.n_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / n_steps)
        for batch in self._order(index):
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad(), self._products():
                values = fixed | {name: r.weight() for name, r in rows.items()}
                weights = self._weights(index, values)
                answer = self._run(index, batch, *self._get("tuned", batch), weights)
                loss = _distance(answer.float(), self._wanted(batch)) / before
            with self._products():
                loss.backward()
            optimizer.step()
            schedule.step()
        packed = {name: r.packed().cpu().numpy() for name, r in rows.items()}
        changed = {n: _values(Stored(self._stored[n].qtype, p)) for n, p in packed.items()}
        after = self._error(index, {**plain, **changed})
        return TunedBlock(before, after, packed if after < before else {})

    def _tunable(self, name: str) -> Tunable:
        stored, map_ = self._stored[name], self._maps[name]
        original = map_.gather(self._model.model.get_parameter(map_.parameter).data)
        packed = torch.from_numpy(stored.packed.copy()).to(original.device)
        return Tunable(stored.qtype, packed, original)

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
        found = []
        for i in self._heldout:
            with self._products():
                answer = self._run(index, i, *self._get("tuned", i), weights)
            found.append(_distance(answer.float(), self._wanted(i)))
        return float(torch.stack(found).mean())

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


def _values(stored: Stored) -> torch.Tensor:
    return torch.from_numpy(native.dequantize(stored.packed, stored.qtype))


def _distance(answer: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The mean squared error of hidden states over the mean power of what is wanted."""
    return (answer - wanted).square().mean() / wanted.square().mean()
