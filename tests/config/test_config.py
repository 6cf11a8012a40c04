"""What a user asks for: sizes, targets, type maps, the config's way through JSON."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from quantkit.cli import _listed, main
from quantkit.config import PROFILES, Profile, RunConfig, compile_pattern, load_types_map
from quantkit.config.devices import DEVICES
from quantkit.config.targets import BitsPerWeight, FitsMemory, LikeMix, Target
from quantkit.errors import UsageError
from quantkit.ggml.types import CODEBOOK_TYPES, FILE_TYPES, QuantType
from quantkit.planning import model_options
from quantkit.sandbox.untrusted import Damaged
from quantkit.sizes import parse_bytes
from quantkit.tensors import METHODS, to_json


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("90MB", 90_000_000),
        ("5.5GB", 5_500_000_000),
        ("5GiB", 5 * 2**30),
        ("1.5MiB", 3 * 2**19),
        ("123456789", 123_456_789),
        ("64 kB", 64_000),
        (" 2TiB ", 2**41),
        ("7b", 7),
        ("0.5gb", 500_000_000),
        ("18446744073709551617", 2**64 + 1),
        ("8G", 8_000_000_000),
        ("700m", 700_000_000),
        ("2Gi", 2**31),
        ("5,5 GB", 5_500_000_000),
        ("1,500 MB", 1_500_000_000),
        ("105,454,720", 105_454_720),
        ("8", 8_000_000_000),
        ("0.4", 400_000_000),
        ("1000", 1000),
    ],
)
def test_sizes(text: str, n_bytes: int) -> None:
    """MB and GB are decimal, MiB and GiB binary; a bare number is bytes, a small one gigabytes."""
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "MB", "-5GB", "5 G B", "5gigabytes", "0", "0.0MB", "1e9", "nan", "5,,5GB", "1,2,3"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="size") as error:
        parse_bytes(text)
    assert error.value.remedy


@given(
    st.decimals("0.001", 9999, places=3),
    st.sampled_from([("MB", 10**6), ("GB", 10**9), ("MiB", 2**20), ("GiB", 2**30)]),
)
def test_decimal_sizes_are_never_rounded_up(value: Decimal, unit: tuple[str, int]) -> None:
    """Cut to whole bytes: a budget is never exceeded."""
    assert parse_bytes(f"{value}{unit[0]}") == int(value * unit[1])


def test_decimal_sizes_are_exact() -> None:
    wrong = [n for n in range(1, 10_000) if parse_bytes(f"{n // 1000}.{n % 1000:03}MB") != n * 1000]
    assert not wrong, f"{len(wrong)} of 9,999, the first is {wrong[0]}"


@pytest.mark.parametrize("value", ["4.5", "0.5", "32", "3", "4.62"])
def test_bits_per_weight(value: str) -> None:
    target = BitsPerWeight(value)
    limit = target.limit_bytes(1_000_003, lambda label: 1 // 0, lambda n: 1 // 0)
    assert limit == int(Decimal(value) * 1_000_003 / 8)
    assert value in str(target)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *(("bpw", v) for v in ("", "x", "0", "-4", "33", "nan", "inf", "4,,5", "4.5bpw")),
        *(("like", v) for v in ("", "Q4_K", "q4 k m", "Q4_K_L", "4")),
        *(("size", v) for v in ("", "big", "-1")),
        *(("fits", v) for v in ("", "@8192", "8GB@", "8GB@0", "8GB@x", "big@4096", "8GB@-1")),
    ],
)
def test_what_is_no_target(kind: str, value: str) -> None:
    with pytest.raises(UsageError) as error:
        RunConfig.from_json({"model": "m", "targets": [{"kind": kind, "value": value}]})
    assert error.value.message and error.value.remedy


def test_what_fits_a_memory_with_a_context() -> None:
    target = FitsMemory("8GB@8192")
    assert target.limit_bytes(1, lambda label: 1 // 0, lambda n: 1000 * n) == 8e9 - 8_192_000
    assert str(target) == "fits 8GB with a context of 8,192"
    assert FitsMemory("8GB") == target
    card = FitsMemory("GPU-8GB@4096")
    assert card.limit_bytes(1, lambda label: 1 // 0, lambda n: 1000 * n) == 7 * 2**30 - 4_096_000
    assert str(card) == "fits 8 GB card (RTX 3070, 4060) with a context of 4,096"
    assert all(FitsMemory(name).memory_and_context()[0] > 0 for name in DEVICES)


def test_a_stock_mix_as_target() -> None:
    asked = []
    target = LikeMix("Q4_K_M")
    assert target.limit_bytes(1, lambda label: asked.append(label) or 777, lambda n: 1 // 0) == 777
    assert asked == ["Q4_K_M"] and str(target) == "like Q4_K_M"
    for label in FILE_TYPES:
        assert LikeMix(label.lower()) == LikeMix(label)
    assert LikeMix("iq2-m").mix == "IQ2_M"
    with pytest.raises(UsageError, match="Q4_KM") as error:
        LikeMix("Q4_KM")
    assert error.value.remedy.startswith("Did you mean Q4_K_M")


def test_profiles_are_steps_of_the_same_work() -> None:
    """One table: demo <= fast <= standard <= thorough in every count; types exist and rise."""
    rows = [PROFILES[name] for name in ("demo", "fast", "standard", "thorough")]
    assert list(PROFILES) == ["demo", "fast", "standard", "thorough"]
    counts = [f.name for f in fields(Profile) if f.type == "int"]
    assert len(counts) >= 4
    for name in counts:
        values = [getattr(row, name) for row in rows]
        assert values == sorted(values)
        assert values[0] > 0 or (name == "tuning_steps" and values[-1] > 0)  # small profiles: none
    for row in rows:
        assert all(QuantType(level).is_quantized for level in row.levels)
        assert len(set(row.levels)) == len(row.levels)


CONFIGS = st.builds(
    RunConfig,
    model=st.text(min_size=1),
    revision=st.none() | st.text(),
    targets=st.lists(
        st.builds(BitsPerWeight, st.sampled_from(["4.5", "3"]))
        | st.builds(FitsMemory, st.sampled_from(["8GB@8192", "1.5GiB@1"]))
        | st.builds(LikeMix, st.sampled_from(sorted(FILE_TYPES))),
        max_size=3,
    ).map(tuple),
    profile=st.sampled_from(sorted(PROFILES)),
    levels=st.none() | st.just(("Q4_K", "Q6_K")),
    methods=st.sampled_from([METHODS, ("imatrix",), ("rtn", "gptq")]),
    types=st.lists(
        st.tuples(st.sampled_from(["default", "ffn_down", r"blk\.\d\."]), st.just("Q5_K"))
        | st.tuples(st.just("attn_v"), st.just(">=Q6_K"))
    ).map(tuple),
    tensors=st.none() | st.just("attn"),
    calibration=st.sampled_from(["auto", "docs:2,code"]),
    tuning=st.none() | st.integers(0, 10_000),
    seed=st.integers(0, 2**31),
    device=st.sampled_from(["cpu", "cuda"]),
    publish=st.none() | st.just("me/it"),
    private=st.booleans(),
)


@given(CONFIGS)
@example(RunConfig("m"))
def test_a_config_survives_json(config: RunConfig) -> None:
    again = RunConfig.from_json(json.loads(json.dumps(to_json(config))))
    assert again == config and not config.changed_fields(again)


@pytest.mark.parametrize(
    "change",
    [
        {"targets": [{"kind": "bits", "value": "4"}]},
        {"targets": "4"},
        {"seed": "0"},
        {"an_option_of_tomorrow": 1},
    ],
)
def test_what_is_no_config(change: dict[str, object]) -> None:
    """An option that is not known is not left out: it may decide what is made."""
    with pytest.raises(Damaged):
        RunConfig.from_json(to_json(RunConfig("m")) | change)
    with pytest.raises(Damaged):
        RunConfig.from_json([])


def test_every_field_is_compared_but_where_it_is_published_and_what_it_is_measured_on() -> None:
    """A folder holds one run: whatever decides the result counts as a change."""
    config = RunConfig("m")
    other = RunConfig(
        "n",
        "r",
        (BitsPerWeight("4"),),
        "fast",
        ("Q4_K",),
        "speed",
        ("their.gguf",),
        ("rtn",),
        (("default", "Q4_0"),),
        2,
        9,
        "attn",
        "docs",
        "e.txt",
        "t.jsonl",
        ("other.gguf",),
        True,
        1,
        "cuda",
        "me/it",
        True,
        True,
        1_000_000,
        "me/all",
    )
    names = [f.name for f in fields(RunConfig)]
    assert all(getattr(config, n) != getattr(other, n) for n in names)
    free = ("publish", "private", "public", "collection", "eval_text", "tasks", "compare")
    assert config.changed_fields(other) == [n for n in names if n not in free]


@pytest.mark.parametrize(
    "wrong",
    [
        {"profile": "quick"},
        {"levels": ("Q4_K_M",)},
        {"levels": ("F16",)},
        {"max_types": 0},
        {"tuning": -1},
        {"tuning": 10_001},
        {"methods": ()},
        {"methods": ("gptq", "awq")},
        {"methods": ("",)},
        {"types": (("attn(", "Q4_K"),)},
        {"types": (("attn", "Q4"),)},
        {"types": (("a" * 300, "Q4_K"),)},
        {"tensors": "*"},
        {"device": "tpu"},
    ],
    ids=str,
)
def test_wrong_use(wrong: dict) -> None:
    with pytest.raises(UsageError) as error:
        RunConfig("m", **wrong)
    assert error.value.remedy


@pytest.mark.parametrize(
    "wrong", [{"calibration": "nonsense"}, {"calibration": ""}, {"calibration": "docs:0"}], ids=str
)
def test_a_calibration_that_is_none(wrong: dict) -> None:
    with pytest.raises(UsageError):
        RunConfig("m", **wrong)


def test_a_negative_seed() -> None:
    """numpy refuses it, in the search."""
    with pytest.raises(UsageError):
        RunConfig("m", seed=-1)


@pytest.mark.parametrize("name", ["I8", "I32", "F64", "Q8_1", "Q8_K", "NVFP4"])
def test_types_that_cannot_be_asked_for(name: str) -> None:
    for wrong in ({"types": (("default", name),)}, {"levels": (name,)}):
        with pytest.raises(UsageError):
            RunConfig("m", **wrong)


def test_pinned_types() -> None:
    """The first pattern found in the name decides, `default` comes last wherever it stands."""
    types = (("default", "Q4_0"), ("ffn", "Q5_0"), (r"ffn_down", "Q6_K"), ("^blk.0", "Q8_0"))
    config = RunConfig("m", types=types)
    wanted = {
        "blk.0.ffn_down.weight": "Q5_0",
        "blk.0.attn_q.weight": "Q8_0",
        "blk.10.attn_q.weight": "Q4_0",
        "token_embd.weight": "Q4_0",
    }
    assert {name: str(config.pinned_type(name)) for name in wanted} == wanted
    assert RunConfig("m", types=types[1:]).pinned_type("token_embd.weight") is None
    assert RunConfig("m").pinned_type("x") is None


def test_a_tensor_may_be_called_default() -> None:
    """`default` is a word, not a pattern."""
    config = RunConfig("m", types=(("default", "Q4_0"), ("x", "Q8_0")))
    assert str(config.pinned_type("my_default.weight")) == "Q4_0"


def test_speed_leaves_codebooks_out() -> None:
    slow = {qtype.name for qtype in CODEBOOK_TYPES}
    assert slow < set(RunConfig("m").level_names)
    assert not slow & set(RunConfig("m", prefer="speed").level_names)
    assert RunConfig("m", levels=("IQ3_S",), prefer="speed").level_names == ("IQ3_S",)
    with pytest.raises(UsageError, match="no preference"):
        RunConfig("m", prefer="beauty")


def test_level_names() -> None:
    assert RunConfig("m").level_names == PROFILES["standard"].levels
    assert RunConfig("m", profile="demo").level_names == PROFILES["demo"].levels
    assert RunConfig("m", levels=("Q4_K",)).level_names == ("Q4_K",)


def test_patterns() -> None:
    assert compile_pattern(r"ffn_(up|down)").search("blk.1.ffn_up.weight")
    for pattern in ("(", "a{2,1}", "x" * 201):
        with pytest.raises(UsageError):
            compile_pattern(pattern)


def test_a_type_map_keeps_its_order(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text('{"z": "Q4_K", "default": "Q2_K", "a": "Q6_K"}', "utf-8")
    assert load_types_map(path) == (("z", "Q4_K"), ("default", "Q2_K"), ("a", "Q6_K"))
    path.write_text("{}", "utf-8")
    assert load_types_map(path) == ()


@pytest.mark.parametrize("content", ["", "[]", '{"a": 4.5}', '{"a": ["Q4_K"]}', "{", "\x00"])
def test_what_is_no_type_map(content: str, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(content, "utf-8")
    with pytest.raises(UsageError, match="map.json") as error:
        load_types_map(path)
    assert "default" in error.value.remedy


def test_a_type_map_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "no.json", tmp_path):
        with pytest.raises(UsageError):
            load_types_map(path)
    (tmp_path / "latin.json").write_bytes(b'{"\xfc": "Q4_K"}')
    with pytest.raises(UsageError):
        load_types_map(tmp_path / "latin.json")


def test_configs_are_values() -> None:
    config = RunConfig("m")
    with pytest.raises(AttributeError):
        config.seed = 3  # type: ignore[misc]
    assert replace(config, seed=3).changed_fields(config) == ["seed"]
    assert hash(config) == hash(RunConfig("m"))


@pytest.mark.parametrize(
    ("model", "targets", "name"),
    [
        ("Qwen/Qwen3-8B", (BitsPerWeight("3.1"), BitsPerWeight("4.5")), "Qwen3-8B-3.1-4.5"),
        ("models/my tune/", (FitsMemory("8GB@8192"),), "my-tune-8GB@8192"),
        ("demo:smollm2-135m", (), "demo-smollm2-135m"),
        ("../..", (), "model"),
    ],
)
def test_the_folder_of_a_run_that_is_given_none(
    model: str, targets: tuple[Target, ...], name: str
) -> None:
    assert model_options.folder_name(RunConfig(model, targets=targets)) == name


@pytest.mark.parametrize(
    ("text", "device"),
    [
        *((text, "gpu-12gb") for text in ("RTX 3060 12 GB", "12GB VRAM", "rtx3060", "rtx-3060")),
        *(("NVIDIA GeForce RTX 4090", "gpu-24gb"), ("8GB GPU", "gpu-8gb"), ("A100", "gpu-80gb")),
        *(("RTX 5070 Ti", "gpu-16gb"), ("Mac 16 GB", "mac-16gb"), ("PC 16 GB", "pc-16gb")),
    ],
)
def test_devices_as_people_call_them(text: str, device: str) -> None:
    assert FitsMemory(text) == FitsMemory(f"{device}@8192")
    assert FitsMemory(f"{text}@4096").value == f"{device}@4096"


@pytest.mark.parametrize("text", ["RTX 5070", "RTX 3060 8GB", "rtx", "card", "", "toaster"])
def test_devices_that_are_unknown_or_several(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size") as error:
        FitsMemory(text)
    assert "gpu-12gb" in error.value.remedy and "mac-16gb" in error.value.remedy
    assert FitsMemory("8 GB").memory_and_context() == (8_000_000_000, 8192), "a size stays one"


@pytest.mark.parametrize(
    ("option", "text"),
    [
        *(("--fits", "5,5 GB"), ("--target-size", "5,5GB"), ("--target-bpw", "4,5")),
        ("--fits", "8GB@4,096"),
    ],
)
def test_a_comma_in_a_number_does_not_part_it(
    option: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "a/b", option, text]) == 2
    assert "Write a point, as in 5.5GB" in capsys.readouterr().err


def test_a_comma_parts_numbers() -> None:
    for text in ("3.5,4.5,6", "2,3,4", "4, 5", "8GB@4096,8GB@8192", "5GB,6GB", "Q4_0,Q5_0"):
        assert _listed(text) == [part.strip() for part in text.split(",")]
