"""GPTQ, descent, products and Hessians on a GPU against the same on the CPU.

The column walks are compiled apart for each device and may settle a tie on different sides, and
then part ways for the rest of the row; what must agree is nearly every row, and the errors.
Where Triton is installed without a GPU, `TRITON_INTERPRET=1` runs its kernels slowly on the CPU.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from triton_marks import INTERPRETED, ON_GPU

from quantkit.errors import QuantkitError
from quantkit.ggml import native, rounding
from quantkit.ggml.formats import FORMATS
from quantkit.ggml.types import QuantType
from quantkit.gptq.descent import (
    _sweep_cuda,
    descend,
    put_together,
    row_errors,
    step_block,
    take_apart,
)
from quantkit.gptq.products import add_product, product
from quantkit.gptq.select import Inputs, solve_experts, solve_rows, solve_tensor
from quantkit.gptq.solver import (
    Rows,
    _walk_columns_cuda,
    factorize,
    gptq,
    output_error,
    walk_columns,
)
from quantkit.statistics.hessian import add_outer, add_outers, symmetrize

TYPES = tuple(FORMATS)
EACH = pytest.mark.parametrize("qtype", TYPES, ids=str)


def hessian(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(n, n, generator=generator) / n**0.5 + torch.eye(n)
    x = torch.randn(2 * n, n, generator=generator) @ mix
    h = x.T @ x / len(x)
    h.diagonal().add_(0.05 * h.diagonal().median())
    return h


def weight(n_rows: int, n: int) -> torch.Tensor:
    w = torch.randn(n_rows, n, generator=torch.Generator().manual_seed(1))
    w[0] = 0
    w[1, : n // 2] = 0
    return w


def rounded(w: torch.Tensor, h: torch.Tensor, qtype: QuantType) -> torch.Tensor:
    return torch.from_numpy(native.quantize(w.numpy(), qtype, h.diagonal().numpy().copy()))


@ON_GPU
@pytest.mark.parametrize("n", [32, 96, 320, 1024, 2048])
def test_gptq(n: int) -> None:
    h, w = hessian(n), weight(301, n)
    types = [q for q in TYPES if q.fits(n)]
    packed = [rounded(w, h, q) for q in types]
    found = []
    for device in ("cpu", "cuda"):
        moved = w.to(device)
        rows = [
            Rows(moved, FORMATS[q].grid(p.to(device))) for q, p in zip(types, packed, strict=True)
        ]
        found.append([c.cpu() for c in gptq(rows, factorize(h.to(device), 0.1))])
    for qtype, start, cpu, cuda in zip(types, packed, *found, strict=True):
        differ = int((cpu != cuda).any(1).sum())
        assert differ <= 0.05 * len(w) * max(1, n / 512), (qtype, differ)
        grid = FORMATS[qtype].grid(start)
        errors = [float(output_error(grid.values(c) - w, h).sum()) for c in (cpu, cuda)]
        assert errors[1] == pytest.approx(errors[0], rel=2e-3), qtype


@ON_GPU
@pytest.mark.parametrize("n", [32, 288, 512, 1024])
@EACH
def test_descent(qtype: QuantType, n: int) -> None:
    if not qtype.fits(n):
        pytest.skip("rows do not divide into blocks")
    h, w, form = hessian(n), weight(77, n), FORMATS[qtype]
    packed = rounded(w, h, qtype)
    on_cpu = descend(form, packed, w, h, n_sweeps=2)
    on_gpu = descend(form, packed.cuda(), w.cuda(), h.cuda(), n_sweeps=2).cpu()
    before, cpu, gpu = (row_errors(form, p, w, h) for p in (packed, on_cpu, on_gpu))
    assert bool((gpu <= before * (1 + 1e-4) + 1e-9).all())  # judged on the CPU, in float32
    assert float(gpu.sum()) == pytest.approx(float(cpu.sum()), rel=5e-3)
    assert int((on_cpu != on_gpu).any(1).sum()) <= 0.2 * len(w) * max(1, n / 512)


@ON_GPU
@EACH
def test_it_does_what_torch_does_on_the_gpu(qtype: QuantType) -> None:
    """One sweep by the kernels and by their references, on the same device."""
    h, w, form = hessian(512).cuda(), weight(77, 512).cuda(), FORMATS[qtype]
    packed = rounded(w.cpu(), h.cpu(), qtype).cuda()
    factor, rows = factorize(h, 0.1), [Rows(w, form.grid(packed))]
    assert int((gptq(rows, factor)[0] != gptq(rows, factor, walk_columns)[0]).any(1).sum()) <= 4
    kernel = descend(form, packed, w, h, n_sweeps=1)
    plain = descend(form, packed, w, h, n_sweeps=1, step=step_block)
    assert int((kernel != plain).any(1).sum()) <= 8


@ON_GPU
def test_twice_is_the_same() -> None:
    """A race would show as another result now and then."""
    h, w = hessian(512).cuda(), weight(3000, 512).cuda()
    for qtype in TYPES:
        packed = rounded(w.cpu(), h.cpu(), qtype).cuda()
        form, factor = FORMATS[qtype], factorize(h, 0.1)
        first = gptq([Rows(w, form.grid(packed))], factor)[0]
        swept = descend(form, packed, w, h)
        for _ in range(3):
            assert torch.equal(gptq([Rows(w, form.grid(packed))], factor)[0], first)
            assert torch.equal(descend(form, packed, w, h), swept)


@ON_GPU
@EACH
def test_values_are_ggmls(qtype: QuantType) -> None:
    packed = rounded(weight(9, 512), hessian(512), qtype)
    ours = FORMATS[qtype].values(packed.cuda()).cpu().numpy()
    theirs = native.dequantize(packed.numpy(), qtype)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def hard_rows(n: int) -> torch.Tensor:
    """Weights with ties, zeros, one sign and a constant: float32 (40, n)."""
    w = weight(40, n)
    w[2:10] = w[2:10].bfloat16().float()
    w[10:14] = w[10:14].abs() + 0.01
    w[14:18] = -w[14:18].abs()
    w[18, ::3] = 0
    w[19] = 0.25
    w[20, : n // 2] = 1e-20
    return w


def compare_grids(qtype: QuantType, device: str, is_weighted: bool) -> None:
    """Rows of the GPU's search against ggml's: most are equal, the others as good."""
    from quantkit.ggml import grids_cuda

    n = 512
    w = hard_rows(n)[: 40 if device == "cuda" else 22]
    importance = torch.ones(n)
    if is_weighted:
        importance = torch.rand(n, generator=torch.Generator().manual_seed(2)).mul(3).exp()
    ours = grids_cuda.quantize(
        w.to(device), qtype, importance.to(device) if is_weighted else None
    ).cpu()
    shares = importance.numpy() if is_weighted else None
    ggmls = torch.from_numpy(native.quantize(w.numpy(), qtype, shares))
    values = [native.dequantize(p.numpy(), qtype) for p in (ours, ggmls)]
    # A tie or a sum's last bit may lead a row to another scale, for better or worse.
    assert int((values[0] != values[1]).any(1).sum()) <= len(w) / 3
    errors = [((v - w.numpy()) ** 2) @ importance.numpy() for v in values]
    # A row of one value is all but exact: what is left of it is the rounding of its scale.
    np.testing.assert_allclose(errors[0], errors[1], rtol=0.05, atol=1e-5)
    assert errors[0].sum() <= errors[1].sum() * 1.003


WEIGHTED = pytest.mark.parametrize("is_weighted", [True, False], ids=["imatrix", "rtn"])


@ON_GPU
@WEIGHTED
@EACH
def test_grids_are_ggmls(qtype: QuantType, is_weighted: bool) -> None:
    compare_grids(qtype, "cuda", is_weighted)


@ON_GPU
@EACH
def test_grids_of_experts_have_importances_each(qtype: QuantType) -> None:
    from quantkit.ggml import grids_cuda

    w = weight(24, 512).cuda()
    importances = torch.rand(3, 512, device="cuda").mul(3).exp()
    together = grids_cuda.quantize(w, qtype, importances)
    parts = zip(w.chunk(3), importances, strict=True)
    alone = torch.cat([grids_cuda.quantize(own, qtype, shares) for own, shares in parts])
    assert torch.equal(together, alone)


@ON_GPU
def test_weights_that_are_not_finite() -> None:
    from quantkit.ggml import grids_cuda

    w = weight(3, 256).cuda()
    w[1, 7] = float("nan")
    for qtype in TYPES:
        for importance in (None, torch.ones(256, device="cuda")):
            with pytest.raises(QuantkitError, match="invalid blocks"):
                grids_cuda.quantize(w, qtype, importance)


@pytest.mark.slow
@INTERPRETED
@WEIGHTED
@EACH
def test_interpreted_grids_are_ggmls(qtype: QuantType, is_weighted: bool) -> None:
    compare_grids(qtype, "cpu", is_weighted)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_0", "MXFP4"])
def test_rounding_without_a_search_is_ggmls(name: str) -> None:
    """To the byte, ties included: a weight half-way between two codes goes where C puts it."""
    qtype, w = QuantType(name), torch.cat([hard_rows(512), torch.arange(-256.0, 256.0)[None] / 2])
    packed, halves = rounding.quantize(w, qtype)
    assert np.array_equal(packed.numpy(), native.quantize(w.numpy(), qtype))
    assert torch.equal(halves, FORMATS[qtype].scales(packed))


@ON_GPU
def test_products_are_float32() -> None:
    """As good as float32's own units, hundreds of times better than TF32."""
    generator = torch.Generator("cuda").manual_seed(0)
    a = torch.randn(300, 2000, generator=generator, device="cuda")
    b = torch.randn(2000, 500, generator=generator, device="cuda")
    exact = a.double() @ b.double()
    assert float((product(a, b) - exact).norm() / exact.norm()) < 2e-6
    target = torch.ones(300, 600, device="cuda")
    add_product(target[:, 50:550], a, b, -1)
    assert float((target[:, 50:550] - (1 - exact)).norm() / exact.norm()) < 2e-6
    assert bool((target[:, :50] == 1).all() and (target[:, 550:] == 1).all())
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"


@ON_GPU
def test_errors_are_right_to_a_thousandth() -> None:
    """They compare rows; an input far larger than all others is what TF32 makes least of."""
    h = hessian(2000).cuda()
    h[:, 7] *= 100
    h[7] *= 100
    e = torch.randn(300, 2000, generator=torch.Generator().manual_seed(1)).cuda()
    exact = ((e.double() @ h.double()) * e.double()).sum(1)
    assert float((output_error(e, h) / exact - 1).abs().max()) < 1e-3


@ON_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_hessians_of_experts(dtype: torch.dtype) -> None:
    x = torch.randn(3000, 1500, generator=torch.Generator().manual_seed(0)).cuda().to(dtype)
    bounds, total = torch.tensor([5, 5, 1000, 3000]).cuda(), torch.zeros(3, 1500, 1500).cuda()
    add_outers(total, x, bounds, 1.0)
    add_outers(total, x, bounds, 0.5)
    symmetrize(total)
    assert bool((total[0] == 0).all())
    for i, (first, last) in enumerate([(5, 1000), (1000, 3000)], 1):
        exact = 1.5 * x[first:last].double().T @ x[first:last].double()
        assert float((total[i] - exact).norm() / exact.norm()) < 1e-5


@ON_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_hessian(dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(3000, 1500, generator=generator, device="cuda").to(dtype)
    total = torch.zeros(1500, 1500, device="cuda")
    for part in x.split(1000):
        add_outer(total, part)
    exact = x.double().T @ x.double()
    assert float((symmetrize(total) - exact).norm() / exact.norm()) < 1e-5


@ON_GPU
def test_factor() -> None:
    h = hessian(1500)
    cpu, cuda = factorize(h, 0.1), factorize(h.cuda(), 0.1)
    assert torch.equal(cpu.order, cuda.order.cpu())
    assert torch.allclose(cpu.upper, cuda.upper.cpu(), rtol=1e-3, atol=1e-5)
    assert bool((cuda.upper.tril(-1) == 0).all())


@ON_GPU
def test_a_tensor_at_all_levels() -> None:
    """The whole competition, with a codebook type, whose scales a GPU searches in its own way."""
    h, w = hessian(512), weight(64, 512)
    types = [QuantType(name) for name in ("Q2_K", "Q4_K", "IQ4_XS", "IQ3_S", "Q8_0", "F16")]
    solved = []
    for device in ("cpu", "cuda"):
        moved = h.to(device)
        inputs = Inputs(h.diagonal().numpy().copy(), moved, moved, factorize(moved, 0.1))
        solved.append(solve_tensor(w, types, ("gptq", "imatrix", "rtn"), inputs, None))
    for qtype in types:
        cpu, cuda = (s[qtype] for s in solved)
        assert cpu.method == cuda.method and set(cpu.errors) == set(cuda.errors)
        for method, error in cpu.errors.items():
            if qtype in FORMATS or not qtype.is_quantized:
                assert cuda.errors[method].relative == pytest.approx(error.relative, rel=0.01)
            else:
                assert cuda.errors[method].relative < 1.02 * error.relative


@pytest.mark.slow
@INTERPRETED
@pytest.mark.parametrize("name", ["Q4_1", "IQ4_XS", "Q6_K", "Q4_K"])
def test_interpreted_kernels_are_their_references(name: str) -> None:
    qtype, n = QuantType(name), 256
    h, w, form = hessian(n), weight(6, n), FORMATS[QuantType(name)]
    packed = rounded(w, h, qtype)
    rows, factor = [Rows(w, form.grid(packed))], factorize(h, 0.1)
    assert torch.equal(
        gptq(rows, factor, _walk_columns_cuda)[0], gptq(rows, factor, walk_columns)[0]
    )
    state = take_apart(form, packed, w, h)
    _sweep_cuda(state, h, 1)
    plain = descend(form, packed, w, h, n_sweeps=1, step=step_block)
    assert int((put_together(state, packed) != plain).any(1).sum()) <= 1


@ON_GPU
@pytest.mark.parametrize("n", [256, 512, 1024])
def test_experts_together(n: int) -> None:
    """One sweep over experts that differ in weights and Hessians, against one expert at a time."""
    from test_solver import experts

    types = [q for q in TYPES if q.fits(n)]
    weights, inputs = experts(n, 5)
    on_gpu = []
    for own in inputs:
        h = own.train.cuda()
        on_gpu.append(Inputs(own.importance, h, h, factorize(h, 0.1)))
    methods = ("gptq", "imatrix")
    together = solve_experts(weights, types, methods, on_gpu, [None] * 5, 2)
    for part, w, own in zip(together, weights, on_gpu, strict=True):
        alone = solve_rows(w.cuda(), types, methods, own, None, 2)
        for key, error in alone.errors.items():
            assert part.errors[key].relative == pytest.approx(error.relative, rel=0.01)
        for key, rows in part.packed.items():
            same = (rows == alone.packed[key].cpu()).float().mean()
            assert same > 0.97, (key, same)


def cross_entropies(device: str) -> None:
    """Against float64: a kernel row is right to a few parts in 10 million, whatever the logits."""
    from quantkit.search.kernels_cuda import cross_entropy

    generator = torch.Generator().manual_seed(0)
    for n_vocab in (5, 2048, 5001):
        logits = 8 * torch.randn(7, n_vocab, generator=generator)
        logits[1] += 60
        probabilities = 4096 * torch.softmax(logits.roll(1, 0), -1)
        logs = torch.log_softmax(logits.double(), -1)
        for n_kept in {min(n_vocab, n) for n in (3, 2048, 3000)}:
            ids = probabilities.topk(n_kept).indices.sort(-1).values
            p, own = probabilities.gather(-1, ids).half(), logs.gather(-1, ids)
            sums = cross_entropy(ids.int().to(device), p.to(device), logits.to(device))
            found, share = (x.cpu() for x in sums)
            assert torch.allclose(found, -(p.double() * own).sum(-1), rtol=1e-6)
            assert torch.allclose(share, own.exp().sum(-1), rtol=1e-5)


@ON_GPU
def test_cross_entropies() -> None:
    cross_entropies("cuda")


@INTERPRETED
def test_cross_entropies_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    cross_entropies("cpu")
