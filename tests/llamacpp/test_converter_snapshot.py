"""The copy of a model that the converter sees: nothing in it can run or lead elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from quantkit.checkpoint.info import name_of
from quantkit.checkpoint.safetensors import write_shell_of
from quantkit.errors import QuantkitError
from quantkit.llamacpp.converter.snapshot import sanitize


@pytest.fixture
def plain_model(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    write_shell_of(model / "model.safetensors", {"w": ("F16", (4, 4))})
    return model


def test_a_snapshot_in_the_hub_cache(plain_model: Path, tmp_path: Path):
    """Links into the repository's blobs are followed, and the name is the repository's."""
    repo = tmp_path / "models--owner--The-Model-7B"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in plain_model.iterdir():
        shutil.move(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert name_of(snapshot) == "owner/The-Model-7B"
    result = sanitize(snapshot, tmp_path / "copy", name_of(snapshot))
    assert result.folder.name == "The-Model-7B"
    assert result.tensors["w"].shape == (4, 4)
    assert (result.folder / "model.safetensors").resolve() == blobs / "model.safetensors"
    assert json.loads((result.folder / "config.json").read_text())["_name_or_path"] == (
        "owner/The-Model-7B"
    )


def test_json_without_code_is_copied_as_it_is(plain_model: Path, tmp_path: Path):
    text = '{"b" :1,\n"a": 1e-05, "t": "\\ud83d\\ude00"}'
    (plain_model / "tokenizer.json").write_text(text)
    copy = sanitize(plain_model, tmp_path / "copy", "m").folder
    assert (copy / "tokenizer.json").read_text() == text


def test_auto_map_is_found_however_it_is_written(plain_model: Path, tmp_path: Path):
    (plain_model / "processor_config.json").write_text(
        '{"x": [{"\\u0061uto_map": {}}], "x": [], "keep": "auto_map", "auto_map": 1, "auto_map": 2}'
    )
    copy = sanitize(plain_model, tmp_path / "copy", "m").folder
    assert json.loads((copy / "processor_config.json").read_text()) == {"x": [], "keep": "auto_map"}


def test_what_no_converter_reads_may_be_broken(plain_model: Path, tmp_path: Path):
    """A fine-tune's data and its trainer's notes lie beside it."""
    (plain_model / "train.json").write_text('{"a": 1}\n{"a": 2}\n')
    (plain_model / "trainer_state.json").write_text(json.dumps(["x" * 1000] * 20_000))
    (plain_model / "empty.json").write_text("")
    result = sanitize(plain_model, tmp_path / "copy", "m")
    left = " ".join(result.removed)
    for name in ("train.json", "trainer_state.json", "empty.json"):
        assert not (result.folder / name).exists() and f"{name} left out" in left


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "vocab.json", "params.json"]
)
def test_what_it_reads_may_not(plain_model: Path, tmp_path: Path, name: str):
    (plain_model / name).write_text("{")
    with pytest.raises(QuantkitError, match=name):
        sanitize(plain_model, tmp_path / "copy", "m")


def _escaping_link(model: Path) -> None:
    (model / "tokenizer.json").symlink_to("/etc/passwd")


def _escaping_weights(model: Path) -> None:
    shutil.move(model / "model.safetensors", model.parent / "elsewhere.safetensors")
    (model / "model.safetensors").symlink_to("../elsewhere.safetensors")


def _index_outside(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": {"w": "../elsewhere.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_incomplete(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    names = {"w": "model-1.safetensors", "v": "model-2.safetensors"}
    index = {"metadata": {}, "weight_map": names}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _truncated(model: Path) -> None:
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size - 1)


def _lying_header(model: Path) -> None:
    text = json.dumps({"w": {"dtype": "F16", "shape": [9, 9], "data_offsets": [0, 32]}}).encode()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(32))


def _pickles_only(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def _adapter(model: Path) -> None:
    (model / "config.json").rename(model / "adapter_config.json")


def _broken_json(model: Path) -> None:
    (model / "generation_config.json").write_text('{"a": ')


def _deep_json(model: Path) -> None:
    (model / "generation_config.json").write_text("[" * 100_000)


def _large_json(model: Path) -> None:
    with (model / "generation_config.json").open("wb") as file:
        file.truncate(2**25)


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (_escaping_link, "tokenizer.json is a link that leads out"),
        (_escaping_weights, "model.safetensors is a link that leads out"),
        (_index_outside, "which is not a safetensors file in the model's folder"),
        (_index_incomplete, "incomplete: its index names model-2.safetensors"),
        (_truncated, "is truncated"),
        (_lying_header, "model.safetensors is broken: its header cannot be read"),
        (_pickles_only, "no safetensors weights.*pickle"),
        (_adapter, "LoRA adapter"),
        (_broken_json, "generation_config.json is not valid JSON"),
        (_deep_json, "generation_config.json is not valid JSON"),
        (_large_json, "generation_config.json has 33,554,432 bytes"),
    ],
)
def test_refused_snapshots(break_it, sentence: str, plain_model: Path, tmp_path: Path):
    break_it(plain_model)
    with pytest.raises(QuantkitError, match=sentence) as it:
        sanitize(plain_model, tmp_path / "copy", "m")
    assert it.value.remedy
