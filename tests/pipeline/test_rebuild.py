"""Rebuilding from a recipe, without the pipeline: what is checked, and what the levels are made
from. The whole way, from kept levels and from the base alone, is in test_pipeline.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_gguf import Shape, write_llama

from quantkit import pipeline, rebuild
from quantkit.config import RunConfig
from quantkit.errors import QuantkitError
from quantkit.files import sha256_file
from quantkit.ggml import native
from quantkit.ggml.types import QuantType
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.write import SlotFile, lay_out
from quantkit.llamacpp.output import lay_out_output
from quantkit.run.recipe import Provenance
from quantkit.tensors import to_json

Q40, Q80 = QuantType("Q4_0"), QuantType("Q8_0")
MADE = Provenance("c" * 40, ("docs", "code"), 14, 64)


class Published:
    """A base, two level files, and the recipe of a file whose tensors come from both."""

    def __init__(self, folder: Path, narrow: bool = False, **config: Any) -> None:
        self.folder, self.levels = folder, folder / "levels"
        shape = Shape(n_embd=96, n_ff=96) if narrow else Shape()
        self.base = write_llama(folder / "base.gguf", shape)
        base = GgufFile(self.base)
        matrices = [n for n, t in base.tensors.items() if len(t.shape) == 2]
        for qtype in (Q40, Q80):
            file = SlotFile(
                self.levels / f"{qtype}.gguf", lay_out(base, dict.fromkeys(matrices, qtype))
            )
            for name in base.tensors:
                packed = base.packed(name)
                if name in matrices:
                    packed = native.quantize(base.values(name), qtype)
                file.write(name, packed)
            file.finish()
        self.types = {name: (Q40, Q80)[i % 2] for i, name in enumerate(matrices)}
        self.recipe: dict[str, Any] = {
            "schema": 1,
            "quantkit": "0.1.0",
            "model": "owner/model",
            "revision": "c" * 40,
            "config": to_json(RunConfig("owner/model", **config)),
            "base": {"sha256": sha256_file(self.base), "n_bytes": self.base.stat().st_size},
            "output": {"file": "x.gguf", "n_bytes": 1, "label": "Q4_K_M", "sha256": ""},
            "provenance": to_json(MADE),
            "calibration": {},
            "fallbacks": [],
            "levels": {f"{q}.gguf": sha256_file(self.levels / f"{q}.gguf") for q in (Q40, Q80)},
            "tensors": {
                name: {"qtype": str(q), "method": "rtn", "file": f"{q}.gguf"}
                for name, q in self.types.items()
            },
        }

    def rebuild(self, levels: Path | None, out: str = "out.gguf") -> rebuild.Rebuilt:
        path = self.folder / "recipe.json"
        path.write_text(json.dumps(self.recipe), "utf-8")
        return rebuild.rebuild(path, self.base, levels, self.folder / out)


@pytest.fixture
def published(tmp_path: Path) -> Published:
    return Published(tmp_path)


def test_every_tensor_comes_from_its_own_level(published: Published) -> None:
    answer = published.rebuild(published.levels)
    made, base = GgufFile(published.folder / "out.gguf"), GgufFile(published.base)
    assert answer.n_bytes == lay_out_output(base, published.types, MADE, "Q4_K_M").n_bytes
    for name, tensor in base.tensors.items():
        qtype = published.types.get(name)
        wanted = base.packed(name) if qtype is None else native.quantize(base.values(name), qtype)
        assert made.tensors[name].qtype == (qtype or tensor.qtype)
        assert np.array_equal(made.packed(name), wanted)
    assert answer.sha256 == sha256_file(published.folder / "out.gguf")
    assert answer.equal is False
    published.recipe["output"]["sha256"] = answer.sha256
    assert published.rebuild(published.levels).equal is True


def test_a_tensor_may_come_from_the_base(published: Published) -> None:
    name = "output.weight"
    own = GgufFile(published.base).tensors[name].qtype
    published.recipe["levels"]["base.gguf"] = published.recipe["base"]["sha256"]
    published.recipe["tensors"][name] = {"qtype": str(own), "method": "rtn", "file": "base.gguf"}
    published.rebuild(published.levels)
    made, base = GgufFile(published.folder / "out.gguf"), GgufFile(published.base)
    assert np.array_equal(made.packed(name), base.packed(name))


def test_another_base_is_refused(published: Published) -> None:
    data = bytearray(published.base.read_bytes())
    data[-5] ^= 1
    published.base.write_bytes(data)
    with pytest.raises(QuantkitError, match="not the base of this recipe") as error:
        published.rebuild(published.levels)
    assert "owner/model" in error.value.remedy


def test_other_levels_are_refused(published: Published) -> None:
    path = published.levels / "Q8_0.gguf"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(QuantkitError, match=r"Q8_0\.gguf is not the level file"):
        published.rebuild(published.levels)
    path.unlink()
    with pytest.raises(QuantkitError, match=r"Q8_0\.gguf is missing"):
        published.rebuild(published.levels)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1'])
def test_what_is_no_recipe(published: Published, content: str) -> None:
    path = published.folder / "r.json"
    path.write_text(content)
    with pytest.raises(QuantkitError, match="recipe"):
        rebuild.rebuild(path, published.base, published.levels, published.folder / "out.gguf")


def test_a_recipe_that_is_not_there(published: Published) -> None:
    with pytest.raises(QuantkitError, match="recipe"):
        rebuild.rebuild(published.folder / "no.json", published.base, None, published.folder / "o")


def test_a_recipe_without_tensors(published: Published) -> None:
    del published.recipe["tensors"]
    with pytest.raises(QuantkitError):
        published.rebuild(published.levels)


def test_a_base_that_is_not_there(published: Published) -> None:
    published.base = published.folder / "no.gguf"
    with pytest.raises(QuantkitError):
        published.rebuild(published.levels)


def test_a_level_file_outside_of_the_folder(published: Published) -> None:
    """Recipes are read from the Hub: a name with a path in it leads out of --levels."""
    for row in published.recipe["tensors"].values():
        row["file"] = f"../levels/{row['file']}"
    with pytest.raises(QuantkitError, match="not a level file"):
        published.rebuild(published.levels)
    levels = published.recipe["levels"]
    published.recipe["levels"] = {f"../levels/{file}": levels[file] for file in levels}
    with pytest.raises(QuantkitError, match="not the name of a file"):
        published.rebuild(published.levels)


@pytest.mark.parametrize("change", [{"qtype": "Q4_K_M"}, {"qtype": "Q2_K"}, {"name": "blk.9.x"}])
def test_tensors_that_the_base_does_not_have(tmp_path: Path, change: dict[str, str]) -> None:
    published = Published(tmp_path, narrow=True)
    name, row = published.recipe["tensors"].popitem()
    row["qtype"] = change.get("qtype", row["qtype"])
    published.recipe["tensors"][change.get("name", name)] = row
    with pytest.raises(QuantkitError):
        published.rebuild(published.levels)


@pytest.mark.parametrize("out", ["base.gguf", "levels/Q8_0.gguf"])
def test_what_it_is_made_of_is_not_overwritten(published: Published, out: str) -> None:
    before = (published.folder / out).read_bytes()
    with pytest.raises(QuantkitError, match="one of the inputs"):
        published.rebuild(published.levels, out)
    assert (published.folder / out).read_bytes() == before


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """What the pipeline is asked for when levels are made again; it makes none."""
    seen: list[RunConfig] = []

    def run(config: RunConfig, folder: Path, until: str) -> None:
        assert until == "quantize"
        seen.append(config)

    monkeypatch.setattr(pipeline, "run", run)
    return seen


def test_levels_are_made_at_the_recipes_revision(tmp_path: Path, asked: list[RunConfig]) -> None:
    """The config says `main` or nothing; the recipe has the commit that it was then."""
    published = Published(tmp_path)
    with pytest.raises(QuantkitError):
        published.rebuild(None)
    assert asked[0].revision == "c" * 40


def test_nothing_is_published_by_a_rebuild(tmp_path: Path, asked: list[RunConfig]) -> None:
    """The author's repository is not the reader's: its write access would be asked for first."""
    published = Published(tmp_path, publish="owner/model-GGUF", private=True)
    with pytest.raises(QuantkitError):
        published.rebuild(None)
    assert asked[0].publish is None
