"""What `plan` says of the disk, and what real runs take of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from disk_watch import on_disk, watched
from families import FAMILIES, write_checkpoint
from tiny_gguf import Shape, write_llama
from tiny_models import tiny_llama

from quantkit import pipeline
from quantkit.checkpoint.info import ModelInfo
from quantkit.config import RunConfig
from quantkit.config.targets import BitsPerWeight, LikeMix, Target
from quantkit.ggml.types import STOCK_MIXES, QuantType
from quantkit.gguf_file.base import load_base, load_specs
from quantkit.gguf_file.read import GgufFile
from quantkit.llamacpp.stock import StockRecipe, stock_bytes
from quantkit.planning.cost import free_bytes
from quantkit.planning.disk import Footprint, by_stage, footprint, guessed
from quantkit.planning.plan import made_levels
from quantkit.run.artifacts import NAMES
from quantkit.run.folder import RunDir
from quantkit.sandbox.untrusted import Settings
from quantkit.sources.snapshot import load_snapshot

Q2, Q4, Q6 = QuantType("Q2_K"), QuantType("Q4_K"), QuantType("Q6_K")
MUCH = 2**50


def info(n_parameters: int, **config: object) -> ModelInfo:
    return ModelInfo(
        kind="hub",
        id="a/b",
        revision=None,
        sha="0" * 40,
        files=(),
        weights=(),
        n_download_bytes=2 * n_parameters,
        architectures=("LlamaForCausalLM",),
        model_type="llama",
        n_parameters=n_parameters,
        n_by_dtype={"BF16": n_parameters},
        dtype="BF16",
        config=Settings(config),
        quantization=None,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    return GgufFile(write_llama(path, Shape(n_embd=512, n_ff=1024, n_layer=3, n_vocab=5000)))


def made(base: GgufFile, config: RunConfig, free: int = MUCH) -> Footprint:
    return footprint(config, info(base.n_elements), base, free, free)


UNIFORM, LIMIT = {Q4: 45_000_000, Q6: 66_000_000}, 47_000_000


def test_peaks_add_up(base: GgufFile) -> None:
    config = RunConfig("m", profile="demo", calibration="docs,code")
    known = made(base, config)
    peaks = by_stage(known, config, UNIFORM, [LIMIT], [52_000_000, 90_000_000])
    assert tuple(peaks) == NAMES
    begun = peaks["calibrate"]
    assert peaks["quantize"] - begun == sum(UNIFORM.values()) + 2 * known.importances
    assert peaks["stitch"] - peaks["tune"] == LIMIT
    measuring = known.expanded + 52_000_000 + known.predictions
    assert peaks["validate"] - peaks["publish"] == measuring
    assert peaks["stitch"] - peaks["publish"] == sum(UNIFORM.values()), "no level is measured"
    fast = replace(config, profile="fast")
    wider = by_stage(known, fast, {**UNIFORM, Q2: 30_000_000}, [LIMIT], [52_000_000])
    assert wider["stitch"] - wider["publish"] == 30_000_000, "those around the file are"
    kept = by_stage(known, config, UNIFORM, [LIMIT], [52_000_000], keeps_levels=True)
    assert kept["publish"] == kept["stitch"] == peaks["stitch"]
    several = by_stage(known, config, UNIFORM, [LIMIT, 60_000_000], [52_000_000])
    assert several["stitch"] - peaks["stitch"] == 60_000_000


def test_a_tuned_file_is_counted_once(base: GgufFile) -> None:
    config = RunConfig("m", profile="demo", calibration="docs,code", tuning=5)
    known = made(base, config)
    peaks = by_stage(known, config, UNIFORM, [LIMIT], [])
    assert peaks["tune"] == peaks["stitch"] == peaks["search"] - known.searched + LIMIT


def test_what_does_not_fit_in_memory_lies_on_the_disk(base: GgufFile) -> None:
    config = RunConfig("m", calibration="docs,code")
    much, little = made(base, config), made(base, config, 0)
    for name in ("compared", "hidden_states", "searched", "tuned_states", "expanded"):
        assert getattr(little, name) > getattr(much, name), name
    assert (
        replace(
            little,
            compared=much.compared,
            hidden_states=much.hidden_states,
            searched=much.searched,
            tuned_states=much.tuned_states,
            expanded=much.expanded,
        )
        == much
    )


def test_the_guess_before_the_download(base: GgufFile) -> None:
    """From config.json alone, within a fifth of what the shapes say."""
    config = RunConfig("m", targets=(BitsPerWeight("5"),), levels=("Q4_K", "Q6_K"))
    about = info(
        base.n_elements,
        hidden_size=512,
        num_hidden_layers=3,
        vocab_size=5000,
        max_position_embeddings=128,
    )
    known = guessed(config, about, MUCH, MUCH)
    uniform = {q: int(q.bpw * base.n_elements / 8) for q in (Q4, Q6)}
    limit = 5 * base.n_elements // 8
    exact = by_stage(footprint(config, about, base, MUCH, MUCH), config, uniform, [limit], [limit])
    assert tuple(known) == tuple(exact)
    assert max(known.values()) == pytest.approx(max(exact.values()), rel=0.2)


def test_a_file_with_two_names_counts_once(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    first = tmp_path / "deep" / "a"
    first.write_bytes(b"x" * 1_000_000)
    (tmp_path / "b").hardlink_to(first)
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(10**9)
    assert 1_000_000 <= on_disk(tmp_path) < 1_100_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, targets, tuning",
    [
        ("Llama", (LikeMix("Q4_K_M"),), 0),
        ("Qwen3-MoE", (BitsPerWeight("5.5"), BitsPerWeight("6")), 2),
    ],
)
def test_a_run_takes_what_the_plan_says(
    tmp_path: Path, family: str, targets: tuple[Target, ...], tuning: int
) -> None:
    model = tmp_path / "model"
    if family == "Llama":
        tiny_llama(model, hidden_size=512, intermediate_size=1024, num_hidden_layers=3)
    else:
        write_checkpoint(FAMILIES[family], model)
    config = RunConfig(
        str(model),
        targets=targets,
        profile="demo",
        calibration="docs,code",
        methods=("imatrix",),
        tuning=tuning,
    )
    run = tmp_path / "run"
    with watched(run) as peaks:
        pipeline.run(config, run)
    directory = RunDir(run)
    base = load_base(directory)
    free = free_bytes("cpu")
    known = footprint(config, load_snapshot(directory).info, base, free, free)
    sizes = made_levels(config, base, load_specs(directory)).sizes
    stock = [stock_bytes(base, StockRecipe(label)) for label in STOCK_MIXES]
    plan = by_stage(known, config, sizes.uniform, sizes.limits, stock, keeps_levels=True)
    print({name: (plan[name], peaks.get(name)) for name in plan})
    assert max(peaks.values()) <= 1.05 * max(plan.values())
    assert max(plan.values()) <= 1.2 * max(peaks.values())
    for stage in ("quantize", "search", "tune", "stitch", "validate"):
        assert peaks[stage] <= 1.05 * plan[stage], stage
