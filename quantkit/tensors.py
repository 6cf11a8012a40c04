"""The data classes that modules share: frozen, without arrays, JSON in and out.

Shapes are written rows first, columns (the input features, the axis that blocks divide) last, as in
PyTorch. GGUF stores the same bytes and lists the dimensions in the other order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.ggml.types import QuantType

METHODS = ("gptq", "imatrix", "rtn")  # best first: the order in which ties are settled
# Of rows that a quantized source has itself: EXACT where every weight is equal to the bit. They
# compete wherever there are any, and are not tuned.
EXACT, CARRIED = "exact", "carried"
UNCHANGED = "unchanged"  # in a method's place: the bytes of base.gguf
# Kinds of tensors of a block that read one input, in every architecture of llama.cpp.
ONE_INPUT = (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"))


def is_in_block(name: str) -> bool:
    """Return whether a GGUF's tensor lies in one of the model's blocks, by its name."""
    return name.startswith("blk.")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of `base.gguf`: its name, shape (rows first) and stored type."""

    name: str
    shape: tuple[int, ...]
    qtype: QuantType
    quantizable: bool  # llama.cpp's own answer: 2-D or 3-D weights, no norms, no router
    carried: tuple[QuantType, ...] = ()  # that hold what a quantized source has, smallest first

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_columns(self) -> int:
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        return self.n_elements // self.n_columns

    def n_bytes(self, qtype: QuantType | None = None) -> int:
        """Return the bytes in `qtype`, by default as stored."""
        return (qtype or self.qtype).n_bytes(self.shape)


@dataclass(frozen=True, order=True)
class CandidateKey:
    """One way to store one tensor. `Q4_K/gptq` and `Q4_K/imatrix` are different candidates and
    compete.
    """

    tensor: str
    qtype: QuantType
    method: str

    @property
    def level(self) -> str:
        return f"{self.qtype}/{self.method}"


@dataclass(frozen=True)
class Candidate:
    """Where the bytes of one candidate lie, and how far they are from the original."""

    tensor: str
    qtype: QuantType
    method: str
    file: str  # that holds it, relative to the folder of the levels
    offset: int
    n_bytes: int
    error: float  # squared error of the layer's output over its power, on held-out inputs
    nats: float | None  # the KL divergence per token that it is estimated to cost, where known

    @property
    def key(self) -> CandidateKey:
        return CandidateKey(self.tensor, self.qtype, self.method)


@dataclass(frozen=True)
class FilePart:
    """One of the files that a large GGUF is published in."""

    name: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class Fallback:
    """A tensor that did not get the type or method that was asked for, and why. Shown in the
    report.
    """

    tensor: str
    asked: str
    used: str
    reason: str


@dataclass(frozen=True)
class CarriedOver:
    """A tensor of a quantized source in a type that holds it: how many of its weights are equal to
    the source's, and the square of what the others are off over that of all.
    """

    tensor: str
    qtype: str
    n_weights: int
    n_equal: int
    relative: float

    @property
    def is_exact(self) -> bool:
        """Return whether every weight is equal."""
        return self.n_equal == self.n_weights

    @property
    def method(self) -> str:
        """Return the name under which its rows compete."""
        return EXACT if self.is_exact else CARRIED


def to_json(value: Any) -> Any:
    """Return `value` as JSON types: dataclasses become objects, quant types their names, tuples
    lists.
    """
    if isinstance(value, QuantType):
        return value.name
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value
