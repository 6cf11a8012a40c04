"""Matrix products in float32, on tensor cores where the device has them.

A GPU's plain float32 units reach a tenth of its tensor cores. TF32 alone keeps 11 bits of every
factor, too few for error feedback that runs over thousands of columns. So each factor is split into
a part of 11 bits and the rest, and three of the four products are summed in one multiplication of
threefold depth: about 22 bits. The tensor cores' own sums cut bits off, the more the deeper the
product, so it is cut into pieces. On a CPU nothing is split.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_DEPTH = 1024  # of a piece; measured against float64 by benchmarks/gptq_speed.py


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b, float32 (..., n, k) and (..., k, m) -> (..., n, m)."""
    if not a.is_cuda:
        return a @ b
    target = torch.zeros((*a.shape[:-1], b.shape[-1]), device=a.device)
    add_product(target, a, b)
    return target


def rough_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b with factors of TF32's 11 bits on a GPU, in a quarter of the time: for errors,
    which are sums over thousands of columns and only compared.
    """
    if not a.is_cuda:
        return a @ b
    with _tensor_cores():
        return a @ b


def add_product(target: torch.Tensor, a: torch.Tensor, b: torch.Tensor, sign: int = 1) -> None:
    """Compute target += sign * a @ b in place, float32 (n, m), (n, k), (k, m), or a batch of
    each.
    """
    add = target.addmm_ if target.dim() == 2 else target.baddbmm_
    if not a.is_cuda:
        add(a, b, alpha=sign)
        return
    with _tensor_cores():
        for left, right in zip(a.split(_DEPTH, -1), b.split(_DEPTH, -2), strict=True):
            add(_left(left), _right(right), alpha=sign)


def _split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` rounded to TF32's 11 bits, and what is left."""
    high = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return high, x - high


def _left(a: torch.Tensor) -> torch.Tensor:
    high, low = _split(a)
    return torch.cat([high, low, high], -1)


def _right(b: torch.Tensor) -> torch.Tensor:
    high, low = _split(b)
    return torch.cat([high, high, low], -2)


@contextmanager
def _tensor_cores() -> Iterator[None]:
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "tf32"
    try:
        yield
    finally:
        setting.fp32_precision = before
