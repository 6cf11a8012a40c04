"""Integrity checks on files that are right and on files that are not; the choice of baselines."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
from tiny_gguf import Shape, write_llama

from evaluators.figures import Agreement
from quantkit.config import PROFILES
from quantkit.errors import QuantkitError
from quantkit.evidence import integrity
from quantkit.evidence.baselines import (
    given_baselines,
    stock_around,
    stock_baselines,
    uniform_baselines,
)
from quantkit.ggml import native
from quantkit.ggml.types import STOCK_MIXES, QuantType
from quantkit.gguf_file.fields import Field
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.write import SlotFile, lay_out
from quantkit.llamacpp.stock import StockRecipe, make_stock, stock_bytes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    return GgufFile(write_llama(tmp_path_factory.mktemp("base") / "base.gguf"))


def stock(base: GgufFile, folder: Path, label: str) -> GgufFile:
    path = folder / f"{label}.gguf"
    imatrix = {
        name: np.ones(t.shape[-1], np.float32) for name, t in base.tensors.items() if t.shape[1:]
    }
    make_stock(base.path, path, StockRecipe(label), imatrix)
    return GgufFile(path)


def stitched(base: GgufFile, path: Path, *changes: Field, damage: str = "") -> GgufFile:
    """Base with attention in Q4_K; `damage` names a tensor that gets other bytes."""
    q4 = QuantType("Q4_K")
    types = {name: q4 for name in base.tensors if "attn_q" in name}
    layout = lay_out(base, types, [Field.uint32("general.file_type", 15), *changes])
    file = SlotFile(path, layout)
    for name in base.tensors:
        packed = base.packed(name)
        if name in types:
            packed = native.quantize(base.values(name), q4)
        if name == damage:
            packed = np.roll(packed, 1)
        file.write(name, packed)
    file.finish()
    return GgufFile(path)


@pytest.mark.parametrize("label", ["Q2_K", "Q4_K_M", "Q5_0", "Q6_K", "IQ4_XS", "TQ2_0"])
def test_our_decoder_gives_llama_cpps_bits(base: GgufFile, tmp_path: Path, label: str) -> None:
    check = integrity.same_weights(stock(base, tmp_path, label))
    assert check.passed and check.about.startswith("all ")


def test_some_rows_are_said_to_be_some(base: GgufFile, tmp_path: Path) -> None:
    check = integrity.same_weights(stock(base, tmp_path, "Q4_K_M"), max_rows=8)
    assert check.passed and " of " in check.about


def test_a_decoder_that_is_off_by_a_bit_is_found(
    base: GgufFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = stock(base, tmp_path, "Q4_K_M")
    original = native.dequantize

    def off(packed: native.Bytes, qtype: QuantType) -> native.Floats:
        values = original(packed, qtype)
        values.view(np.uint32)[-1, -1] ^= 1
        return values

    monkeypatch.setattr(native, "dequantize", off)
    check = integrity.same_weights(file)
    assert check.passed is False and "decodes differently" in check.about


def test_a_file_with_the_bases_frame(base: GgufFile, tmp_path: Path) -> None:
    declared = Field.string("quantkit.version", "1")
    check = integrity.same_frame(stitched(base, tmp_path / "a.gguf", declared), base)
    assert check.passed, check.about
    assert "3 keys differ" in check.about


@pytest.mark.parametrize(
    ("change", "damage", "said"),
    [
        (Field.string("test.string", "x"), "", "test.string"),
        (Field.string("tokenizer.chat_template", "{{ x }}"), "", "tokenizer.chat_template"),
        (Field.uint32("tokenizer.ggml.bos_token_id", 5), "", "bos_token_id"),
        (None, "blk.1.ffn_up.weight", "blk.1.ffn_up.weight differ"),
    ],
)
def test_what_is_not_the_bases_is_named(
    base: GgufFile, tmp_path: Path, change: Field | None, damage: str, said: str
) -> None:
    file = stitched(base, tmp_path / "a.gguf", *([change] if change else []), damage=damage)
    check = integrity.same_frame(file, base)
    assert check.passed is False and said in check.about


def test_another_model_is_no_frame(base: GgufFile, tmp_path: Path) -> None:
    other = GgufFile(write_llama(tmp_path / "b.gguf", Shape(n_layer=1)))
    check = integrity.same_frame(other, base)
    assert check.passed is False and "tensors differ from the base's" in check.about


def test_tensors_that_are_not_in_the_model_are_a_reason(base: GgufFile, tmp_path: Path) -> None:
    file = stitched(base, tmp_path / "a.gguf")
    with pytest.raises(QuantkitError, match="2 quantized tensors were not found"):
        integrity.torch_logits(tmp_path, {}, file, np.ones(4, np.int32), "cpu")


def test_a_silent_answer_fails() -> None:
    assert integrity.chat_check({"text": " \n", "asked": "chat template"}).passed is False
    assert integrity.chat_check({"text": "Wood.", "asked": "chat template"}).passed is True


def test_stock_files_around_a_size(base: GgufFile) -> None:
    recipes = [StockRecipe(label) for label in STOCK_MIXES]
    weights = {recipe: stock_bytes(base, recipe) for recipe in recipes}
    sizes = {recipe.label: n_bytes for recipe, n_bytes in weights.items()}
    chosen = stock_around(weights, sizes["Q4_K_M"], 2, "Q6_K")
    found = [stock_bytes(base, recipe) for recipe in chosen]
    assert found[1] == sizes["Q4_K_M"], "a file of the very size is one of at most the size"
    assert found[0] < found[1] < found[2] and len(chosen) == 4
    assert str(chosen[3]) == "Q6_K", "what we were asked to be like is always there"
    smallest = stock_around(weights, 1, 3, None)
    assert len(smallest) == 1, "nothing is smaller than that: only the next larger file"


def test_the_rival_is_made_and_dropped(base: GgufFile, tmp_path: Path) -> None:
    n_bytes = stock_bytes(base, StockRecipe("Q5_0"))
    baselines = stock_baselines(base, {n_bytes: None}, 2, {}, tmp_path)
    (rival,) = [baseline for baseline in baselines if baseline.is_rival]
    with rival.open() as path:
        assert path.stat().st_size >= n_bytes and path.parent == tmp_path
    assert not list(tmp_path.iterdir())


def test_uniform_files_around_a_size(tmp_path: Path) -> None:
    for name, n_bytes in (("Q3_K", 30), ("Q4_K", 40), ("Q5_K", 50), ("Q6_K", 60)):
        (tmp_path / f"{name}.gguf").write_bytes(bytes(n_bytes))
    assert [o.name for o in uniform_baselines(tmp_path, [45], 2)] == ["Q4_K", "Q5_K"]
    assert [o.name for o in uniform_baselines(tmp_path, [45], 1)] == ["Q4_K"]
    assert [o.name for o in uniform_baselines(tmp_path, [10], 2)] == ["Q3_K"]
    several = uniform_baselines(tmp_path, [35, 45, 100], 2)
    assert [o.name for o in several] == ["Q3_K", "Q4_K", "Q5_K", "Q6_K"], "each once"
    assert uniform_baselines(tmp_path / "nowhere", [45], 2) == []


def test_each_of_several_files_has_its_rival(base: GgufFile, tmp_path: Path) -> None:
    small, large = (stock_bytes(base, StockRecipe(label)) for label in ("Q4_0", "Q6_K"))
    found = stock_baselines(base, {small: None, large: "Q8_0"}, 1, {}, tmp_path)
    assert len({o.name for o in found}) == len(found), "nothing is measured twice"
    assert sum(o.is_rival for o in found) == 2 and found[-1].name == "Q8_0"


def test_a_given_file_is_looked_for_when_it_is_opened(tmp_path: Path) -> None:
    (baseline,) = given_baselines([str(tmp_path / "other.gguf")])
    assert baseline.name == "other.gguf" and baseline.kind == "given"
    with pytest.raises(QuantkitError, match="no file"), baseline.open():
        pass


def test_weights_are_judged_on_some_windows() -> None:
    for profile in PROFILES.values():
        n = profile.effort.weight_windows
        assert n is None or 2 <= n <= profile.eval_windows


class _File:
    """What `agrees` reads of a file."""

    def __init__(self, n_experts: int) -> None:
        self.metadata = {"general.architecture": "some", "some.expert_count": n_experts}


@pytest.mark.parametrize(
    ("n_experts", "mean", "trimmed", "passed"),
    [
        (0, 0.9e-4, 0.9e-4, True),
        (0, 2e-4, 1e-5, False),  # without a router nothing can tie
        (8, 2e-4, 1e-5, True),
        (8, 2e-4, 1.1e-4, False),
        (8, 1.1e-3, 1e-5, False),  # too much for ties
    ],
)
def test_ties_of_experts(n_experts: int, mean: float, trimmed: float, passed: bool) -> None:
    agreement = Agreement(mean, trimmed, 0.02, 1.0, 96)
    check = integrity.logits_check("logits", cast(GgufFile, _File(n_experts)), agreement, 1e-4)
    assert check.passed is passed
    assert ("tie within rounding" in check.about) == (passed and mean > 1e-4)
