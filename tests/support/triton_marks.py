"""Which tests of Triton's kernels run here. Holds no tests."""

from __future__ import annotations

import os

import pytest
import torch

_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()
ON_GPU = pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")
INTERPRETED = pytest.mark.skipif(not _IS_INTERPRETED, reason="needs triton and TRITON_INTERPRET=1")
KERNELS = pytest.mark.skipif(
    not HAS_GPU and not _IS_INTERPRETED,
    reason="needs an NVIDIA GPU, or triton and TRITON_INTERPRET=1",
)
