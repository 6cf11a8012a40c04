"""Weights that a checkpoint stores as integers times scales: GPTQ, AWQ, AutoRound,
compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from quantkit.checkpoint.quantized import AWQ, GPTQ, PACKED, Expanded, Source
from quantkit.errors import QuantkitError

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the i-th output of a word lies in it


@dataclass(frozen=True)
class Integers:
    """A weight is its code times the scale of its column's group. Codes are as stored, less their
    zero: int16 (n_out, n_in); `scales` (n_out, n_groups) are in the type of the source, `group_of`
    is int64 (n_in,).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    group_of: torch.Tensor

    def values(self) -> torch.Tensor:
        """Return the weights (n_out, n_in) in the type of the scales, as their own runtime has
        them.
        """
        return (self.codes.float() * self.scale_of()).to(self.scales.dtype)

    def scale_of(self) -> torch.Tensor:
        """Return the scale of every weight, float32 (n_out, n_in)."""
        return self.scales.float()[:, self.group_of]


def read_integers(parts: Mapping[str, torch.Tensor], made: Expanded, source: Source) -> Integers:
    """Return the integers of a tensor from its stored `parts`, by the ends of their names. Raises
    QuantkitError where their values contradict each other.
    """
    read = _compressed if source.scheme == PACKED else _gptq
    found = read(parts, made.shape, source)
    n_groups = found.scales.shape[1]
    if int(found.group_of.min()) < 0 or int(found.group_of.max()) >= n_groups:
        raise QuantkitError(
            f"Columns of {made.sources[0]} belong to groups that have no scale.",
            "The checkpoint is broken: use another revision.",
        )
    return found


def _gptq(parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], source: Source) -> Integers:
    """GPTQ packs along the inputs, AWQ along the outputs; zeros lie along the outputs in both."""
    n_out, n_in = shape
    order = _AWQ_ORDER if source.scheme == AWQ else None
    zeros = unpack(parts["qzeros"], source.bits, order)[:, :n_out] + source.zero_offset
    words = parts["qweight"].T if source.scheme == GPTQ else parts["qweight"]
    codes = unpack(words, source.bits, order)
    codes = codes if source.scheme == GPTQ else codes.T
    group_of = _groups(parts.get("g_idx"), n_in, source)
    return Integers(codes - zeros.T[:, group_of], parts["scales"].T, group_of)


def _compressed(
    parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], source: Source
) -> Integers:
    """Codes and zeros are signed; packed ones have half of their range added."""
    n_out, n_in = shape
    middle = 1 << (source.bits - 1)
    if "weight_packed" in parts:
        codes = _unpacked(parts["weight_packed"], n_in, source.bits) - middle
    else:
        codes = parts["weight"].to(torch.int16)
    group_of = _groups(parts.get("weight_g_idx"), n_in, source)
    zeros = parts.get("weight_zero_point")
    if zeros is not None:
        if zeros.dtype == torch.int32:
            zeros = _unpacked(zeros.T, n_out, source.bits).T - middle
        codes = codes - zeros.to(torch.int16).view(n_out, -1)[:, group_of]
    return Integers(codes, parts["weight_scale"], group_of)


def _unpacked(words: torch.Tensor, n: int, bits: int) -> torch.Tensor:
    """The first n numbers of every row. Old files of 3 bits have ten of them a word, others let
    them cross words.
    """
    per_word = 32 // bits
    if 32 % bits and words.shape[1] == -(-n // per_word) != -(-n * bits // 32):
        shifts = torch.arange(per_word, dtype=torch.int32) * bits
        numbers = (words[..., None] >> shifts) & (2**bits - 1)
        return numbers.flatten(-2).to(torch.int16)[:, :n]
    return unpack(words, bits)[:, :n]


def unpack(words: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Return the numbers that rows of 32-bit words hold one after the other, the lowest bits first
    or in the `order` of a word: int16 (n_rows, n_words * 32 / bits).
    """
    if 32 % bits == 0:
        places = order or tuple(range(32 // bits))
        shifts = torch.tensor([i * bits for i in places], dtype=torch.int32)
        return ((words[..., None] >> shifts) & (2**bits - 1)).flatten(-2).to(torch.int16)
    stored = np.ascontiguousarray(words.numpy()).view(np.uint8)
    each = np.unpackbits(stored, axis=1, bitorder="little")
    n = each.shape[1] // bits
    each = each[:, : n * bits].reshape(len(each), n, bits).astype(np.int16)
    return torch.from_numpy(each @ (1 << np.arange(bits)).astype(np.int16))


def _groups(given: torch.Tensor | None, n_in: int, source: Source) -> torch.Tensor:
    if given is not None:
        return given.long()
    return torch.arange(n_in) // (source.group if source.group > 0 else n_in)
