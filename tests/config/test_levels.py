"""Which types each tensor may have: levels, pins, patterns, fallbacks with their reasons."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.config import RunConfig
from quantkit.config import levels as levels_module
from quantkit.config.levels import LevelPlan, plan_levels, wanted
from quantkit.errors import UsageError
from quantkit.ggml.types import BF16, F16, F32, QUANTIZED, QuantType, fallback
from quantkit.tensors import TensorSpec

Q2, Q4, Q6, Q40 = (QuantType(name) for name in ("Q2_K", "Q4_K", "Q6_K", "Q4_0"))


def spec(name: str, n_columns: int, quantizable: bool = True) -> TensorSpec:
    return TensorSpec(name, (8, n_columns), BF16, quantizable)


SPECS = {
    s.name: s
    for s in (
        spec("token_embd.weight", 256),
        spec("blk.0.attn_norm.weight", 256, False),
        spec("blk.0.attn_q.weight", 256),
        spec("blk.0.ffn_down.weight", 96),
        spec("blk.1.attn_q.weight", 256),
        spec("blk.1.ffn_down.weight", 80),
        spec("output.weight", 256),
    )
}
QUANTIZABLE = [name for name, s in SPECS.items() if s.quantizable]


def plan(**config: object) -> LevelPlan:
    return plan_levels(SPECS, RunConfig("m", **{"levels": ("Q2_K", "Q4_K", "Q6_K"), **config}))  # type: ignore[arg-type]


def test_every_quantizable_tensor_at_every_level() -> None:
    made = plan()
    assert made.levels == (Q2, Q4, Q6)
    assert list(made.types) == QUANTIZABLE
    assert made.types["blk.0.attn_q.weight"] == {Q2: Q2, Q4: Q4, Q6: Q6}
    assert made.choices("blk.0.attn_q.weight") == (Q2, Q4, Q6)
    assert made.uniform(Q4)["output.weight"] == Q4
    assert set(made.uniform(Q2)) == set(QUANTIZABLE)


def test_what_a_source_has_takes_the_place_of_the_next_larger_level() -> None:
    name = "blk.0.attn_q.weight"

    def types(carried: list[str], **config: object) -> list[str]:
        held = tuple(map(QuantType, carried))
        specs = SPECS | {name: replace(SPECS[name], carried=held)}
        levels = ("Q2_K", "Q4_K", "Q6_K")
        made = plan_levels(specs, RunConfig("m", **{"levels": levels, **config}))  # type: ignore[arg-type]
        assert made.types["output.weight"] == {Q2: Q2, Q4: Q4, Q6: Q6}
        return [str(q) for q in made.types[name].values()]

    assert types(["Q4_0"]) == ["Q2_K", "Q4_0", "Q6_K"]
    assert types(["Q2_0", "Q4_0"]) == ["Q2_0", "Q4_0", "Q6_K"]
    assert types(["Q4_1", "Q5_0"]) == ["Q2_K", "Q4_K", "Q6_K"], "the largest stays"
    assert types(["Q8_0"]) == ["Q2_K", "Q4_K", "Q6_K"], "no level has the room"
    assert types(["Q2_0"], types=((name, ">=Q4_K"),)) == ["Q4_K", "Q4_K", "Q6_K"]
    assert types(["Q4_0"], types=((name, "Q8_0"),)) == ["Q8_0"] * 3


def test_fallbacks_by_width_with_their_reason() -> None:
    made = plan()
    assert [str(q) for q in made.choices("blk.0.ffn_down.weight")] == ["Q4_0", "Q5_0", "Q8_0"]
    assert made.choices("blk.1.ffn_down.weight") == (F16,)
    found = {(f.tensor, f.asked): (f.used, f.reason) for f in made.fallbacks}
    assert len(found) == len(made.fallbacks) == 6
    for tensor, width in (("blk.0.ffn_down.weight", 96), ("blk.1.ffn_down.weight", 80)):
        for level in (Q2, Q4, Q6):
            used, reason = found[tensor, level.name]
            assert used == fallback(level, width).name
            assert str(width) in reason and "256" in reason


def test_pins_are_one_choice_and_fall_back_too() -> None:
    made = plan(types=(("ffn_down", "Q5_K"), ("token_embd", "F32")))
    assert made.choices("blk.0.ffn_down.weight") == (QuantType("Q5_1"),)
    assert made.choices("blk.1.ffn_down.weight") == (F16,)
    assert made.choices("token_embd.weight") == (F32,)
    assert made.choices("blk.0.attn_q.weight") == (Q2, Q4, Q6)
    assert sorted((f.tensor, f.asked, f.used) for f in made.fallbacks) == [
        ("blk.0.ffn_down.weight", "Q5_K", "Q5_1"),
        ("blk.1.ffn_down.weight", "Q5_K", "F16"),
    ]


def test_a_least_type_raises_what_is_below_it() -> None:
    """Beside pins, which it does not touch; a type that is above it stays."""
    made = plan(types=(("attn_q", ">=Q4_K"), ("blk.1.attn_q", "Q2_K"), ("attn_q", ">=Q8_0")))
    assert made.choices("blk.0.attn_q.weight") == (Q4, Q6)
    assert made.choices("blk.1.attn_q.weight") == (Q2,), "it is pinned"
    assert made.uniform(Q2)["blk.0.attn_q.weight"] == Q4
    assert made.choices("token_embd.weight") == (Q2, Q4, Q6)


@pytest.mark.parametrize("types", [(("default", ">=Q4_K"),), (("attn_q", ">=Q4_KM"),)])
def test_what_is_no_least_type(types: tuple[tuple[str, str], ...]) -> None:
    with pytest.raises(UsageError):
        RunConfig("m", types=types)


@pytest.mark.parametrize("levels", [None, ("Q4_K", "BF16"), ("Q4_K", "F16", "BF16")])
def test_tensors_may_stay_in_the_16_bits_of_the_original(levels: tuple[str, ...] | None) -> None:
    made = plan(levels=levels, types=(("attn_q", "Q6_K"),))
    assert made.kept == {t: BF16 for t in QUANTIZABLE if "attn_q" not in t}, "those are pinned"
    assert all(level.is_quantized for level in made.levels)
    largest = made.largest_made | made.kept | {"blk.1.ffn_down.weight": F16}  # no block fits it
    assert made.largest == largest
    assert made.smallest["output.weight"] <= made.largest_made["output.weight"] < BF16
    assert not any(f.asked in ("F16", "BF16") for f in made.fallbacks)


def test_other_16_bits_mean_those_of_the_original() -> None:
    made = plan(levels=("Q4_K", "F16"))
    assert set(made.kept.values()) == {BF16}
    found = [(f.tensor, f.used) for f in made.fallbacks if f.asked == "F16"]
    assert found == [(name, "BF16") for name in QUANTIZABLE]


@pytest.mark.parametrize("config", [{}, {"levels": None, "types": (("default", "Q4_0"),)}])
def test_tensors_stay_only_where_it_is_allowed(config: dict) -> None:
    assert plan(**config).kept == {}


def test_a_default_is_the_only_level() -> None:
    """As llama-quantize --pure: embeddings and head included; patterns still come first."""
    made = plan(types=(("default", "Q4_0"), ("attn_q", "Q6_K")))
    assert made.levels == (Q40,)
    assert made.uniform(Q40) == {
        "token_embd.weight": Q40,
        "blk.0.attn_q.weight": Q6,
        "blk.0.ffn_down.weight": Q40,
        "blk.1.attn_q.weight": Q6,
        "blk.1.ffn_down.weight": F16,
        "output.weight": Q40,
    }
    assert all(len(made.choices(name)) == 1 for name in made.types)


def test_only_the_tensors_that_were_named() -> None:
    made = plan(tensors=r"^blk\.1\.")
    assert list(made.types) == ["blk.1.attn_q.weight", "blk.1.ffn_down.weight"]
    assert {f.tensor for f in made.fallbacks} == {"blk.1.ffn_down.weight"}


@pytest.mark.parametrize(
    "config",
    [
        {"tensors": "nothing"},
        {"tensors": "attn_norm"},
        {"types": (("nothing", "Q4_K"),)},
        {"types": (("attn_norm", "Q4_K"),)},
        {"types": (("default", "Q4_K"), ("nothing", "Q4_K"))},
    ],
    ids=str,
)
def test_patterns_that_name_nothing(config: dict) -> None:
    with pytest.raises(UsageError, match="nothing|attn_norm") as error:
        plan(**config)
    assert "plan" in error.value.remedy


def test_a_model_without_quantizable_tensors() -> None:
    """An F16 model whose every width is no multiple of 32; the sentence must not speak of None."""
    specs = {"t": spec("t", 80, False)}
    with pytest.raises(UsageError) as error:
        plan_levels(specs, RunConfig("m"))
    assert "None" not in error.value.message


@given(
    st.lists(st.sampled_from(QUANTIZED), min_size=1, max_size=6),
    st.lists(st.integers(1, 40).map(lambda n: 16 * n), min_size=1, max_size=6),
)
def test_every_type_fits_its_tensor(levels: list[QuantType], widths: list[int]) -> None:
    """And a fallback is recorded exactly where another type than the asked one is used."""
    specs = {f"t{i}": spec(f"t{i}", n) for i, n in enumerate(widths)}
    made = plan_levels(specs, RunConfig("m", levels=tuple(q.name for q in levels)))
    wanted = set()
    for name, types in made.types.items():
        for asked, used in types.items():
            assert used.fits(specs[name].n_columns)
            if used != asked:
                wanted.add((name, asked.name, used.name))
        assert list(made.choices(name)) == sorted(set(types.values()))
    assert {(f.tensor, f.asked, f.used) for f in made.fallbacks} == wanted


# Levels that a size can want

UNIFORM = {Q2: 260, QuantType("Q3_K"): 340, Q4: 450, QuantType("Q5_K"): 550, Q6: 650}


def kept(*limits: int, **config: object) -> list[str]:
    return [str(q) for q in wanted(UNIFORM, limits, RunConfig("m", **config))]  # type: ignore[arg-type]


def test_far_levels_are_left_out() -> None:
    assert kept(260) == ["Q2_K", "Q3_K", "Q4_K"]
    assert kept(470) == ["Q3_K", "Q4_K", "Q5_K", "Q6_K"]
    assert kept(260, 470) == kept() == list(map(str, UNIFORM)), "what any of the sizes wants"
    assert kept(260, levels=("Q2_K", "Q6_K")) == list(map(str, UNIFORM)), "named ones are made"


def test_codebooks_are_made_for_small_files_alone() -> None:
    codebook = QuantType("IQ3_S")
    uniform = {**UNIFORM, codebook: 344}
    assert codebook in wanted(uniform, [400], RunConfig("m"))
    assert codebook not in wanted(uniform, [470], RunConfig("m"))


def test_levels_around_the_sizes_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels_module, "_LEAST", 0.9)
    monkeypatch.setattr(levels_module, "_MOST", 1.2)
    assert kept(500) == ["Q4_K", "Q5_K"]
    assert kept(600) == ["Q5_K", "Q6_K"]
    assert kept(300, 600) == ["Q2_K", "Q3_K", "Q5_K", "Q6_K"]
    assert kept(400) == ["Q3_K", "Q4_K"], "the next smaller and larger ones stay"
    assert kept(500, levels=("Q2_K", "Q6_K")) == list(map(str, UNIFORM)), "they were asked for"
    assert kept() == list(map(str, UNIFORM)), "there is no size"


@given(st.lists(st.integers(260, 650), min_size=1, max_size=3))
def test_every_size_can_be_made_of_what_is_wanted(limits: list[int]) -> None:
    made = [UNIFORM[q] for q in wanted(UNIFORM, limits, RunConfig("m"))]
    assert min(made) <= min(limits) and max(made) >= max(limits)
    assert all(n in made for n in limits if n in UNIFORM.values())


def test_a_type_that_is_no_better_than_a_smaller_one_is_left_out() -> None:
    larger = QuantType("Q4_1")
    assert larger not in wanted({**UNIFORM, larger: 500}, [470], RunConfig("m"))
    assert larger in wanted({**UNIFORM, larger: 460}, [470], RunConfig("m")), "rows fall back"
    assert larger in wanted({Q2: 260, larger: 500}, [470], RunConfig("m")), "the other is no level"
    named = RunConfig("m", levels=("Q4_K", "Q4_1"))
    assert larger in wanted({Q4: 450, larger: 500}, [470], named), "it was asked for"
