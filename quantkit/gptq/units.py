"""Tensors that are solved together: those of a block, the head, a table of embeddings, or one whose
inputs are not known. Their statistics come in one turn, or in several where they do not fit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from quantkit.config import RunConfig
from quantkit.config.levels import LevelPlan
from quantkit.ggml import native
from quantkit.ggml.types import BF16, F16, F32, QuantType
from quantkit.gguf_file.read import GgufFile, StoredTensor
from quantkit.gguf_file.write import SlotFile
from quantkit.gptq.carried import carried_rows
from quantkit.gptq.donors import PREFIX, Donor, rows_of
from quantkit.gptq.errors import Damping, Errors, ExpertErrors, TypeErrors
from quantkit.gptq.exchange import agree, best_rows, gather
from quantkit.gptq.inputs import KnownInputs, make_inputs, modules_of, sibling_of
from quantkit.gptq.select import (
    Part,
    Solved,
    decide,
    decide_experts,
    experts_at_once,
    solve_experts,
    solve_parts,
)
from quantkit.gptq.shares import Piece, cut, even, pack
from quantkit.model.row_maps import RowMap
from quantkit.ranks.group import ALONE, Ranks
from quantkit.statistics.inputs import (
    BlockStatistics,
    ExpertStatistics,
    InputDiagonal,
    InputStatistics,
)
from quantkit.statistics.sensitivity import Sensitivity
from quantkit.statistics.stored import Gradients, sensitivity_of
from quantkit.tensors import CARRIED, EXACT, Fallback

ALL_TYPES_AT_ONCE = 1 << 27  # weights; a larger tensor is solved one type after the other


@dataclass(frozen=True)
class Work:
    """What all units share: the tensors, what they may become, and the files that they go to."""

    config: RunConfig
    n_sweeps: int
    base: GgufFile
    plan: LevelPlan
    files: Mapping[QuantType, SlotFile]
    donors: Sequence[Donor]
    maps: Mapping[str, RowMap]
    gradients: Gradients
    carried: Mapping[str, Path] = field(default_factory=dict)  # files of rows, by tensor
    ranks: Ranks = ALONE

    @cached_property
    def of_module(self) -> dict[str, list[str]]:
        """The tensors that read a module's input, by the module."""
        found: dict[str, list[str]] = {}
        for name, module in modules_of(self.plan.types, self.maps).items():
            found.setdefault(module, []).append(name)
        return found

    def sensitivity(self, tensor: str) -> Sensitivity | None:
        """Return what errors in the tensor cost."""
        return sensitivity_of(self.gradients, self.maps.get(tensor), self.config.device)


class Unit:
    """Solves tensors as their statistics come, and fills their slots in every file."""

    def __init__(self, work: Work, told: Callable[[str, float], None] | None = None) -> None:
        """`told` is called with a tensor and how much more of it is solved."""
        self._work = work
        self._told = told or (lambda tensor, share: None)
        self._errors: dict[str, dict[str, ExpertErrors | TypeErrors]] = {}
        self._fallbacks: list[Fallback] = []
        self._dampings: list[Damping] = []
        self._stacked: dict[str, list[_Turn]] = {}
        self._diagonals: dict[str, list[InputDiagonal]] = {}

    def solve_all(self, name: str, turns: Iterable[BlockStatistics] | None) -> None:
        """Solve the tensors that read what the turns tell of, or without them the tensor of this
        name.
        """
        if turns is None:
            self.solve([name], None)
        for statistics in turns or ():
            self.add(statistics)
            del statistics  # or it would stay while the next turn's are summed

    def add(self, statistics: BlockStatistics) -> None:
        """Solve the tensors whose inputs these are; of stacked weights, the experts."""
        self.solve([t for inputs in statistics.inputs for t in self._readers(inputs)], statistics)
        for experts in statistics.experts:
            if theirs := self._readers(experts):
                self._solve_experts(theirs, experts)
        diagonals = statistics.diagonals()
        for name, map_ in self._work.maps.items():
            if (known := diagonals.get(map_.module)) is not None:
                values = map_.in_file_order(known.diagonal)
                self._diagonals.setdefault(name, []).append(InputDiagonal(values, known.n_tokens))

    def _readers(self, known: InputStatistics | ExpertStatistics) -> list[str]:
        return [t for module in known.modules for t in self._work.of_module.get(module, ())]

    def solve(self, tensors: Sequence[str], statistics: BlockStatistics | None) -> None:
        """Solve whole tensors; where there are no statistics, by rounding alone."""
        if not tensors:
            return
        work, methods = self._work, self._work.config.methods
        pieces, mine = self._shared_out(tensors, statistics)
        uses = Counter(pieces[i].tensor for i in mine)
        known = KnownInputs(statistics, tensors, work.maps, work.config, work.gradients, uses)
        for inputs, own in known.groups:
            if inputs.is_judged_on_train:
                reason = "no held-out token reached its inputs"
                self._fallbacks += [
                    Fallback(name, "error held out", "error on train", reason) for name in own
                ]
        for name, parts in self._solved([(i, pieces[i]) for i in mine], pieces, known):
            types = work.plan.choices(name)
            solved = {q: decide(q, [part for part in parts if q in part.types]) for q in types}
            self._keep(name, solved)
            self._told(name, 1.0)
            self._fallbacks += _method_fallbacks(name, solved, methods, known.has(name))
            if name not in work.maps and known.has(name):
                used = f"importances of {sibling_of(name, work.maps)}"
                reason = "it is not found in the model"
                self._fallbacks.append(Fallback(name, "statistics of its own", used, reason))
        known.merge(work.ranks)
        self._dampings += known.dampings()

    def _shared_out(
        self, tensors: Sequence[str], statistics: BlockStatistics | None
    ) -> tuple[list[Piece], list[int]]:
        """The pieces of all tensors, and the indices of this rank's."""
        work = self._work
        readers = [self._readers(inputs) for inputs in statistics.inputs] if statistics else []
        inputs = {name: i for i, own in enumerate(readers) for name in own}
        shapes = {name: work.base.tensors[name].shape for name in tensors}
        pieces = cut(
            {name: (math.prod(shape[:-1]), shape[-1]) for name, shape in shapes.items()},
            {name: len(work.plan.choices(name)) for name in tensors},
            {name: inputs.get(name, -1) for name in tensors},
            work.ranks.size,
        )
        return pieces, pack(pieces, work.ranks.size)[work.ranks.rank]

    def _solved(
        self, mine: Sequence[tuple[int, Piece]], pieces: Sequence[Piece], known: KnownInputs
    ) -> Iterator[tuple[str, list[Part]]]:
        """Solve this rank's pieces; yield all tensors with their parts on rank 0."""
        ranks = self._work.ranks
        of_tensor: dict[str, list[int]] = {}
        for i, piece in enumerate(pieces):
            of_tensor.setdefault(piece.tensor, []).append(i)

        def solve(mine: tuple[int, Piece]) -> list[Part]:
            parts = _solve(mine[1], self._work, known)
            if ranks.is_alone:
                return parts
            if len(of_tensor[mine[1].tensor]) == 1:
                return best_rows(parts, parts)
            return [part.on_cpu() for part in parts]

        with self._workers() as pool:
            found = zip(mine, pool.map(solve, mine), strict=True)
            if ranks.is_alone:
                yield from ((piece.tensor, parts) for (_, piece), parts in found)
                return
            own = {i: parts for (i, _), parts in found}
        split = [indices for indices in of_tensor.values() if len(indices) > 1]
        gathered = gather(ranks, agree(ranks, own, split))
        for name, indices in of_tensor.items():
            if gathered:
                yield name, [part for i in indices for part in gathered[i]]

    def _workers(self) -> ThreadPoolExecutor:
        """Tensors do not depend on each other; one alone leaves a CPU's cores idle between its
        steps.
        """
        return ThreadPoolExecutor(2 if self._work.config.device == "cpu" else 1, "tensor")

    def _solve_experts(self, tensors: Sequence[str], statistics: ExpertStatistics) -> None:
        """Solve the tensors of a layer's experts that read one input, each rank a range of experts.
        An expert's Hessian is factorized once for all tensors; a GPU takes many experts at once.
        """
        work, ranks = self._work, self._work.ranks
        stacks = [_Stack.of(name, work) for name in tensors]
        n_experts, step = len(statistics.n_tokens), 1  # on a CPU every core has one of its own
        if work.config.device != "cpu":
            step = min(stack.at_once for stack in stacks)
        own = even(n_experts, ranks.rank, ranks.size)
        batches = [range(i, min(i + step, own.stop)) for i in range(own.start, own.stop, step)]

        def solve(batch: range) -> list[list[Part]]:
            return _solve_batch(batch, stacks, statistics, work)

        with self._workers() as pool:
            found = list(pool.map(solve, batches))
        for name, stack in zip(tensors, stacks, strict=True):
            self._told(name, n_experts / stack.stored.shape[0])
        # By tensor and rank: every rank has some of the experts.
        parts = {
            i * ranks.size + ranks.rank: [part for batch in found for part in batch[i]]
            for i in range(len(tensors))
        }
        if gathered := gather(ranks, parts):
            for i, name in enumerate(tensors):
                places = (i * ranks.size + rank for rank in range(ranks.size))
                experts = [part for place in places for part in gathered.get(place, ())]
                turn = _Turn(experts, statistics.n_tokens, statistics.weights)
                self._stacked.setdefault(name, []).append(turn)

    def _keep(self, name: str, solved: Mapping[QuantType, Solved]) -> None:
        types = self._work.plan.types[name]
        for level, file in self._work.files.items():
            file.write(name, solved[types[level]].packed)
        self._errors[name] = {str(q): s.found for q, s in solved.items()}

    def end(self) -> tuple[Errors, dict[str, InputDiagonal]]:
        """Put stacked weights together. Return what `errors.json` will say of all tensors, and the
        importances by tensor.
        """
        for name, turns in self._stacked.items():
            parts = [part for turn in turns for part in turn.parts]
            types = self._work.plan.choices(name)
            solved = {q: decide_experts(q, parts) for q in types}
            self._keep(name, solved)
            self._fallbacks += _method_fallbacks(name, solved, self._work.config.methods, True)
            self._fallbacks += _borrowed(name, turns)
        errors = Errors(self._errors, tuple(self._fallbacks), tuple(self._dampings))
        return errors, {name: _joined(turns) for name, turns in self._diagonals.items()}


def _joined(turns: Sequence[InputDiagonal]) -> InputDiagonal:
    """The importances of all experts; of what is not stacked there is one turn."""
    if len(turns) == 1:
        return turns[0]
    counts = np.concatenate([np.atleast_1d(turn.n_tokens) for turn in turns])
    return InputDiagonal(np.concatenate([turn.diagonal for turn in turns]), counts)


def _solve(piece: Piece, work: Work, known: KnownInputs) -> list[Part]:
    """Rows of a tensor in all its types."""
    name, rows = piece.tensor, slice(piece.first, piece.last)
    sensitivity, device = work.sensitivity(name), work.config.device
    own = sensitivity and sensitivity.rows(piece.first, piece.last)
    weight = _as_stored(work.base.packed(name)[rows], work.base.tensors[name].qtype)
    # Of the largest tensors, the vocabulary's, the rows of all types would not fit.
    choices = work.plan.choices(name)
    steps = [(q,) for q in choices] if weight.numel() > ALL_TYPES_AT_ONCE else [choices]
    parts: list[Part] = []
    methods, n_sweeps = work.config.methods, work.n_sweeps
    with known.borrowed(name) as inputs:
        for types in steps:
            given = {key: r[rows] for key, r in rows_of(work.donors, name, types).items()}
            given |= carried_rows(work.carried, name, types, rows)
            parts += solve_parts(weight, types, methods, inputs, own, n_sweeps, given, device)
    return parts


@dataclass(frozen=True)
class _Turn:
    """What experts became, and the tokens that each was sent and lent."""

    parts: Sequence[Part]
    n_tokens: NDArray[np.float32]
    weights: NDArray[np.float32]


@dataclass(frozen=True)
class _Stack:
    """A tensor of stacked experts, whose rows are read an expert at a time."""

    stored: StoredTensor
    packed: native.Bytes
    types: tuple[QuantType, ...]
    sensitivity: Sensitivity | None
    carried: Mapping[str, Path]

    @classmethod
    def of(cls, name: str, work: Work) -> _Stack:
        base = work.base
        choices = work.plan.choices(name)
        stored, packed = base.tensors[name], base.packed(name)
        return cls(stored, packed, choices, work.sensitivity(name), work.carried)

    @property
    def at_once(self) -> int:
        """Return how many experts a GPU takes."""
        _, n_rows, n_columns = self.stored.shape
        return experts_at_once(n_rows, n_columns, len(self.types))

    def rows(self, experts: range) -> tuple[torch.Tensor, list[Sensitivity | None]]:
        """Return the weights of some experts, floats (n_experts, n_rows, n_columns), and what the
        errors of each cost.
        """
        n = self.stored.shape[1]
        packed = self.packed[experts.start * n : experts.stop * n]
        own = [self.sensitivity and self.sensitivity.rows(e * n, (e + 1) * n) for e in experts]
        return _as_stored(packed, self.stored.qtype).unflatten(0, (len(experts), n)), own

    def given(self, experts: range) -> dict[tuple[QuantType, str], native.Bytes]:
        """Return the rows of some experts that the source has itself."""
        n = self.stored.shape[1]
        rows = slice(experts.start * n, experts.stop * n)
        return carried_rows(self.carried, self.stored.name, self.types, rows)


_DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}


def _as_stored(packed: native.Bytes, qtype: QuantType) -> torch.Tensor:
    """Rows of `base.gguf` in the floats that they are stored in: what goes to a GPU is half as much
    as float32.
    """
    dtype = _DTYPES.get(qtype)
    if dtype is None:
        return torch.from_numpy(native.dequantize(packed, qtype))
    return torch.from_numpy(np.array(packed)).view(dtype)


def _solve_batch(
    batch: range, stacks: Sequence[_Stack], statistics: ExpertStatistics, work: Work
) -> list[list[Part]]:
    """Return, for every tensor, what some experts became: indices into their statistics."""
    methods, device = work.config.methods, work.config.device
    inputs = [
        make_inputs(statistics.train[i], statistics.heldout[i], methods, device) for i in batch
    ]
    parts = []
    for stack in stacks:
        first = statistics.first
        experts = range(first + batch.start, first + batch.stop)
        weight, own = stack.rows(experts)
        n_sweeps, given = work.n_sweeps, stack.given(experts)
        parts.append(solve_experts(weight, stack.types, methods, inputs, own, n_sweeps, given))
    return parts


def _borrowed(name: str, turns: Sequence[_Turn]) -> Iterator[Fallback]:
    """What is to be said of experts that saw too few tokens: more than half of their Hessian is
    lent.
    """
    n_tokens = np.concatenate([turn.n_tokens for turn in turns])
    weights = np.concatenate([turn.weights for turn in turns])
    few = np.flatnonzero(2 * n_tokens < weights)
    if len(few):
        reason = (
            f"{len(few)} of {len(n_tokens)} experts got at most"
            f" {int(n_tokens[few].max())} tokens: they borrowed others"
        )
        yield Fallback(name, "tokens routed", "tokens lent", reason)


def _method_fallbacks(
    name: str, solved: Mapping[QuantType, Solved], methods: tuple[str, ...], has_inputs: bool
) -> Iterator[Fallback]:
    """What is to be said where a tensor was made by a method that was not asked for."""
    for qtype, result in solved.items():
        asked = (*methods, PREFIX, EXACT, CARRIED)
        if result.method.startswith(asked) or not qtype.is_quantized:
            continue
        reason = f"{qtype} has no grid for GPTQ" if has_inputs else "no statistics of its inputs"
        yield Fallback(name, f"{qtype}/{methods[0]}", f"{qtype}/{result.method}", reason)
