"""The kernels for codebooks on a GPU against the same in torch.

A tie may fall on another side, and then a row goes on another way; nearly all rows must agree, and
the errors. Where Triton is installed without a GPU, `TRITON_INTERPRET=1` runs the kernels slowly on
the CPU.
"""

from __future__ import annotations

import pytest
import torch
from test_codebooks_solver import DAMPING, error, hessian, weight
from triton_marks import INTERPRETED, ON_GPU

from quantkit.errors import QuantkitError
from quantkit.ggml import codebook_scales, native
from quantkit.ggml.codebooks import CODEBOOKS
from quantkit.ggml.types import QuantType
from quantkit.gptq.codebook_steps import step_block, walk_units
from quantkit.gptq.codebooks import (
    _step_block_cuda,
    _walk_units_cuda,
    descend,
    feedback,
    fit_scales,
    rounded,
)
from quantkit.gptq.select import Inputs, solve_experts, solve_rows
from quantkit.gptq.solver import factorize

EACH = pytest.mark.parametrize("qtype", CODEBOOKS, ids=str)


def rows(n_rows: int, n: int) -> torch.Tensor:
    w = weight(n_rows, n)
    w[0] = 0
    w[1, : n // 2] = 0
    return w


def compare(qtype: QuantType, w: torch.Tensor, h: torch.Tensor, n_differ: int) -> None:
    """Every kernel from the same start, on the device of the arguments."""
    book, importance = CODEBOOKS[qtype], h.diagonal().contiguous()
    start = codebook_scales.start(book, w, importance)
    found = [fit_scales(book, start, w, importance, s) for s in (_step_block_cuda, step_block)]
    assert int((found[0] != found[1]).any(1).sum()) <= n_differ
    factors = [factorize(h, DAMPING, 8)]
    found = [feedback(book, found[1], w, factors, s) for s in (_walk_units_cuda, walk_units)]
    assert int((found[0] != found[1]).any(1).sum()) <= n_differ
    found = [descend(book, found[1], w, h, 1, s) for s in (_step_block_cuda, step_block)]
    assert int((found[0] != found[1]).any(1).sum()) <= n_differ
    errors = [error(f.cpu(), qtype, w.cpu(), h.cpu()).sum() for f in found]
    assert errors[0] == pytest.approx(errors[1], rel=5e-3)
    assert not native.dequantize(found[0][:1].cpu().numpy(), qtype).any()


def compare_experts(qtype: QuantType, w: torch.Tensor, n: int) -> None:
    """Two experts at once against each alone."""
    book, device = CODEBOOKS[qtype], w.device
    hs = torch.stack([hessian(n, seed) for seed in (0, 1)]).to(device)
    shares = hs.diagonal(dim1=1, dim2=2).contiguous()
    factors = [factorize(h, DAMPING, 8) for h in hs]
    step, walk = _step_block_cuda, _walk_units_cuda
    start = rounded(book, w, shares, step)
    fed = feedback(book, start, w, factors, walk)
    done = descend(book, fed, w, hs, 1, step)
    for i, own in enumerate(w.chunk(2)):
        alone = rounded(book, own, shares[i], step)
        assert torch.equal(alone, start.chunk(2)[i])
        alone = feedback(book, alone, own, [factors[i]], walk)
        assert torch.equal(alone, fed.chunk(2)[i])
        alone = descend(book, alone, own, hs[i], 1, step)
        assert int((alone != done.chunk(2)[i]).any(1).sum()) <= len(own) / 10, "products round"


@ON_GPU
def test_all_is_compiled_before_it_is_needed() -> None:
    """In a fresh process: so this one comes first."""
    import triton

    from quantkit.gptq.codebook_compile_cuda import compile_kernels

    compile_kernels(frozenset(CODEBOOKS), torch.device("cuda"))
    asked: list[str] = []
    triton.knobs.compilation.listener = lambda *, src, **_: asked.append(src.fn.__name__)
    for qtype in CODEBOOKS:
        compare(qtype, rows(33, 512).cuda(), hessian(512).cuda(), 6)
        compare_experts(qtype, rows(40, 512).cuda(), 512)
    triton.knobs.compilation.listener = None
    assert asked == []


@ON_GPU
@EACH
def test_it_does_what_torch_does(qtype: QuantType) -> None:
    compare(qtype, rows(77, 512).cuda(), hessian(512).cuda(), 6)


@ON_GPU
@EACH
def test_experts_at_once(qtype: QuantType) -> None:
    compare_experts(qtype, rows(40, 512).cuda(), 512)


@ON_GPU
@EACH
def test_twice_is_the_same(qtype: QuantType) -> None:
    """A race would show as another result now and then."""
    book, w, h = CODEBOOKS[qtype], rows(2000, 512).cuda(), hessian(512).cuda()
    factors = [factorize(h, DAMPING, 8)]
    found = []
    for _ in range(3):
        start = rounded(book, w, h.diagonal().contiguous())
        fed = feedback(book, start, w, factors)
        found.append((start, fed, descend(book, fed, w, h, 2)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@ON_GPU
def test_experts_compete_as_alone() -> None:
    types = [QuantType(name) for name in ("IQ2_XXS", "IQ3_S", "Q4_K")]
    w, inputs = torch.stack([weight(24, 512, seed) for seed in range(3)]), []
    for seed in range(3):
        h = hessian(512, seed).cuda()
        shares = h.diagonal().cpu().numpy().copy()
        inputs.append(Inputs(shares, h, h, factorize(h, DAMPING)))
    together = solve_experts(w, types, ("gptq", "imatrix"), inputs, [None] * 3, 2)
    for part, own, known in zip(together, w, inputs, strict=True):
        alone = solve_rows(own.cuda(), types, ("gptq", "imatrix"), known, None, 2)
        for key, found in alone.errors.items():
            assert part.errors[key].relative == pytest.approx(found.relative, rel=0.01)


@EACH
def test_rounding_without_ggml_is_better_than_with_it(qtype: QuantType) -> None:
    """Under importances, which is what ggml's search is given."""
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(48, 512, generator=generator) * torch.rand(48, 1, generator=generator).exp()
    w[:16] *= torch.randn(16, 512, generator=generator).abs()
    w[0] = 0
    importance = torch.rand(512, generator=generator).mul(3).exp()
    importance[7] = 0
    h = torch.diag(importance)
    ours = rounded(CODEBOOKS[qtype], w, importance)
    theirs = torch.from_numpy(native.quantize(w.numpy(), qtype, importance.numpy()))
    assert error(ours, qtype, w, h).sum() < 0.97 * error(theirs, qtype, w, h).sum()
    assert not native.dequantize(ours[:1].numpy(), qtype).any()
    w[1, 3] = torch.nan
    with pytest.raises(QuantkitError, match="invalid blocks"):
        rounded(CODEBOOKS[qtype], w, importance)


def compare_scales(qtype: QuantType, w: torch.Tensor) -> None:
    from quantkit.ggml import codebook_scales_cuda

    shares = torch.rand(2, w.shape[1], generator=torch.Generator().manual_seed(3)).to(w.device)
    book, lists = CODEBOOKS[qtype], codebook_scales.value_lists(qtype)
    found = codebook_scales_cuda.group_scales(book, w, shares, lists, codebook_scales.REACHES)
    plain = codebook_scales.in_torch(book, w, shares)
    assert float(torch.isclose(found, plain, rtol=1e-4).float().mean()) > 0.99


@ON_GPU
@EACH
def test_scales_are_those_of_torch(qtype: QuantType) -> None:
    compare_scales(qtype, rows(40, 512).cuda())


@INTERPRETED
@EACH
def test_interpreted_scales(qtype: QuantType) -> None:
    compare_scales(qtype, rows(6, 256))


@pytest.mark.slow
@INTERPRETED
@EACH
def test_interpreted_kernels_are_their_references(qtype: QuantType) -> None:
    # Entries moved up and down are equally far from zeros.
    compare(qtype, rows(6, 256), hessian(256), int(not CODEBOOKS[qtype].has_signs))


@pytest.mark.slow
@INTERPRETED
@pytest.mark.parametrize("name", ["IQ1_M", "IQ3_XXS"])
def test_interpreted_experts(name: str) -> None:
    compare_experts(QuantType(name), rows(6, 256), 256)
