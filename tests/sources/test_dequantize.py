"""Checkpoints that are quantized already: expanded exactly, or refused with the alternative."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import CHEAP, Run, quantkit
from hub_server import HubServer, look, running_hub
from safetensors.torch import load_file, save_file
from test_fetch import make_run
from tiny_models import save_model, tiny_llama
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from quantkit import sources
from quantkit.checkpoint.quantized import Source, source_of
from quantkit.checkpoint.safetensors import read_header
from quantkit.errors import QuantkitError
from quantkit.gguf_file.read import GgufFile
from quantkit.llamacpp.converter.convert import convert
from quantkit.model.blockwise import load_model
from quantkit.planning.plan import specs_of
from quantkit.sandbox.untrusted import Settings
from quantkit.sources.dequantize import dequantize
from quantkit.sources.integers import _unpacked
from quantkit.sources.snapshot import load_snapshot
from quantkit.stages import fetch

Tensors = dict[str, torch.Tensor]
FP8 = torch.float8_e4m3fn


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with running_hub(monkeypatch, tmp_path) as hub_server:
        yield hub_server


# Each takes a weight (n_out, n_in) and returns what is stored, by the end of its name, and the
# values that this stands for: written out number by number, as the formats' own papers do.


def block_fp8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """DeepSeek's: one scale for 48 x 32 weights; the last blocks are cut off."""
    n_out, n_in = weight.shape
    scales = torch.zeros(-(-n_out // 48), -(-n_in // 32))
    stored, values = torch.zeros_like(weight).to(FP8), torch.zeros_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * 48, (i + 1) * 48), slice(j * 32, (j + 1) * 32)
            scales[i, j] = weight[at].abs().max() / 448
            stored[at] = (weight[at] / scales[i, j]).to(FP8)
            values[at] = stored[at].float() * scales[i, j]
    return {"weight": stored, "weight_scale_inv": scales}, values.bfloat16()


def row_fp8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 448
    stored = (weight / scales).to(FP8)
    beside = {"weight_scale": scales, "input_scale": torch.ones(1)}
    return {"weight": stored, **beside}, (stored.float() * scales).bfloat16()


def gptq(weight: torch.Tensor, bits: int = 4) -> tuple[Tensors, torch.Tensor]:
    """Groups of 32 in an order of their own, zeros stored one too low."""
    n_out, n_in = weight.shape
    generator = torch.Generator().manual_seed(n_in)
    codes = torch.randint(0, 2**bits, (n_in, n_out), generator=generator)
    zeros = torch.randint(1, 2**bits, (n_in // 32, n_out), generator=generator)
    scales = (torch.rand(n_in // 32, n_out, generator=generator) / 50 + 0.01).half()
    group = (torch.arange(n_in) // 32)[torch.randperm(n_in, generator=generator)]
    values = ((codes - zeros[group]).float() * scales[group].float()).T.half()
    stored = {
        "qweight": packed(codes.T, range(32 // bits), bits).T.contiguous(),
        "qzeros": packed(zeros - 1, range(32 // bits), bits),
        "scales": scales,
        "g_idx": group.int(),
    }
    return stored, values


def awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    n_out, n_in = weight.shape
    generator = torch.Generator().manual_seed(n_in)
    codes = torch.randint(0, 16, (n_in, n_out), generator=generator)
    zeros = torch.randint(0, 16, (n_in // 32, n_out), generator=generator)
    scales = (torch.rand(n_in // 32, n_out, generator=generator) / 50 + 0.01).half()
    values = (codes - zeros.repeat_interleave(32, 0)).float()
    values = (values * scales.float().repeat_interleave(32, 0)).T.half()
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {"qweight": packed(codes, order), "qzeros": packed(zeros, order), "scales": scales}
    return stored, values


def compressed(weight: torch.Tensor, bits: int = 4, group: int = 32) -> tuple[Tensors, Any]:
    """compressed-tensors' integers: signed, with zeros of their own, packed with half of the range
    added, the codes along the inputs and the zeros along the outputs.
    """
    n_out, n_in = weight.shape
    generator = torch.Generator().manual_seed(n_in)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (n_out, n_in), generator=generator)
    zeros = torch.randint(-half, half, (n_out, n_in // group), generator=generator)
    scales = (torch.rand(n_out, n_in // group, generator=generator) / 50 + 0.01).bfloat16()
    wide = [x.repeat_interleave(group, 1) for x in (zeros, scales.float())]
    values = ((codes - wide[0]).float() * wide[1]).bfloat16()
    stored = {
        "weight_packed": packed(codes + half, range(32 // bits), bits),
        "weight_zero_point": packed((zeros + half).T, range(32 // bits), bits).T.contiguous(),
        "weight_scale": scales,
        "weight_shape": torch.tensor([n_out, n_in]),
    }
    return stored, values


def bytes_of(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors' W8A8: bytes with a scale a row."""
    scales = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (weight / scales.float()).round().clamp(-128, 127).to(torch.int8)
    stored = {"weight": codes, "weight_scale": scales, "input_scale": torch.ones(1)}
    return stored, (codes.float() * scales.float()).bfloat16()


def packed(codes: torch.Tensor, order: Any, bits: int = 4) -> torch.Tensor:
    """The last axis packed into 32-bit words: the i-th field holds the number at order[i]."""
    words = torch.zeros(codes.shape[0], codes.shape[1] * bits // 32, dtype=torch.int64)
    for word in range(words.shape[1]):
        for i, at in enumerate(order):
            words[:, word] |= codes[:, word * (32 // bits) + at].long() << (bits * i)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def compressed_settings(form: str, bits: int, group: int | None) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if group is None else {"group_size": group}
    weights = {"num_bits": bits, "type": "int", "strategy": "group", **strategy}
    groups = {"group_0": {"weights": weights, "targets": ["Linear"]}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "int"}
KINDS: dict[str, tuple[Callable[..., tuple[Tensors, torch.Tensor]], dict[str, Any]]] = {
    "block fp8": (block_fp8, {"quant_method": "fp8", "weight_block_size": [48, 32]}),
    "row fp8": (row_fp8, {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "compressed": (compressed, compressed_settings("pack-quantized", 4, 32)),
    "bytes": (bytes_of, compressed_settings("int-quantized", 8, None)),
    "autoround": (gptq, {**AUTO_ROUND, "packing_format": "auto_round:auto_gptq"}),
    "autoround awq": (awq, {**AUTO_ROUND, "packing_format": "auto_round:auto_awq"}),
}
BFLOAT = ("block fp8", "row fp8", "compressed", "bytes")  # the others are of float16


def write(folder: Path, kind: str, n_files: int = 1) -> tuple[Path, Tensors]:
    """A tiny Llama stored so, and the 16-bit weights that this means."""
    base = tiny_llama(folder)
    make, settings = KINDS[kind]
    stored, wanted = {}, {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if "_proj" not in name:
            stored[name] = wanted[name] = tensor if kind in BFLOAT else tensor.half()
            continue
        parts, wanted[name] = make(tensor.float())
        stem = name.removesuffix("weight")
        stored |= {stem + end: part for end, part in parts.items()}
    if n_files == 1:
        save_file(stored, base / "model.safetensors")
    else:  # scales may lie in another file than their weights
        (base / "model.safetensors").unlink()
        names = [f"model-{i + 1:05}-of-{n_files:05}.safetensors" for i in range(n_files)]
        where = {name: names[i % n_files] for i, name in enumerate(sorted(stored))}
        for file in names:
            save_file({n: t for n, t in stored.items() if where[n] == file}, base / file)
        index = {"metadata": {}, "weight_map": where}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((base / "config.json").read_text())
    config |= {
        "quantization_config": settings,
        "dtype": "bfloat16" if kind in BFLOAT else "float16",
    }
    (base / "config.json").write_text(json.dumps(config))
    return base, wanted


def source(kind: str) -> Source:
    found = source_of("x/y", Settings({"quantization_config": KINDS[kind][1]}), ())
    assert found is not None
    return found


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("n_files", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_expanded_weights_are_those_that_were_meant(
    tmp_path: Path, kind: str, n_files: int
) -> None:
    """And transformers loads them as an ordinary model."""
    folder, wanted = write(tmp_path / "m", kind, n_files)
    dequantize(folder, names_in(folder), source(kind), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].to(tensor.dtype), tensor), name
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("bits", [2, 8])
def test_gptq_of_other_widths(tmp_path: Path, bits: int) -> None:
    stored, wanted = gptq(torch.zeros(64, 96), bits)
    save_file({f"a.{n}": t for n, t in stored.items()}, tmp_path / "model.safetensors")
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 32}
    known = source_of("x/y", Settings({"quantization_config": settings}), ())
    assert known is not None
    made = dequantize(tmp_path, ["model.safetensors"], known, tmp_path / "out")
    (path,) = (path for path in made if path.suffix == ".safetensors")
    assert torch.equal(load_file(path)["a.weight"], wanted)


@pytest.mark.parametrize("dense", [True, False])
def test_three_bits_cross_words_or_do_not(dense: bool) -> None:
    """GPTQ's 32 numbers in three words; compressed-tensors' old files have ten in each."""
    codes = torch.randint(0, 8, (5, 96), generator=torch.Generator().manual_seed(0))
    if dense:
        bits = ((codes[..., None] >> torch.arange(3)) & 1).flatten(1).numpy().astype("uint8")
        words = torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view(np.int32))
    else:
        padded = torch.cat([codes, torch.zeros(5, 4, dtype=codes.dtype)], 1)
        shifted = padded.view(5, 10, 10) << (3 * torch.arange(10))
        words = shifted.sum(2).int()
    assert torch.equal(_unpacked(words, 96, 3), codes.to(torch.int16))


@pytest.mark.parametrize(
    "change",
    [
        {"transform_config": {"config_groups": {"R1": {}}}},
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        {"format": "marlin-24"},
        {"config_groups": {}},
    ],
)
def test_compressed_tensors_that_are_more_than_integers(change: dict[str, Any]) -> None:
    settings = compressed_settings("pack-quantized", 4, 32) | change
    with pytest.raises(QuantkitError, match="in a way that cannot be undone"):
        source_of("x/y", Settings({"quantization_config": settings}), ())


@pytest.mark.parametrize(
    "change",
    [
        {"packing_format": "auto_round:unknown"},
        {"extra_config": {"a": {"bits": 8}}},
        {"data_type": "mx_fp"},
        {"rotation_config": {"kind": "hadamard"}},
    ],
)
def test_auto_rounds_other_exports(change: dict[str, Any]) -> None:
    with pytest.raises(QuantkitError, match="in a way that cannot be undone"):
        source_of("x/y", Settings({"quantization_config": AUTO_ROUND | change}), ())


def test_zeros_of_the_second_gptq_format() -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    for form, offset in ((None, 1), ("gptq", 1), ("gptq_v2", 0)):
        settings = config | ({"checkpoint_format": form} if form else {})
        found = source_of("x/y", Settings({"quantization_config": settings}), ())
        assert found is not None and found.zero_offset == offset


@pytest.mark.parametrize("kind", KINDS)
def test_a_shell_has_the_shapes_of_the_whole(tmp_path: Path, kind: str) -> None:
    folder, wanted = write(tmp_path / "m", kind)
    info = look(str(folder))
    shell = sources.fetch_metadata(info, None, tmp_path / "shell")
    tensors = read_header(shell / "model.safetensors").tensors
    assert {t.name: t.shape for t in tensors} == {n: tuple(t.shape) for n, t in wanted.items()}
    assert info.n_parameters == sum(t.numel() for t in wanted.values())
    assert "quantization_config" not in (shell / "config.json").read_text()


def test_fetch_says_so(server: HubServer, tmp_path: Path) -> None:
    folder, wanted = write(tmp_path / "m", "block fp8")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    server.add_model("deep/model-FP8", files, cardData={"base_model": "deep/model"})
    run = make_run(tmp_path / "run", "deep/model-FP8")
    result = fetch.Fetch().execute(run)
    snapshot = load_snapshot(run.dir)
    assert snapshot.folder.is_relative_to(run.dir.path)
    assert result.summary["source"] == "FP8"
    assert all(path in result.outputs for path in snapshot.folder.iterdir())
    events = run.dir.events_path.read_text()
    assert "quantized itself (FP8)" in events and "deep/model may have the full weights" in events


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"\(bitsandbytes\)"),
        ({"quant_method": "gptq", "bits": 5, "group_size": 128}, "GPTQ at 5 bits"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, r"\(awq\)"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "aqlm"}, r"\(aqlm\)"),
        ({}, r"\(unknown\)"),
    ],
)
def test_what_cannot_be_undone_is_refused(settings: dict, sentence: str) -> None:
    for config in (
        {"quantization_config": settings},
        {"text_config": {"quantization_config": settings}},
    ):
        with pytest.raises(QuantkitError, match=sentence) as error:
            source_of("x/y", Settings(config), ("meta/original",))
        assert error.value.remedy == "Give the original instead: meta/original."


def test_refused_before_the_download(server: HubServer, tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "m", "awq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    server.add_model("x/bnb", files)
    with pytest.raises(QuantkitError, match="bitsandbytes"):
        look("x/bnb")
    assert not [r for r in server.requests if r.path.endswith("model.safetensors") and not r.range]


def test_nothing_is_said_of_an_ordinary_model() -> None:
    assert source_of("x/y", Settings({"quantization_config": None}), ()) is None
    mxfp4 = source_of("x/y", Settings({"quantization_config": {"quant_method": "mxfp4"}}), ())
    assert mxfp4 is not None and not mxfp4.is_expanded
    assert "MXFP4: those tensors keep their type" in mxfp4.sentence(())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["block fp8", "gptq"])
def test_the_converter_reads_them_alike(tmp_path: Path, kind: str) -> None:
    """llama.cpp's converter undoes these two by itself: the same GGUF tensors come out."""
    folder, _ = write(tmp_path / "m", kind)
    dequantize(folder, names_in(folder), source(kind), tmp_path / "out")
    files = []
    for name, checkpoint in (("theirs", folder), ("ours", tmp_path / "out")):
        convert(checkpoint, tmp_path / f"{name}.gguf", model_name="m")
        files.append(GgufFile(tmp_path / f"{name}.gguf"))
    theirs, ours = files
    assert theirs.tensors.keys() == ours.tensors.keys()
    for name in theirs.tensors:
        # GPTQ's values are made in float32 there and rounded to the file's type, here once before.
        one, other = (torch.tensor(file.values(name)) for file in files)
        assert torch.allclose(one, other, rtol=0 if kind == "block fp8" else 2**-7, atol=0), name


@pytest.mark.slow
def test_mxfp4_stays_as_it_is(tmp_path: Path) -> None:
    """gpt-oss: the experts' blocks are in the GGUF bit for bit, nobody quantizes them again, and
    transformers reads the values that llama.cpp reads.
    """
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=49_152,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    folder = save_model(tmp_path / "m", GptOssForCausalLM(config).bfloat16(), "smollm2")
    stored = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.dim() == 3:
            shape = (4, weight.shape[2], weight.shape[1] // 32)
            stored[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            stored[f"{name}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8)
        else:
            stored[name] = weight
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(settings))
    convert(folder, tmp_path / "base.gguf", model_name="m")
    base = GgufFile(tmp_path / "base.gguf")
    specs = specs_of(base)
    experts = {name for name in specs if name.endswith("_exps.weight")}
    assert len(experts) == 3
    assert all(str(specs[name].qtype) == "MXFP4" for name in experts)
    assert {name for name, spec in specs.items() if spec.quantizable}.isdisjoint(experts)
    assert specs["blk.0.attn_q.weight"].quantizable
    down = dict(load_model(folder).named_parameters())["model.layers.0.mlp.experts.down_proj"]
    values = torch.tensor(base.values("blk.0.ffn_down_exps.weight")).view(4, 64, 64)
    assert torch.equal(down.float().mT, values)


@pytest.mark.slow
def test_a_run_of_an_fp8_model(tmp_path: Path, offline: dict[str, str]) -> None:
    """Every tensor has a row map, and the card says what the source was."""
    folder, _ = write(tmp_path / "Tiny-FP8", "block fp8")
    answer = quantkit("run", folder, "--out", tmp_path / "run", *CHEAP, "--json", env=offline)
    assert answer.code == 0, answer.err
    run = Run(tmp_path / "run")
    assert answer.json["stages"]["convert"]["mapped_share"] == 1
    card = (run.folder / "9-publish/upload/README.md").read_text()
    assert "The source is quantized itself (FP8)" in card
