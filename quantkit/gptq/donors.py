"""Levels from elsewhere: GGUFs of the same model whose tensors compete with ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.ggml import native
from quantkit.ggml.types import QuantType
from quantkit.gguf_file.read import GgufFile
from quantkit.hub import given
from quantkit.tensors import TensorSpec

PREFIX = "from "  # of the method that such a tensor is said to be by


@dataclass(frozen=True)
class Donor:
    """One such file, and the method name of its tensors when they win."""

    method: str
    file: GgufFile


def open_donors(names: Sequence[str], specs: Mapping[str, TensorSpec]) -> list[Donor]:
    """Open the files that `--levels-from` names: paths or hf://owner/name/file.gguf.

    Raises UsageError for one that is not there, QuantkitError when a quantizable tensor of the
    model is missing from it or has another shape.
    """
    found = []
    for name, short in zip(names, given.short_names(names), strict=True):
        file = GgufFile(given.locate(name))
        for spec in specs.values():
            theirs = file.tensors.get(spec.name)
            if spec.quantizable and (theirs is None or theirs.shape != spec.shape):
                raise QuantkitError(
                    f"{file.path.name} is not a GGUF of this model: {spec.name} is missing or has"
                    " another shape.",
                    "Give quantized GGUFs of the same model with --levels-from.",
                )
        found.append(Donor(f"{PREFIX}{short}", file))
    return found


def rows_of(
    donors: Sequence[Donor], tensor: str, types: Sequence[QuantType]
) -> dict[tuple[QuantType, str], native.Bytes]:
    """Return what the files have of a tensor in one of `types`: packed rows by type and method."""
    return {
        (stored.qtype, donor.method): np.array(donor.file.packed(tensor))
        for donor in donors
        if (stored := donor.file.tensors[tensor]).qtype in types and stored.qtype.is_quantized
    }
