"""Quantize the rows that share an input in every way, and choose the best.

For one distinct input: round-to-nearest and imatrix quantization by ggml, and GPTQ onto the grids
that ggml chose with diag(H) as importances, all types of all tensors in one sweep. The methods
compete per tensor and type on the output error under a Hessian that none of them has seen. All rows
stay on the device where they are made; those of the best method leave it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from quantkit.ggml import native, searches
from quantkit.ggml.codebooks import CODEBOOKS, UNIT
from quantkit.ggml.decode import READABLE
from quantkit.ggml.formats import FORMATS
from quantkit.ggml.types import QuantType
from quantkit.gptq import codebooks
from quantkit.gptq.descent import N_SWEEPS, descend, per_expert, row_errors
from quantkit.gptq.errors import Error, ExpertErrors, TypeErrors
from quantkit.gptq.solver import Factor, Rows, factorize, gptq_experts, output_error
from quantkit.machine.memory import free_memory
from quantkit.statistics.sensitivity import Sensitivity
from quantkit.tensors import EXACT

STACKED_WEIGHTS = 1 << 26  # weights times types in one sweep: about 600 MB at work
_STACKED_WEIGHTS_CUDA = 1 << 29  # a GPU needs many rows to be busy
_STACKED_BYTES = 40  # that a GPU holds for each of them at most


@dataclass(frozen=True)
class Solved:
    """One tensor in one type: the bytes of the best method, and every method's error."""

    qtype: QuantType
    method: str
    packed: native.Bytes  # uint8 (n_rows, row_bytes)
    errors: dict[str, Error]
    n_experts: dict[str, int] | None = None  # of stacked experts: how many each method made

    @property
    def found(self) -> TypeErrors:
        """Return what `errors.json` says of it."""
        if self.n_experts is None:
            return TypeErrors(self.method, self.errors)
        return ExpertErrors(self.method, self.errors, self.n_experts)


@dataclass(frozen=True)
class Inputs:
    """The statistics of the input that some tensors share, on the device where rows are solved.

    `factor` is None without gptq; `train` and `heldout` are Hessians, float32 (n, n).
    """

    importance: native.Floats
    train: torch.Tensor
    heldout: torch.Tensor
    factor: Factor | None

    @property
    def damped(self) -> torch.Tensor:
        """The train Hessian as it was factorized, float32 (n, n), columns in their own order."""
        assert self.factor is not None
        damped = self.train.clone()
        damped.diagonal().copy_(self.factor.diagonal)
        return damped

    @cached_property
    def by_units(self) -> Factor:
        """The train Hessian factorized with columns in units of eight, for codebooks."""
        assert self.factor is not None
        return factorize(self.train, self.factor.damping, UNIT)


def solve_tensor(
    weight: torch.Tensor,
    types: Sequence[QuantType],
    methods: Sequence[str],
    inputs: Inputs | None,
    sensitivity: Sensitivity | None,
    n_sweeps: int = N_SWEEPS,
    given: Mapping[tuple[QuantType, str], native.Bytes] = {},
    device: str = "cpu",
) -> dict[QuantType, Solved]:
    """Do `solve_parts` for a whole tensor, and keep the rows of the method that is best for each of
    `types`.
    """
    parts = solve_parts(weight, types, methods, inputs, sensitivity, n_sweeps, given, device)
    return {qtype: decide(qtype, parts) for qtype in types}


def solve_parts(
    weight: torch.Tensor,
    types: Sequence[QuantType],
    methods: Sequence[str],
    inputs: Inputs | None,
    sensitivity: Sensitivity | None,
    n_sweeps: int = N_SWEEPS,
    given: Mapping[tuple[QuantType, str], native.Bytes] = {},
    device: str = "cpu",
) -> list[Part]:
    """Quantize rows of a tensor, floats (n_rows, n_columns) on the CPU, to each of `types` by all
    `methods`, GPTQ's followed by `n_sweeps` of descent. `given` are rows that somebody else made,
    by type and name: they compete like a method.

    Without inputs there are no importances: only round-to-nearest is possible, on `device`.
    """
    n_rows, n_columns = weight.shape
    where = inputs.heldout.device if inputs else torch.device(device)
    limit = STACKED_WEIGHTS if where.type == "cpu" else _stacked_on_gpu()
    step = max(1, limit // (n_columns * len(types)))
    parts: list[Part] = []
    for first in range(0, n_rows, step):
        last = min(first + step, n_rows)
        own = None if sensitivity is None else sensitivity.rows(first, last)
        theirs = {key: rows[first:last] for key, rows in given.items()}
        rows = weight[first:last].to(where).float()
        part = solve_rows(rows, types, methods, inputs, own, n_sweeps, theirs)
        # Until all parts are there nobody knows which method's rows are wanted.
        parts.append(part if step >= n_rows else part.on_cpu())
    return parts


def _stacked_on_gpu() -> int:
    """Weights times types in one sweep: fewer where the GPU has little memory free."""
    return min(_STACKED_WEIGHTS_CUDA, max(1 << 22, free_memory("cuda") // _STACKED_BYTES))


def best_method(qtype: QuantType, parts: Sequence[Part]) -> tuple[str, dict[str, Error]]:
    """Return the one method that is best for all parts of a tensor, and the errors of all."""
    errors = {m: _sum([part.errors[qtype, m] for part in parts], parts) for m in parts[0].of(qtype)}
    return min(errors, key=lambda method: errors[method].rank), errors


def decide(qtype: QuantType, parts: Sequence[Part]) -> Solved:
    """Decide the method of a tensor: the one that is best for all its parts."""
    best, errors = best_method(qtype, parts)
    packed = torch.cat([part.packed[qtype, best] for part in parts]).cpu().numpy()
    return Solved(qtype, best, packed, errors)


def decide_experts(qtype: QuantType, experts: Sequence[Part]) -> Solved:
    """Decide the method of each expert of a stacked tensor: experts share a type, not a method. The
    result has the name of the most frequent method, whose error is that of the tensor as stored.
    """
    methods = experts[0].of(qtype)
    chosen = [part.best(qtype) for part in experts]
    errors = {m: _sum([part.errors[qtype, m] for part in experts], experts) for m in methods}
    best = max(methods, key=chosen.count)
    mixed = [part.errors[qtype, m] for part, m in zip(experts, chosen, strict=True)]
    errors[best] = _sum(mixed, experts)
    packed = [part.packed[qtype, m] for part, m in zip(experts, chosen, strict=True)]
    n_experts = {m: chosen.count(m) for m in methods}
    return Solved(qtype, best, torch.cat(packed).numpy(), errors, n_experts)


def _sum(errors: Sequence[Error], parts: Sequence[Part]) -> Error:
    power = max(sum(part.power for part in parts), 1e-30)
    nats = None if errors[0].nats is None else sum(e.nats or 0.0 for e in errors)
    return Error(sum(e.relative for e in errors) / power, nats)


@dataclass(frozen=True)
class Part:
    """Some rows of a tensor, or an expert's; errors are sums, not yet divided by the power."""

    power: float
    errors: Mapping[tuple[QuantType, str], Error]
    packed: Mapping[tuple[QuantType, str], torch.Tensor]  # uint8 (n_rows, row_bytes)

    @property
    def types(self) -> list[QuantType]:
        """Return the types that the rows were made in."""
        return list(dict.fromkeys(qtype for qtype, _ in self.errors))

    def of(self, qtype: QuantType) -> list[str]:
        """Return the methods that made rows of this type."""
        return [method for kind, method in self.errors if kind == qtype]

    def best(self, qtype: QuantType) -> str:
        """Return the method with the least error."""
        return min(self.of(qtype), key=lambda method: self.errors[qtype, method].rank)

    def on_cpu(self, keys: Iterable[tuple[QuantType, str]] | None = None) -> Part:
        """Return the same with the rows of all types and methods, or of `keys` alone, on the
        CPU.
        """
        kept = self.packed if keys is None else keys
        return replace(self, packed={key: self.packed[key].cpu() for key in kept})


def solve_rows(
    weight: torch.Tensor,
    types: Sequence[QuantType],
    methods: Sequence[str],
    inputs: Inputs | None,
    sensitivity: Sensitivity | None,
    n_sweeps: int,
    given: Mapping[tuple[QuantType, str], native.Bytes] = {},
) -> Part:
    """Quantize one piece of a tensor, float32 where it is to be solved, by all allowed methods."""
    _compile(types, weight.device)
    known = [inputs] if inputs else []
    packed = _by_ggml(weight, types, methods, known)
    if inputs is not None and inputs.factor is not None:
        packed |= _gptq(weight, types, packed, known, n_sweeps)
    packed = _with(given, packed, weight.device)
    return _parts(weight, packed, known, [sensitivity])[0]


def experts_at_once(n_rows: int, n_columns: int, n_types: int) -> int:
    """Return how many experts' tensors of this size `solve_experts` is handed on a GPU."""
    of_one = max(n_rows * n_columns * n_types, 2 * n_columns * n_columns)
    return max(1, _stacked_on_gpu() // of_one)


def solve_experts(
    weight: torch.Tensor,
    types: Sequence[QuantType],
    methods: Sequence[str],
    inputs: Sequence[Inputs],
    sensitivities: Sequence[Sensitivity | None],
    n_sweeps: int,
    given: Mapping[tuple[QuantType, str], native.Bytes] = {},
) -> list[Part]:
    """Do `solve_rows` for several experts' weights of one shape, floats (n_experts, n_rows,
    n_columns) on the CPU, each with its own inputs: all of them at once. Of every expert and type
    the best method's rows are left, on the CPU.
    """
    rows = weight.to(inputs[0].heldout.device).float().flatten(0, 1)
    _compile(types, rows.device)
    packed = _by_ggml(rows, types, methods, inputs)
    if inputs[0].factor is not None:
        packed |= _gptq(rows, types, packed, inputs, n_sweeps)
    parts = _parts(rows, _with(given, packed, rows.device), inputs, sensitivities)
    return [part.on_cpu([(q, part.best(q)) for q in types]) for part in parts]


def _compile(types: Sequence[QuantType], device: torch.device) -> None:
    """What a GPU needs for codebooks, once for all types."""
    if device.type == "cuda" and not CODEBOOKS.keys().isdisjoint(types):
        from quantkit.gptq import codebook_compile_cuda  # needs triton

        codebook_compile_cuda.compile_kernels(frozenset(types), device)


# By type and method: the rows of one expert after the other.
_Packed = dict[tuple[QuantType, str], torch.Tensor]
_Rounded = dict[QuantType, torch.Tensor]


def _with(
    given: Mapping[tuple[QuantType, str], native.Bytes], packed: _Packed, device: torch.device
) -> _Packed:
    """All rows that compete; those that are exactly the source's first, so that they win ties."""
    theirs = {key: torch.from_numpy(rows).to(device) for key, rows in given.items()}
    return dict(sorted((packed | theirs).items(), key=lambda item: item[0][1] != EXACT))


def _by_ggml(
    weight: torch.Tensor,
    types: Sequence[QuantType],
    methods: Sequence[str],
    inputs: Sequence[Inputs],
) -> _Packed:
    """The rows by the methods that are not ours."""
    packed: _Packed = {}
    for qtype in types:
        exact = not qtype.is_quantized
        if exact or not inputs or "rtn" in methods:
            packed[qtype, "rtn"] = _ggml(weight, qtype, ())
        if exact or not inputs:
            continue
        # Types without a grid for GPTQ: asked for alone, it has to leave them to another method.
        if "imatrix" in methods or (qtype not in READABLE and "rtn" not in methods):
            packed[qtype, "imatrix"] = _ggml(weight, qtype, inputs)
    return packed


def _ggml(weight: torch.Tensor, qtype: QuantType, inputs: Sequence[Inputs]) -> torch.Tensor:
    """ggml's rows of one expert after the other, each under the importances of its inputs, or
    rounded to nearest; on the device of `weight`, for a GPU makes those of grids and codebooks
    itself. Scales that ggml does not search are searched here.
    """
    importances = [own.importance for own in inputs]
    if inputs and qtype in searches.SEARCHED:
        own = torch.from_numpy(np.stack(importances))
        return searches.quantize(weight, qtype, own.to(weight.device))
    if weight.is_cuda and (book := CODEBOOKS.get(qtype)) is not None:
        shares = torch.from_numpy(np.stack(importances)).to(weight.device) if inputs else None
        return codebooks.rounded(book, weight, shares)
    if weight.is_cuda and qtype in FORMATS:
        from quantkit.ggml import grids_cuda  # needs triton

        shares = torch.from_numpy(np.stack(importances)).to(weight.device) if inputs else None
        return grids_cuda.quantize(weight, qtype, shares)
    if not importances:
        needs = native.requires_imatrix(qtype)  # codebooks: all columns count the same then
        flat = np.ones(weight.shape[1], np.float32) if needs else None
        return torch.from_numpy(native.quantize(weight.cpu().numpy(), qtype, flat)).to(
            weight.device
        )
    parts = zip(weight.cpu().chunk(len(inputs)), importances, strict=True)
    found = [torch.from_numpy(native.quantize(w.numpy(), qtype, i)) for w, i in parts]
    return torch.cat(found).to(weight.device)


def _parts(
    weight: torch.Tensor,
    packed: _Packed,
    inputs: Sequence[Inputs],
    sensitivities: Sequence[Sensitivity | None],
) -> list[Part]:
    """What became of every expert, or of the only tensor."""
    n = len(sensitivities)
    power = [error.relative for error in _errors(weight, inputs, [None] * n)]
    errors = {
        (qtype, method): _errors(_off(rows, qtype, method, weight), inputs, sensitivities)
        for (qtype, method), rows in packed.items()
    }
    rows = {key: found.chunk(n) for key, found in packed.items()}
    return [
        Part(
            power[i],
            {key: own[i] for key, own in errors.items()},
            {key: own[i] for key, own in rows.items()},
        )
        for i in range(n)
    ]


def _off(packed: torch.Tensor, qtype: QuantType, method: str, weight: torch.Tensor) -> torch.Tensor:
    """What rows are off. Those of a quantized source are right, and the base rounds them."""
    return torch.zeros_like(weight) if method == EXACT else _values(packed, qtype) - weight


def _values(packed: torch.Tensor, qtype: QuantType) -> torch.Tensor:
    """float32 values of packed rows, on their device; a GPU reads the grids itself."""
    if packed.is_cuda and qtype in READABLE:
        return READABLE[qtype].values(packed)
    return torch.from_numpy(native.dequantize(packed.cpu().numpy(), qtype)).to(packed.device)


def _errors(
    difference: torch.Tensor,
    inputs: Sequence[Inputs],
    sensitivities: Sequence[Sensitivity | None],
) -> list[Error]:
    """The errors of weight differences (n_rows, n_columns), of each expert, not yet relative to the
    power.
    """
    if inputs:
        heldout = _batch([own.heldout for own in inputs])
        per_row = output_error(per_expert(difference, heldout), heldout)
    else:
        per_row = difference.square().sum(1)
    per_row = per_row.view(len(sensitivities), -1)
    sums = per_row.sum(1).tolist()
    prices = [s.outputs for s in sensitivities if s is not None and s.outputs is not None]
    nats = [None if s is None else 0.0 for s in sensitivities]
    if prices and inputs:
        nats = (torch.linalg.vecdot(torch.stack(prices), per_row) / 2).tolist()
    (first, *_) = sensitivities  # tables are not stacked
    if first is not None and first.frequency is not None and first.lookups is not None:
        looked_up = output_error(difference, first.lookups)
        nats = [(nats[0] or 0.0) + float(first.frequency @ looked_up) / 2]
    return [Error(*each) for each in zip(sums, nats, strict=True)]


def _gptq(
    weight: torch.Tensor,
    types: Sequence[QuantType],
    packed: _Packed,
    inputs: Sequence[Inputs],
    n_sweeps: int,
) -> _Packed:
    """GPTQ of every type that it has a grid or a codebook for; a row that came out worse than
    ggml's on the train Hessian stays ggml's.
    """
    rounded: _Rounded = {}
    for qtype in types:
        if qtype in READABLE:
            known = packed.get((qtype, "imatrix"))
            rounded[qtype] = _ggml(weight, qtype, inputs) if known is None else known
    damped, train = _batch([own.damped for own in inputs]), _batch([own.train for own in inputs])
    found = _onto_grids(weight, rounded, inputs, damped, n_sweeps)
    found |= _onto_codebooks(weight, rounded, inputs, damped, n_sweeps)
    solved: _Packed = {}
    for qtype, ours in found.items():
        form, theirs = READABLE[qtype], rounded[qtype]
        before = row_errors(form, theirs, weight, train)
        after = row_errors(form, ours, weight, train)
        solved[qtype, "gptq"] = torch.where((after <= before)[:, None], ours, theirs)
    return solved


def _onto_grids(
    weight: torch.Tensor,
    rounded: _Rounded,
    inputs: Sequence[Inputs],
    damped: torch.Tensor,
    n_sweeps: int,
) -> _Rounded:
    """The types of scalar grids, in one sweep."""
    types = [qtype for qtype in rounded if qtype in FORMATS]
    n = len(inputs)
    chunks = {qtype: rounded[qtype].chunk(n) for qtype in types}
    rows = [
        [Rows(own, FORMATS[qtype].grid(chunks[qtype][i])) for qtype in types]
        for i, own in enumerate(weight.chunk(n))
    ]
    codes = gptq_experts(rows, [own.factor for own in inputs if own.factor is not None])
    solved: _Rounded = {}
    for i, qtype in enumerate(types):
        form = FORMATS[qtype]
        start = form.with_codes(rounded[qtype], torch.cat([own[i] for own in codes]))
        solved[qtype] = descend(form, start, weight, damped, n_sweeps)
    return solved


def _onto_codebooks(
    weight: torch.Tensor,
    rounded: _Rounded,
    inputs: Sequence[Inputs],
    damped: torch.Tensor,
    n_sweeps: int,
) -> _Rounded:
    """The types of codebooks, one after the other."""
    shares = damped.diagonal(dim1=-2, dim2=-1).contiguous()
    solved: _Rounded = {}
    for qtype, packed in rounded.items():
        if (book := CODEBOOKS.get(qtype)) is None:
            continue
        scaled = codebooks.fit_scales(book, packed, weight, shares)
        fed = codebooks.feedback(book, scaled, weight, [own.by_units for own in inputs])
        solved[qtype] = codebooks.descend(book, fed, weight, damped, n_sweeps)
    return solved


def _batch(hessians: Sequence[torch.Tensor]) -> torch.Tensor:
    """Hessians (n, n) as one (n_experts, n, n); of a single one itself."""
    return hessians[0] if len(hessians) == 1 else torch.stack(list(hessians))
