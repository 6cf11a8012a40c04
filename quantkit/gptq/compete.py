"""Every way to store the rows that share an input, and which of them is best.

For one distinct input: round-to-nearest and imatrix quantization by ggml, and GPTQ onto the grids
that ggml chose with diag(H) as importances, all types of all tensors in one sweep. The methods
compete per tensor and type on the output error under a Hessian that none of them has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from quantkit.gptq.solver import Factor, Rows, gptq, output_error
from quantkit.kquants import native
from quantkit.kquants.formats import FORMATS
from quantkit.qtypes import QuantType

_STACKED_WEIGHTS = 1 << 26  # weights times types in one sweep: about 600 MB at work


@dataclass(frozen=True)
class Solved:
    """One tensor in one type: the bytes of the best method, and every method's error."""

    qtype: QuantType
    method: str
    packed: native.Bytes  # uint8 (n_rows, row_bytes)
    errors: dict[
        str, float
    ]  # relative to the output's power, on held-out inputs (without them: on the weights)

    @property
    def error(self) -> float:
        return self.errors[self.method]


@dataclass(frozen=True)
class Inputs:
    """What is known of the input that some tensors share, on the device where rows are solved.

    `factor` is None without gptq; `train` and `heldout` are Hessians, float32 (n, n).
    """

    importance: native.Floats
    train: torch.Tensor
    heldout: torch.Tensor
    factor: Factor | None


def solve_tensor(
    weight: native.Floats, types: Sequence[QuantType], methods: Sequence[str], inputs: Inputs | None
) -> dict[QuantType, Solved]:
    """Quantize one tensor (n_rows, n_columns) to each of `types` by the best of `methods`.

    Without inputs there are no importances: only round-to-nearest is possible.
    """
    n_rows, n_columns = weight.shape
    step = max(1, _STACKED_WEIGHTS // (n_columns * len(types)))
    parts = [
        _solve_rows(weight[first : first + step], types, methods, inputs)
        for first in range(0, n_rows, step)
    ]
    power = sum(part.power for part in parts)
    solved = {}
    for qtype in types:
        errors = {
            method: sum(part.errors[qtype, method] for part in parts) / max(power, 1e-30)
            for (found, method) in parts[0].errors
            if found == qtype
        }
        best = min(errors, key=lambda method: errors[method])
        packed = np.concatenate([part.packed[qtype, best] for part in parts])
        solved[qtype] = Solved(qtype, best, packed, errors)
    return solved


@dataclass(frozen=True)
class _Part:
    power: float
    errors: Mapping[tuple[QuantType, str], float]
    packed: Mapping[tuple[QuantType, str], native.Bytes]


def _solve_rows(
    weight: native.Floats, types: Sequence[QuantType], methods: Sequence[str], inputs: Inputs | None
) -> _Part:
    """All allowed methods on one piece of a tensor."""
    packed: dict[tuple[QuantType, str], native.Bytes] = {}
    importance = inputs.importance if inputs else None
    for qtype in types:
        exact = not qtype.is_quantized
        if exact or importance is None or "rtn" in methods:
            needs = native.requires_imatrix(qtype)  # codebooks: all columns count the same then
            flat = np.ones(weight.shape[1], np.float32) if needs else None
            packed[qtype, "rtn"] = native.quantize(weight, qtype, flat)
        if exact or importance is None:
            continue
        if "imatrix" in methods or qtype not in FORMATS:
            packed[qtype, "imatrix"] = native.quantize(weight, qtype, importance)
    if inputs is not None and inputs.factor is not None:
        packed |= _gptq(weight, [q for q in types if q in FORMATS], packed, inputs)
    device = inputs.heldout.device if inputs else torch.device("cpu")
    original = torch.from_numpy(weight).to(device)

    def error(difference: torch.Tensor) -> float:
        if inputs is None:
            return float(difference.square().sum())
        return float(output_error(difference, inputs.heldout).sum())

    errors = {}
    for (qtype, method), rows in packed.items():
        values = torch.from_numpy(native.dequantize(rows, qtype)).to(device)
        errors[qtype, method] = error(values - original)
    return _Part(error(original), errors, packed)


def _gptq(
    weight: native.Floats,
    types: Sequence[QuantType],
    packed: Mapping[tuple[QuantType, str], native.Bytes],
    inputs: Inputs,
) -> dict[tuple[QuantType, str], native.Bytes]:
    """GPTQ of every type in one sweep; a row that came out worse than ggml's on the train Hessian
    stays ggml's.
    """
    assert inputs.factor is not None
    device = inputs.train.device
    original = torch.from_numpy(weight).to(device)
    grids = {}
    for qtype in types:
        rows = packed.get((qtype, "imatrix"))
        rows = native.quantize(weight, qtype, inputs.importance) if rows is None else rows
        grids[qtype] = torch.from_numpy(rows).to(device)
    codes = gptq([Rows(original, FORMATS[q].grid(grids[q])) for q in types], inputs.factor)
    solved = {}
    for qtype, new in zip(types, codes, strict=True):
        form, rounded = FORMATS[qtype], grids[qtype]
        grid = form.grid(rounded)
        before = output_error(grid.values(form.codes(rounded)) - original, inputs.train)
        after = output_error(grid.values(new) - original, inputs.train)
        rows = torch.where(
            (after <= before)[:, None], form.with_codes(rounded, new.to(torch.int16)), rounded
        )
        solved[qtype, "gptq"] = rows.cpu().numpy()
    return solved
