"""GPTQ and descent onto codebooks: against trying all codes, against rounding onto the same scales,
the compiled kernels against torch, and what the bytes may be.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from quantkit.ggml import native
from quantkit.ggml.codebooks import CODEBOOKS, Codebook, Codes
from quantkit.ggml.types import QuantType
from quantkit.gptq.codebook_steps import step_block, walk_units
from quantkit.gptq.codebook_units import choose
from quantkit.gptq.codebooks import descend, feedback, fit_scales
from quantkit.gptq.select import Inputs, solve_tensor
from quantkit.gptq.solver import factorize

EACH = pytest.mark.parametrize("qtype", CODEBOOKS, ids=str)
DAMPING = 0.1


def hessian(n: int = 512, seed: int = 0) -> torch.Tensor:
    """Mean x xᵀ of correlated inputs whose columns differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator) / n**0.5 + torch.eye(n)
    sizes = torch.logspace(-0.5, 0.5, n)[torch.randperm(n, generator=generator)]
    x = torch.randn(2048, n, generator=generator) @ mix * sizes
    return x.T @ x / 2048


def weight(n_rows: int = 12, n: int = 512, seed: int = 1) -> torch.Tensor:
    return torch.randn(n_rows, n, generator=torch.Generator().manual_seed(seed))


def scaled(book: Codebook, w: torch.Tensor) -> torch.Tensor:
    """Rows with scales that fit the weights, and no codes yet: what ggml would search for."""
    n_rows, n = w.shape
    size = w.view(n_rows, -1, book.group).square().mean(-1).sqrt()
    typical = size / float(np.sqrt(np.square(book.entries).mean()))
    multipliers = torch.tensor(book.multipliers)
    d = typical.view(n_rows, n // 256, -1).amax(-1) / multipliers[-1]
    wanted = typical / d.repeat_interleave(256 // book.group, 1).clamp_min(1e-9)
    integer = (wanted[..., None] - multipliers).abs().argmin(-1)
    entry = torch.zeros((n_rows, n // book.width), dtype=torch.int16)
    signs = torch.zeros((n_rows, n // 8), dtype=torch.uint8)
    return book.pack(Codes(entry, signs, integer.to(torch.int16), d))


def error(packed: torch.Tensor, qtype: QuantType, w: torch.Tensor, h: torch.Tensor) -> np.ndarray:
    """e H eᵀ of every row in float64, of the values that libggml reads."""
    e = torch.from_numpy(native.dequantize(packed.numpy(), qtype)).double() - w.double()
    return ((e @ h.double()) * e).sum(1).numpy()


def all_codes(book: Codebook, metric: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The least cost of each target over all entries and legal signs, float64 (n,)."""
    table = torch.from_numpy(book.entries).double()
    if book.width == 4:
        n = len(table)
        table = torch.cat([table.repeat_interleave(n, 0), table.repeat(n, 1)], 1)
    signs = torch.tensor(list(product((1.0, -1.0), repeat=8)) if book.has_signs else [[1.0] * 8])
    if book.signs_are_even:
        signs = signs[signs.prod(1) > 0]
    best = torch.full((len(target),), torch.inf, dtype=torch.float64)
    for sign in signs.double():
        for i, t in enumerate(target.double()):
            e = table * sign - t
            best[i] = min(best[i], ((e @ metric.double()) * e).sum(1).min())
    return best


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_S", "IQ1_M"])
@pytest.mark.parametrize("coupling", [0.0, 0.3])
def test_the_choice_is_near_the_best_of_all_codes(name: str, coupling: float) -> None:
    """The very best where columns are independent; within a hundredth in the mean where not."""
    book = CODEBOOKS[QuantType(name)]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, 8, generator=generator) * coupling
    metric = torch.diag(torch.rand(8, generator=generator) + 0.5) + x.T @ x / 8
    target = torch.randn(4, 8, generator=generator) * float(np.abs(book.entries).mean())
    found = choose(book, target, metric, torch.zeros(4, dtype=torch.long))
    e = (found.levels - target).double()
    cost, best = ((e @ metric.double()) * e).sum(1), all_codes(book, metric, target)
    if coupling == 0:
        assert torch.allclose(cost, best, rtol=1e-4)
    assert bool((cost >= best * (1 - 1e-5)).all()) and cost.sum() <= 1.02 * best.sum()
    if book.signs_are_even:
        assert bool(((found.levels < 0).sum(1) % 2 == 0).all())


@EACH
def test_compiled_and_torch_agree(qtype: QuantType) -> None:
    """Feedback and a sweep of descent, but for a tie in a row here and there."""
    book, h, w = CODEBOOKS[qtype], hessian(), weight(33)
    w[0] = 0
    w[1, :256] = 0
    factor, importance = factorize(h, DAMPING, 8), h.diagonal().contiguous()
    start = fit_scales(book, scaled(book, w), w, importance)
    assert int((start != fit_scales(book, scaled(book, w), w, importance, step_block)).sum()) <= 3
    fed = feedback(book, start, w, [factor])
    plain = feedback(book, start, w, [factor], walk_units)
    assert int((fed != plain).any(1).sum()) <= 2
    both = descend(book, fed, w, h, 1), descend(book, fed, w, h, 1, step_block)
    assert int((both[0] != both[1]).any(1).sum()) <= 3
    assert not native.dequantize(both[0][:1].numpy(), qtype).any(), "a row of zeros stays one"


@EACH
def test_feedback_beats_rounding_and_every_sweep_lowers_the_error(qtype: QuantType) -> None:
    """Rounding onto the same scales is feedback without correlations. Rows that cross are rare and
    few; none becomes worse by a sweep. 1e-4 is for gradients kept in float32.
    """
    book, h, w = CODEBOOKS[qtype], hessian(), weight(24)
    start = scaled(book, w)
    alone = factorize(torch.diag(h.diagonal()), DAMPING, 8)
    rounded = error(feedback(book, start, w, [alone]), qtype, w, h)
    packed = feedback(book, start, w, [factorize(h, DAMPING, 8)])
    before = error(packed, qtype, w, h)
    assert before.sum() < rounded.sum()
    for _ in range(2):
        packed = descend(book, packed, w, h, 1)
        after = error(packed, qtype, w, h)
        assert (after <= before * (1 + 1e-4)).all()
        before = after
    codes = book.codes(packed)
    assert torch.equal(book.pack(codes), packed)
    if book.halves:
        half = (codes.entry >= len(book.entries) // 2).unflatten(1, (-1, book.group // 8))
        assert torch.equal(half.all(-1), half.any(-1))


@EACH
def test_bytes_do_not_depend_on_threads_or_on_how_rows_are_cut(qtype: QuantType) -> None:
    book, h, w = CODEBOOKS[qtype], hessian(256), weight(40, 256)
    factor, start = factorize(h, DAMPING, 8), scaled(book, w)

    def solved(rows: slice) -> torch.Tensor:
        fitted = fit_scales(book, start[rows], w[rows], h.diagonal().contiguous())
        fed = feedback(book, fitted, w[rows], [factor])
        return descend(book, fed, w[rows], h, 1)

    whole, n_threads = solved(slice(None)), torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(n_threads, 2))
        assert torch.equal(solved(slice(None)), whole)
    finally:
        torch.set_num_threads(n_threads)
    parts = torch.cat([solved(slice(0, 17)), solved(slice(17, 40))])
    assert int((parts != whole).any(1).sum()) <= 1, "products of other shapes may round otherwise"


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ3_XXS"])
def test_the_methods_compete(name: str) -> None:
    """A level of this type is by gptq, and better than ggml's with the same importances."""
    qtype = QuantType(name)
    h, w = hessian(256), weight(16, 256)
    inputs = Inputs(h.diagonal().numpy().copy(), h, hessian(256), factorize(h, DAMPING))
    solved = solve_tensor(w, [qtype], ("gptq", "imatrix"), inputs, None)[qtype]
    assert solved.method == "gptq"
    assert solved.errors["gptq"].relative < 0.9 * solved.errors["imatrix"].relative
    again = solve_tensor(w, [qtype], ("gptq",), replace(inputs), None)[qtype]
    assert np.array_equal(again.packed, solved.packed)
