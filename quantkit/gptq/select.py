"""Quantize the rows that share an input in every way, and choose the best.

For one distinct input: round-to-nearest and imatrix quantization by ggml, and GPTQ onto the grids
that ggml chose with diag(H) as importances, all types of all tensors in one sweep. The methods
compete per tensor and type on the output error under a Hessian that none of them has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from quantkit.ggml import native
from quantkit.ggml.formats import FORMATS
from quantkit.ggml.types import QuantType
from quantkit.gptq.descent import N_SWEEPS, descend, row_errors
from quantkit.gptq.errors import Error, ExpertErrors, TypeErrors
from quantkit.gptq.solver import Factor, Rows, gptq_experts, output_error
from quantkit.machine.memory import free_memory
from quantkit.statistics.sensitivity import Sensitivity

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


def solve_tensor(
    weight: native.Floats,
    types: Sequence[QuantType],
    methods: Sequence[str],
    inputs: Inputs | None,
    sensitivity: Sensitivity | None,
    n_sweeps: int = N_SWEEPS,
    given: Mapping[tuple[QuantType, str], native.Bytes] = {},
) -> dict[QuantType, Solved]:
    """Quantize one tensor (n_rows, n_columns) to each of `types` by the best of `methods`, GPTQ's
    followed by `n_sweeps` of descent. `given` are rows that somebody else made, by type and name:
    they compete like a method.

    Without inputs there are no importances: only round-to-nearest is possible.
    """
    n_rows, n_columns = weight.shape
    device = inputs.heldout.device if inputs else torch.device("cpu")
    limit = STACKED_WEIGHTS if device.type == "cpu" else _stacked_on_gpu()
    step = max(1, limit // (n_columns * len(types)))
    parts = []
    for first in range(0, n_rows, step):
        last = min(first + step, n_rows)
        own = None if sensitivity is None else sensitivity.rows(first, last)
        theirs = {key: rows[first:last] for key, rows in given.items()}
        rows = weight[first:last]
        parts.append(solve_rows(rows, types, methods, inputs, own, n_sweeps, theirs))
    return {qtype: _decide(qtype, parts) for qtype in types}


def _stacked_on_gpu() -> int:
    """Weights times types in one sweep: fewer where the GPU has little memory free."""
    return min(_STACKED_WEIGHTS_CUDA, max(1 << 22, free_memory("cuda") // _STACKED_BYTES))


def _decide(qtype: QuantType, parts: Sequence[Part]) -> Solved:
    """One tensor's rows by the one method that is best for all of them."""
    errors = {
        method: _sum([part.errors[qtype, method] for part in parts], parts)
        for (kind, method) in parts[0].packed
        if kind == qtype
    }
    best = min(errors, key=lambda method: errors[method].rank)
    packed = torch.cat([part.packed[qtype, best] for part in parts]).numpy()
    return Solved(qtype, best, packed, errors)


def decide_experts(qtype: QuantType, experts: Sequence[Part]) -> Solved:
    """Decide the method of each expert of a stacked tensor: experts share a type, not a method. The
    result has the name of the most frequent method, whose error is that of the tensor as stored.
    """
    methods = [method for (kind, method) in experts[0].packed if kind == qtype]
    chosen = [min(methods, key=lambda m: part.errors[qtype, m].rank) for part in experts]
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
    """Some rows of a tensor; errors are sums, not yet divided by the power."""

    power: float
    errors: Mapping[tuple[QuantType, str], Error]
    packed: Mapping[tuple[QuantType, str], torch.Tensor]  # uint8 (n_rows, row_bytes), on the CPU


def solve_rows(
    weight: native.Floats,
    types: Sequence[QuantType],
    methods: Sequence[str],
    inputs: Inputs | None,
    sensitivity: Sensitivity | None,
    n_sweeps: int,
    given: Mapping[tuple[QuantType, str], native.Bytes] = {},
) -> Part:
    """Quantize one piece of a tensor by all allowed methods."""
    device = inputs.heldout.device if inputs else torch.device("cpu")
    original = torch.from_numpy(weight).to(device)
    packed = _by_ggml(weight, original, types, methods, inputs)
    if inputs is not None and inputs.factor is not None:
        packed |= _gptq([original], types, [packed], [inputs], n_sweeps)[0]
    packed |= {key: torch.from_numpy(rows).to(device) for key, rows in given.items()}
    return _part(original, packed, inputs, sensitivity)


def experts_at_once(n_rows: int, n_columns: int, n_types: int) -> int:
    """Return how many experts' tensors of this size `solve_experts` is handed on a GPU."""
    of_one = max(n_rows * n_columns * n_types, 8 * n_columns * n_columns)
    return max(1, _stacked_on_gpu() // of_one)


def solve_experts(
    weights: Sequence[native.Floats],
    types: Sequence[QuantType],
    methods: Sequence[str],
    inputs: Sequence[Inputs],
    sensitivities: Sequence[Sensitivity | None],
    n_sweeps: int,
) -> list[Part]:
    """Do `solve_rows` for several experts' weights of one shape, each with its own inputs: GPTQ and
    the descent take all of them at once.
    """
    device = inputs[0].heldout.device
    originals = [torch.from_numpy(weight).to(device) for weight in weights]
    packed = [
        _by_ggml(weight, original, types, methods, own)
        for weight, original, own in zip(weights, originals, inputs, strict=True)
    ]
    if inputs[0].factor is not None:
        ours = _gptq(originals, types, packed, inputs, n_sweeps)
        packed = [theirs | own for theirs, own in zip(packed, ours, strict=True)]
    return [_part(*each) for each in zip(originals, packed, inputs, sensitivities, strict=True)]


_Packed = dict[tuple[QuantType, str], torch.Tensor]


def _by_ggml(
    weight: native.Floats,
    original: torch.Tensor,
    types: Sequence[QuantType],
    methods: Sequence[str],
    inputs: Inputs | None,
) -> _Packed:
    """The rows by the methods that are not ours; `original` is `weight` on the device."""
    device = original.device
    packed: _Packed = {}
    importance = inputs.importance if inputs else None
    for qtype in types:
        exact = not qtype.is_quantized
        if exact or importance is None or "rtn" in methods:
            needs = native.requires_imatrix(qtype)  # codebooks: all columns count the same then
            flat = np.ones(weight.shape[1], np.float32) if needs else None
            found = torch.from_numpy(native.quantize(weight, qtype, flat))
            packed[qtype, "rtn"] = found.to(device)
        if exact or importance is None:
            continue
        # Types without a grid for GPTQ: asked for alone, it has to leave them to another method.
        if "imatrix" in methods or (qtype not in FORMATS and "rtn" not in methods):
            packed[qtype, "imatrix"] = _weighted(original, qtype, importance)
    return packed


def _part(
    original: torch.Tensor,
    packed: _Packed,
    inputs: Inputs | None,
    sensitivity: Sensitivity | None,
) -> Part:
    errors = {}
    for (qtype, method), rows in packed.items():
        errors[qtype, method] = _error(_values(rows, qtype) - original, inputs, sensitivity)
    power = _error(original, inputs, None).relative
    return Part(power, errors, {key: rows.cpu() for key, rows in packed.items()})


def _weighted(weight: torch.Tensor, qtype: QuantType, importance: native.Floats) -> torch.Tensor:
    """ggml's rows under importances, on the device of `weight`; a GPU makes K-quants itself."""
    if weight.is_cuda:
        from quantkit.ggml import grids_cuda  # needs triton

        if qtype in grids_cuda.TYPES:
            shares = torch.from_numpy(importance).to(weight.device)
            return grids_cuda.quantize(weight, qtype, shares)
    found = native.quantize(weight.cpu().numpy(), qtype, importance)
    return torch.from_numpy(found).to(weight.device)


def _values(packed: torch.Tensor, qtype: QuantType) -> torch.Tensor:
    """float32 values of packed rows, on their device; a GPU reads the grids itself."""
    if packed.is_cuda and qtype in FORMATS:
        return FORMATS[qtype].values(packed)
    return torch.from_numpy(native.dequantize(packed.cpu().numpy(), qtype)).to(packed.device)


def _error(
    difference: torch.Tensor, inputs: Inputs | None, sensitivity: Sensitivity | None
) -> Error:
    """The error of weight differences (n_rows, n_columns), not yet relative to the power."""
    per_row = (
        difference.square().sum(1) if inputs is None else output_error(difference, inputs.heldout)
    )
    if sensitivity is None:
        return Error(float(per_row.sum()), None)
    nats = 0.0
    if sensitivity.outputs is not None and inputs is not None:
        nats += float(sensitivity.outputs @ per_row) / 2
    if sensitivity.frequency is not None and sensitivity.lookups is not None:
        looked_up = output_error(difference, sensitivity.lookups)
        nats += float(sensitivity.frequency @ looked_up) / 2
    return Error(float(per_row.sum()), nats)


def _gptq(
    weights: Sequence[torch.Tensor],
    types: Sequence[QuantType],
    packed: Sequence[_Packed],
    inputs: Sequence[Inputs],
    n_sweeps: int,
) -> list[_Packed]:
    """GPTQ of every type that it has a grid for, in one sweep; a row that came out worse than
    ggml's on the train Hessian stays ggml's. All arguments but the types have one item an expert.
    """
    types = [qtype for qtype in types if qtype in FORMATS]
    grids: list[dict[QuantType, torch.Tensor]] = []
    for weight, known, own in zip(weights, packed, inputs, strict=True):
        found = {q: known.get((q, "imatrix")) for q in types}
        grids.append(
            {
                q: _weighted(weight, q, own.importance) if rows is None else rows
                for q, rows in found.items()
            }
        )
    rows = [
        [Rows(weight, FORMATS[q].grid(own[q])) for q in types]
        for weight, own in zip(weights, grids, strict=True)
    ]
    factors = [own.factor for own in inputs if own.factor is not None]
    codes = gptq_experts(rows, factors)
    weight = torch.cat(list(weights))
    damped, train = _batch([own.damped for own in inputs]), _batch([own.train for own in inputs])
    solved: list[_Packed] = [{} for _ in inputs]
    for i, qtype in enumerate(types):
        form = FORMATS[qtype]
        rounded = torch.cat([own[qtype] for own in grids])
        start = form.with_codes(rounded, torch.cat([own[i] for own in codes]))
        ours = descend(form, start, weight, damped, n_sweeps)
        before = row_errors(form, rounded, weight, train)
        after = row_errors(form, ours, weight, train)
        best = torch.where((after <= before)[:, None], ours, rounded)
        for of_one, part in zip(solved, best.chunk(len(inputs)), strict=True):
            of_one[qtype, "gptq"] = part
    return solved


def _batch(hessians: Sequence[torch.Tensor]) -> torch.Tensor:
    """Hessians (n, n) as one (n_experts, n, n); of a single one itself."""
    return hessians[0] if len(hessians) == 1 else torch.stack(list(hessians))
