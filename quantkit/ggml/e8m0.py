"""Scales of one byte: powers of two, as MXFP4 stores them.

ggml keeps E2M1's values doubled, so a byte e stands for half of the 2^(e - 127) of the OCP
Microscaling formats: `ggml_e8m0_to_fp32_half` of ggml-impl.h.
"""

from __future__ import annotations

import torch

_MOST = 254  # 255 means NaN


def decode(stored: torch.Tensor) -> torch.Tensor:
    """Return the float32 scales of bytes, of any shape."""
    e = stored.int()
    small = 0x00200000 << e.clamp(max=1)  # 2^-128 and 2^-127 are denormal
    return torch.where(e < 2, small, (e - 1) << 23).view(torch.float32)


def encode(scale: torch.Tensor) -> torch.Tensor:
    """Return the bytes of the powers of two that are nearest to float32 scales, of any shape; signs
    are lost.
    """
    bits = scale.contiguous().view(torch.int32) & 0x7FFFFFFF
    e = ((bits + 0x00400000) >> 23) + 1  # half a binade up: 1.5 and more becomes 2
    small = (bits >= 0x00300000).int()
    return torch.where(bits < 0x00600000, small, e).clamp(max=_MOST).to(torch.uint8)


def nearest(scale: torch.Tensor) -> torch.Tensor:
    """Return the storable float32 scales that are nearest to `scale`."""
    return decode(encode(scale))
