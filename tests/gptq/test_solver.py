"""GPTQ onto fixed grids: against rounding, against a plain reading of the paper in float64, and the
compiled column walk against the torch one.

Also `quantkit.gptq.select`, which lets the methods compete: what it returns is never worse than
what it was asked to beat.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.errors import QuantkitError
from quantkit.ggml import native
from quantkit.ggml.formats import FORMATS, Grid
from quantkit.ggml.types import F16, QuantType
from quantkit.gptq import select
from quantkit.gptq.select import Inputs, solve_tensor
from quantkit.gptq.solver import Rows, factorize, gptq, output_error, walk_columns
from quantkit.statistics.sensitivity import Sensitivity
from quantkit.tensors import EXACT

TYPES = tuple(FORMATS)
DAMPING = 0.1
Q8 = QuantType("Q8_0")


def hessian(n: int, seed: int = 0, n_tokens: int = 2048) -> torch.Tensor:
    """Mean x xᵀ of correlated inputs whose columns differ in size by a factor of a hundred."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator) / n**0.5 + torch.eye(n)
    sizes = torch.logspace(-1, 1, n)[torch.randperm(n, generator=generator)]
    x = torch.randn(n_tokens, n, generator=generator) @ mix * sizes
    return x.T @ x / n_tokens


def weight(n_rows: int, n: int, seed: int = 1) -> torch.Tensor:
    values = torch.randn(n_rows, n, generator=torch.Generator().manual_seed(seed))
    values[0] = 0  # ggml gives such a row scales of zero
    return values


def rounded(w: torch.Tensor, h: torch.Tensor, qtype: QuantType) -> torch.Tensor:
    """ggml's own rows with diag(H) as importances: uint8 (n_rows, row_bytes)."""
    importance = h.diagonal().numpy().copy()
    return torch.from_numpy(native.quantize(w.numpy(), qtype, importance))


def rows_of(w: torch.Tensor, h: torch.Tensor, qtype: QuantType) -> Rows:
    return Rows(w, FORMATS[qtype].grid(rounded(w, h, qtype)))


def levels(grid: Grid) -> torch.Tensor:
    """Every value that each weight can take: (n_codes, n_rows, n_columns)."""
    n_rows, n_columns = grid.scale.shape[0], grid.scale.shape[1] * grid.group
    codes = torch.arange(grid.low, grid.high + 1, dtype=torch.int16)
    return torch.stack([grid.values(c.expand(n_rows, n_columns)) for c in codes])


def is_nearest(w: torch.Tensor, grid: Grid, codes: torch.Tensor) -> torch.Tensor:
    """Whether each code is a nearest one; a relative 1e-5 decides nothing."""
    distance = (levels(grid) - w).abs()
    ours = (grid.values(codes) - w).abs()
    return ours <= distance.amin(0) * (1 + 1e-5) + 1e-5 * grid.scale.abs().repeat_interleave(
        grid.group, 1
    )


def damped(h: torch.Tensor, damping: float) -> torch.Tensor:
    """H with a share of its median diagonal added, float64."""
    diagonal = h.diagonal().double()
    return h.double() + damping * diagonal.median() * torch.eye(len(h))


def textbook(rows: Rows, h: torch.Tensor, damping: float) -> torch.Tensor:
    """GPTQ as the paper derives it, in float64, without Cholesky: after each column the inverse
    Hessian loses that column by Gaussian elimination.
    """
    n = h.shape[0]
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    inverse = torch.linalg.inv(damped(h, damping)[order][:, order])
    w = rows.weight.double()[:, order]
    codes = torch.empty(w.shape, dtype=torch.int8)
    values = levels(rows.grid).double()[:, :, order]
    for i in range(n):
        best = (values[:, :, i] - w[:, i]).abs().argmin(0)
        codes[:, order[i]] = (best + rows.grid.low).to(torch.int8)
        error = w[:, i] - values[best, torch.arange(len(w)), i]
        w -= torch.outer(error / inverse[i, i], inverse[i])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_with_a_multiple_of_the_identity_it_is_rounding(scale: float) -> None:
    n = 512
    h = scale * torch.eye(n)
    w = weight(5, n)
    stacked = [rows_of(w, h, qtype) for qtype in TYPES]
    for qtype, rows, codes in zip(
        TYPES, stacked, gptq(stacked, factorize(h, DAMPING)), strict=True
    ):
        assert codes.dtype == torch.int8 and codes.shape == (5, n)
        assert bool(is_nearest(w, rows.grid, codes).all()), qtype


@pytest.mark.parametrize("qtype", TYPES, ids=str)
def test_it_is_the_papers_algorithm(qtype: QuantType) -> None:
    """float32 and float64 may round a weight at a tie to different sides, and then part ways for
    the rest of the row: at most one row of twenty may differ, and no row's error by a hundredth.
    """
    h, w = hessian(256), weight(20, 256)
    rows = rows_of(w, h, qtype)
    (ours,) = gptq([rows], factorize(h, DAMPING))
    wanted = textbook(rows, h, DAMPING)
    values = [rows.grid.values(codes) for codes in (ours, wanted)]  # MXFP4 has two zeros
    assert int((values[0] != values[1]).any(1).sum()) <= 1
    errors = [output_error(rows.grid.values(c) - w, h)[1:] for c in (ours, wanted)]
    assert torch.allclose(*errors, rtol=0.01)


@pytest.mark.parametrize("n", [32, 96, 128, 160, 320, 768])
def test_compiled_walk_equals_the_torch_walk(n: int) -> None:
    """Code for code, at widths below, at and between the 128-column leaves."""
    h, w = hessian(n), weight(70, n)  # more rows than one tile of 64
    types = [q for q in TYPES if q.fits(n)]
    stacked = [rows_of(w, h, qtype) for qtype in types]
    factor = factorize(h, DAMPING)
    compiled, plain = gptq(stacked, factor), gptq(stacked, factor, walk_columns)
    for qtype, one, other in zip(types, compiled, plain, strict=True):
        assert torch.equal(one, other), qtype


def test_stacking_changes_nothing() -> None:
    """Tensors of different heights at all levels in one sweep, and each alone."""
    h = hessian(256)
    factor = factorize(h, DAMPING)
    tensors = [weight(n, 256, seed) for seed, n in enumerate((3, 65, 20))]
    stacked = [rows_of(w, h, qtype) for w in tensors for qtype in TYPES]
    for together, rows in zip(gptq(stacked, factor), stacked, strict=True):
        (alone,) = gptq([rows], factor)
        assert torch.equal(together, alone)


def test_arguments_are_left_alone() -> None:
    h, w = hessian(256), weight(4, 256)
    stacked = [rows_of(w, h, qtype) for qtype in TYPES]
    kept = [t.clone() for t in (h, w, *(r.grid.scale for r in stacked))]
    gptq(stacked, factorize(h, DAMPING))
    assert all(
        torch.equal(a, b)
        for a, b in zip(kept, (h, w, *(r.grid.scale for r in stacked)), strict=True)
    )


def test_codes_are_the_grids() -> None:
    h, w = hessian(256), 100 * weight(8, 256)  # far outside of every grid made for the tame weights
    tame = weight(8, 256)
    for qtype in TYPES:
        grid = FORMATS[qtype].grid(rounded(tame, h, qtype))
        (codes,) = gptq([Rows(w, grid)], factorize(h, DAMPING))
        assert int(codes.min()) >= grid.low and int(codes.max()) <= grid.high
        assert int(codes.min()) == grid.low and int(codes.max()) == grid.high


def test_it_pays() -> None:
    """On correlated inputs the output error falls well below rounding's, for every type."""
    h, w = hessian(256), weight(40, 256)
    stacked = [rows_of(w, h, qtype) for qtype in TYPES]
    for qtype, rows, codes in zip(
        TYPES, stacked, gptq(stacked, factorize(h, DAMPING)), strict=True
    ):
        form, packed = FORMATS[qtype], rounded(w, h, qtype)
        before = output_error(rows.grid.values(form.codes(packed)) - w, h).sum()
        after = output_error(rows.grid.values(codes) - w, h).sum()
        assert after < 0.8 * before, qtype


def test_factor_is_that_of_the_damped_inverse() -> None:
    h = hessian(96)
    factor = factorize(h, DAMPING)
    order = factor.order
    assert bool((h.diagonal()[order].diff() <= 0).all())
    inverse = torch.linalg.inv(damped(h, DAMPING)[order][:, order])
    assert torch.allclose(factor.diagonal.double(), damped(h, DAMPING).diagonal())
    upper = factor.upper.double()
    assert torch.equal(factor.upper, factor.upper.triu())
    assert torch.allclose(upper.T @ upper, inverse, rtol=1e-3, atol=1e-3 * float(inverse.max()))
    assert (factor.damping, factor.escalated, factor.n_dead) == (DAMPING, False, 0)


def test_dead_columns() -> None:
    """Columns that never saw an input are rounded, and take no part in the others' feedback."""
    h, w = hessian(256), weight(6, 256)
    dead = torch.zeros(256, dtype=torch.bool)
    dead[[0, 17, 200, 255]] = True
    dead[64:96] = True
    h[dead] = 0
    h[:, dead] = 0
    factor = factorize(h, DAMPING)
    assert factor.n_dead == int(dead.sum())
    stacked = [rows_of(w, h, qtype) for qtype in TYPES]
    other = w.clone()
    other[:, dead] = 5 * w[:, dead]
    for rows, codes in zip(stacked, gptq(stacked, factor), strict=True):
        assert bool(is_nearest(w, rows.grid, codes)[:, dead].all())
        (changed,) = gptq([Rows(other, rows.grid)], factor)
        assert torch.equal(changed[:, ~dead], codes[:, ~dead])


def test_no_input_at_all() -> None:
    h, w = torch.zeros(256, 256), weight(3, 256)
    factor = factorize(h, DAMPING)
    assert factor.n_dead == 256
    grid = FORMATS[QuantType("Q4_K")].grid(
        torch.from_numpy(native.quantize(w.numpy(), QuantType("Q4_K")))
    )
    (codes,) = gptq([Rows(w, grid)], factor)
    assert bool(is_nearest(w, grid, codes).all())


@pytest.mark.parametrize("n_tokens", [1, 40, 255])
def test_fewer_tokens_than_columns(n_tokens: int) -> None:
    """A Hessian without full rank is solved with the asked damping, and still pays."""
    h, w = hessian(256, n_tokens=n_tokens), weight(16, 256)
    factor = factorize(h, DAMPING)
    assert not factor.escalated and factor.damping == DAMPING
    for qtype in TYPES:
        rows, form = rows_of(w, h, qtype), FORMATS[qtype]
        (codes,) = gptq([rows], factor)
        before = output_error(rows.grid.values(form.codes(rounded(w, h, qtype))) - w, h).sum()
        assert output_error(rows.grid.values(codes) - w, h).sum() < before


def test_damping_is_escalated_and_recorded() -> None:
    """A slightly indefinite matrix, as rounding makes them: tenfold damping mends it."""
    generator = torch.Generator().manual_seed(0)
    vectors, _ = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))
    values = torch.linspace(0.5, 1.5, 64, dtype=torch.float64)
    values[0] = -0.3
    factor = factorize(((vectors * values) @ vectors.T).float(), DAMPING)
    assert factor.escalated and factor.damping == pytest.approx(10 * DAMPING)
    values[0] = -1e4
    values[1:] += 200  # the diagonal stays above zero
    with pytest.raises(QuantkitError, match="cannot be factorized"):
        factorize(((vectors * values) @ vectors.T).float(), DAMPING)


@pytest.mark.parametrize("at", [(3, 3), (3, 7)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite(at: tuple[int, int], bad: float) -> None:
    h = hessian(64)
    h[at] = h[at[::-1]] = bad
    with pytest.raises(QuantkitError) as error:
        factorize(h, DAMPING)
    assert error.value.remedy


def test_order_of_columns_does_not_show() -> None:
    """Groups of 32 columns in another order, with H and grid in the same order: the same codes."""
    n = 256
    h, w = hessian(n), weight(9, n)
    assert len(set(h.diagonal().tolist())) == n  # no ties in the order
    groups = torch.randperm(n // 32, generator=torch.Generator().manual_seed(4))
    columns = (groups[:, None] * 32 + torch.arange(32)).flatten()
    inside = torch.cat(
        [
            g + torch.randperm(32, generator=torch.Generator().manual_seed(int(g)))
            for g in columns[::32]
        ]
    )
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q4_K", "Q5_K"):
        rows = rows_of(w, h, QuantType(name))
        grid = rows.grid
        moved = Grid(
            grid.scale[:, groups], grid.minimum[:, groups], 32, grid.low, grid.high, grid.table
        )
        (codes,) = gptq([rows], factorize(h, DAMPING))
        (permuted,) = gptq(
            [Rows(w[:, inside], moved)], factorize(h[inside][:, inside].clone(), DAMPING)
        )
        assert torch.equal(permuted, codes[:, inside]), name


def test_output_error_is_the_mean_squared_output() -> None:
    """e H eᵀ with H = mean x xᵀ is the mean of (e x)²."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 48, generator=generator)
    e = torch.randn(7, 48, generator=generator)
    wanted = (x @ e.T).square().mean(0)
    assert torch.allclose(output_error(e, x.T @ x / 500), wanted, rtol=1e-4)


def inputs_of(h: torch.Tensor, heldout: torch.Tensor | None = None) -> Inputs:
    other = hessian(len(h), seed=7) if heldout is None else heldout
    return Inputs(h.diagonal().numpy().copy(), h, other, factorize(h, DAMPING))


def without(inputs: Inputs) -> Inputs:
    """The same without GPTQ's factor."""
    return Inputs(inputs.importance, inputs.train, inputs.heldout, None)


def errors_of(w: torch.Tensor, packed: np.ndarray, qtype: QuantType, h: torch.Tensor) -> np.ndarray:
    e = torch.from_numpy(native.dequantize(packed, qtype)).double() - w.double()
    return ((e @ h.double()) * e).sum(1).numpy()


@pytest.mark.parametrize("qtype", TYPES, ids=str)
@pytest.mark.parametrize("n_tokens", [20, 2048])
def test_no_row_is_worse_than_ggmls(qtype: QuantType, n_tokens: int) -> None:
    """On the Hessian it was solved with, and in float64: 1e-5 is for the float32 comparison."""
    h, w = hessian(256, n_tokens=n_tokens), weight(30, 256)
    ggml = rounded(w, h, qtype).numpy()
    known = {(qtype, "imatrix"): torch.from_numpy(ggml)}
    packed = select._gptq(w, [qtype], known, [inputs_of(h)], n_sweeps=4)
    before = errors_of(w, ggml, qtype, h)
    after = errors_of(w, packed[qtype, "gptq"].numpy(), qtype, h)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < before.sum()


ALL_METHODS = ("gptq", "imatrix", "rtn")


def test_the_best_on_heldout_inputs_wins() -> None:
    h, heldout, w = hessian(256), hessian(256, seed=3), weight(12, 256)
    inputs = Inputs(h.diagonal().numpy().copy(), h, heldout, factorize(h, DAMPING))
    solved = solve_tensor(w, TYPES, ALL_METHODS, inputs, None)
    power = ((w.double() @ heldout.double()) * w.double()).sum()
    assert set(solved) == set(TYPES)
    for qtype, result in solved.items():
        assert set(result.errors) == set(ALL_METHODS)
        assert result.errors[result.method].rank == min(e.rank for e in result.errors.values())
        measured = errors_of(w, result.packed, qtype, heldout).sum() / float(power)
        assert result.errors[result.method].relative == pytest.approx(measured, rel=1e-4)
        assert result.errors[result.method].nats is None
        plain = native.quantize(w.numpy(), qtype)
        assert result.errors["rtn"].relative == pytest.approx(
            errors_of(w, plain, qtype, heldout).sum() / float(power), rel=1e-4
        )


def test_with_sensitivities_the_costly_rows_decide() -> None:
    """Errors in nats weigh rows by their gradients: ½ G_r e_r H e_rᵀ, held out."""
    h, w = hessian(256), weight(12, 256)
    outputs = torch.logspace(-3, 1, 12)
    inputs = inputs_of(h)
    solved = solve_tensor(w, TYPES, ALL_METHODS, inputs, Sensitivity(outputs))
    for qtype, result in solved.items():
        per_row = errors_of(w, result.packed, qtype, inputs.heldout)
        error = result.errors[result.method]
        assert error.nats == pytest.approx(0.5 * (per_row @ outputs.double().numpy()), rel=1e-4)
        assert error.nats == min(e.nats for e in result.errors.values() if e.nats is not None)


def test_a_looked_up_table_is_priced_by_how_often_rows_are_read() -> None:
    w = weight(12, 256)
    frequency, lookups = torch.rand(12), hessian(256)
    solved = solve_tensor(w, TYPES, ALL_METHODS, None, Sensitivity(None, frequency, lookups))
    for qtype, result in solved.items():
        assert result.method == "rtn" and set(result.errors) == {"rtn"}
        per_row = errors_of(w, result.packed, qtype, lookups)
        wanted = 0.5 * float(frequency.double().numpy() @ per_row)
        assert result.errors["rtn"].nats == pytest.approx(wanted, rel=1e-4)


def test_large_tensors_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are independent: ggml's methods give the same bytes. The descent after GPTQ follows
    gradients from matrix products, which round by the number of rows: few rows may differ.
    """
    h, w = hessian(256), weight(50, 256)
    known = {method: inputs_of(h) for method in ALL_METHODS}
    known |= {method: without(known["gptq"]) for method in ("imatrix", "rtn")}
    whole = {m: solve_tensor(w, TYPES, (m,), known[m], None) for m in ALL_METHODS}
    monkeypatch.setattr(select, "STACKED_WEIGHTS", 256 * len(TYPES) * 7)
    for method, solved in whole.items():
        cut = solve_tensor(w, TYPES, (method,), known[method], None)
        for qtype in TYPES:
            differs = (cut[qtype].packed != solved[qtype].packed).any(1)
            assert differs.sum() <= (3 if method == "gptq" else 0)
            one, other = cut[qtype].errors[method], solved[qtype].errors[method]
            assert one.relative == pytest.approx(other.relative, rel=0.01)


@pytest.mark.parametrize("methods", [("gptq",), ("imatrix",), ("rtn",), ("gptq", "rtn")])
def test_only_the_asked_methods_compete(methods: tuple[str, ...]) -> None:
    h, w = hessian(256), weight(6, 256)
    known = factorize(h, DAMPING) if "gptq" in methods else None
    inputs = Inputs(h.diagonal().numpy().copy(), h, h, known)
    solved = solve_tensor(w, TYPES, methods, inputs, None)
    assert all(set(result.errors) == set(methods) for result in solved.values())


def test_types_without_a_grid_fall_back_to_imatrix() -> None:
    h, w, qtype = hessian(256), weight(6, 256), QuantType("TQ2_0")
    solved = solve_tensor(w, [qtype], ("gptq",), inputs_of(h), None)
    assert solved[qtype].method == "imatrix"
    wanted = native.quantize(w.numpy(), qtype, h.diagonal().numpy().copy())
    assert np.array_equal(solved[qtype].packed, wanted)


def test_types_without_a_grid_and_rounding_asked() -> None:
    h, w, qtype = hessian(256), weight(6, 256), QuantType("TQ2_0")
    inputs = Inputs(h.diagonal().numpy().copy(), h, h, None)
    solved = solve_tensor(w, [qtype], ("rtn",), inputs, None)
    assert set(solved[qtype].errors) == {"rtn"}


def test_sixteen_bits_are_exact_or_rounded_and_nothing_competes() -> None:
    h, w = hessian(256), weight(6, 256)
    solved = solve_tensor(w, [F16], ALL_METHODS, inputs_of(h), None)
    assert solved[F16].method == "rtn"
    assert np.array_equal(solved[F16].packed, native.quantize(w.numpy(), F16))


def test_rows_that_a_source_has_itself_win_at_their_type() -> None:
    """Also of experts, and where the base is rounded; there is no error in them."""
    q4 = QuantType("Q4_0")
    w, inputs = experts(256)
    exact = native.quantize(w.flatten(0, 1).numpy(), q4)
    original = torch.from_numpy(native.dequantize(exact, q4)).half().view(w.shape)
    given = {(q4, EXACT): exact}
    alone = slice(0, len(w[0]))
    solved = solve_tensor(
        original[0], [q4, Q8], ALL_METHODS, inputs[0], None, 1, {(q4, EXACT): exact[alone]}
    )
    assert solved[q4].method == EXACT and np.array_equal(solved[q4].packed, exact[alone])
    assert solved[q4].errors[EXACT].relative == 0 and solved[Q8].method != EXACT
    parts = select.solve_experts(original, [q4, Q8], ALL_METHODS, inputs, [None] * 3, 1, given)
    made = select.decide_experts(q4, parts)
    assert made.method == EXACT and np.array_equal(made.packed, exact)


def experts(n: int, n_experts: int = 3) -> tuple[torch.Tensor, list[Inputs]]:
    """Weights and inputs of experts that differ in both."""
    weights, inputs = [], []
    for seed in range(n_experts):
        generator = torch.Generator().manual_seed(seed)
        weights.append(torch.randn(40, n, generator=generator))
        x = torch.randn(3 * n, n, generator=generator) * (
            1 + seed + torch.rand(n, generator=generator)
        )
        h = x.T @ x / len(x)
        inputs.append(Inputs(h.diagonal().numpy().copy(), h, h, factorize(h, 0.1)))
    return torch.stack(weights), inputs


@pytest.mark.parametrize("names", [("Q4_K", "IQ2_XXS"), ("Q4_0", "IQ4_NL")])
def test_experts_together_are_as_one_by_one(names: tuple[str, ...]) -> None:
    types = [QuantType(name) for name in names]
    weights, inputs = experts(256)
    methods, none = ("gptq", "imatrix", "rtn"), [None] * 3
    together = select.solve_experts(weights, types, methods, inputs, none, 2)
    for part, w, own in zip(together, weights, inputs, strict=True):
        alone = select.solve_rows(w, types, methods, own, None, 2)
        assert part.power == pytest.approx(alone.power, rel=1e-5)
        for key, error in alone.errors.items():
            assert part.errors[key].relative == pytest.approx(error.relative, rel=1e-4)
        assert set(part.packed) == {(q, part.best(q)) for q in types}  # the others' rows are gone
        assert all(torch.equal(rows, alone.packed[key]) for key, rows in part.packed.items())


def test_experts_share_a_type_and_not_a_method() -> None:
    """Each gets the method that is best for it, and the tensor's error is that of the mix."""
    q = QuantType("Q8_0")

    def part(gptq: float, rtn: float, mark: int) -> select.Part:
        errors = {(q, "gptq"): select.Error(gptq, None), (q, "rtn"): select.Error(rtn, None)}
        packed = {
            key: torch.full((1, 34), mark + i, dtype=torch.uint8) for i, key in enumerate(errors)
        }
        return select.Part(2.0, errors, packed)

    solved = select.decide_experts(q, [part(1, 3, 10), part(5, 4, 20), part(1, 2, 30)])
    assert solved.method == "gptq" and solved.n_experts == {"gptq": 2, "rtn": 1}
    assert solved.packed[:, 0].tolist() == [10, 21, 30]
    assert solved.errors["gptq"].relative == (1 + 4 + 1) / 6
    assert solved.errors["rtn"].relative == (3 + 4 + 2) / 6


def test_an_expert_that_no_gradient_reached_is_judged_by_its_output() -> None:
    """All its methods cost nothing, as far as is known."""
    q = QuantType("Q8_0")
    errors = {(q, "rtn"): select.Error(3.0, 0.0), (q, "gptq"): select.Error(1.0, 0.0)}
    packed = {key: torch.zeros((1, 34), dtype=torch.uint8) for key in errors}
    assert select.decide_experts(q, [select.Part(1.0, errors, packed)]).method == "gptq"
