"""Compile what codebooks need on a GPU at once, in threads, before it is needed.

A kernel of a type takes a second or two; one after the other, several types would take half a
minute the first time on a machine. Triton keeps what is compiled on the disk. Imported only where
tensors are on a GPU.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import torch

from quantkit.ggml import codebook_scales, codebook_scales_cuda
from quantkit.ggml.codebooks import BLOCK, CODEBOOKS, UNIT, Codebook
from quantkit.ggml.searches_cuda import triton
from quantkit.ggml.types import QuantType
from quantkit.gptq import codebooks, kernels_codebook_step_cuda, kernels_codebook_walk_cuda
from quantkit.gptq.codebook_steps import LEAST_STEP
from quantkit.gptq.solver import Factor, factorize


@cache
def compile_kernels(types: frozenset[QuantType], device: torch.device) -> None:
    """Compile the kernels of those of `types` that are codebooks, unless the disk has them."""
    books = [CODEBOOKS[qtype] for qtype in sorted(types, key=str) if qtype in CODEBOOKS]
    if not books:
        return
    square = torch.eye(BLOCK, device=device)
    factor = factorize(square, 0.01, UNIT)
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
        for book in books:
            _ask_for(book, square, factor)


def _ask_for(book: Codebook, square: torch.Tensor, factor: Factor) -> None:
    weight, shares = torch.zeros_like(square), square[:1]
    packed = torch.zeros((BLOCK, book.qtype.block_bytes), dtype=torch.uint8, device=square.device)
    step = partial(kernels_codebook_step_cuda.descend, least_step=LEAST_STEP, only_compile=True)
    walk = partial(kernels_codebook_walk_cuda.feed, only_compile=True)
    lists, reaches = codebook_scales.value_lists(book.qtype), codebook_scales.REACHES
    codebook_scales_cuda.group_scales(book, weight, shares, lists, reaches, only_compile=True)
    codebooks.descend(book, packed, weight, square, 1, step)
    codebooks.feedback(book, packed, weight, [factor], walk)
