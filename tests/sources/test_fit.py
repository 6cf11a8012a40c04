"""Config against weights, from headers alone: transformers is the judge, and every sentence names
what is wrong before anything is downloaded or drawn at random.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, write_checkpoint
from hub_server import look, running_hub
from safetensors.torch import load_file, save_file
from test_fetch import make_run
from tiny_models import tiny_llama
from transformers import LlamaForCausalLM
from transformers.modeling_utils import _get_resolved_checkpoint_files

from quantkit.checkpoint.info import ModelInfo
from quantkit.checkpoint.weight_files import in_folder, tensors_of
from quantkit.errors import QuantkitError
from quantkit.gguf_file.read import GgufFile
from quantkit.llamacpp.converter.convert import convert
from quantkit.model.blockwise import load_model
from quantkit.model.streaming import open_model
from quantkit.sandbox import untrusted
from quantkit.sources.expected import compare
from quantkit.sources.fit import Fit, check_fit, copies, copies_in, judge
from quantkit.stages import fetch
from quantkit.tensors import to_json

Tensors = dict[str, torch.Tensor]
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("fit") / "llama", initializer_range=0.1)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("fit") / "tied", tie_word_embeddings=True)


def changed(
    folder: Path, into: Path, change: Callable[[Tensors], Tensors] = dict, **config: Any
) -> Path:
    """A copy of a checkpoint with other tensors and settings."""
    shutil.copytree(folder, into)
    path = into / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    settings = json.loads((into / "config.json").read_text()) | config
    (into / "config.json").write_text(json.dumps(settings))
    return into


def fit_of(folder: Path) -> Fit:
    """`check_fit` without a process of its own."""
    config = json.loads((folder / "config.json").read_text())
    return judge(compare(str(folder)), config, {n: t for n, (_, t) in tensors_of(folder).items()})


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(names)}


def reshaped(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: torch.zeros(shape, dtype=torch.bfloat16)}


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "a norm": (without("model.norm.weight"), {}, "The checkpoint lacks model.norm.weight"),
    "a linear": (without(K_PROJ), {}, f"The checkpoint lacks {K_PROJ}"),
    "many": (without("model.layers.1.mlp", K_PROJ), {}, "down_proj.weight, .* and 1 more"),
    "a block": (without("model.layers.1."), {}, "has 1 blocks, but config.json says .* 2"),
    "a block more": (dict, {"num_hidden_layers": 1}, "has 2 blocks, but config.json says .* 1"),
    "the head": (without("lm_head"), {}, "no lm_head.weight is stored"),
    "rows": (
        dict,
        {"vocab_size": 500},
        "embed_tokens has 512 rows, but config.json says vocab_size",
    ),
    "width": (dict, {"hidden_size": 32, "head_dim": 16}, "has 64 .*config.json says hidden_size"),
    "a shape": (reshaped(K_PROJ, 64, 32), {}, f"{K_PROJ} is stored as 64 x 32, .* 32 x 64"),
    "another function": (dict, {"hidden_act": "relu"}, "hidden_act relu, and llama.cpp .* silu"),
    "empty": (reshaped(K_PROJ, 0, 64), {}, f"{K_PROJ} is stored as 0 x 64"),
    "a type": (
        lambda t: {**t, K_PROJ: t[K_PROJ].to(torch.int16)},
        {},
        f"{K_PROJ} is stored as I16, which is not a type of weights",
    ),
    "bytes": (
        lambda t: {**t, K_PROJ: t[K_PROJ].to(torch.float8_e4m3fn)},
        {},
        "stored as in a quantized model, and config.json does not say how",
    ),
    "scales": (
        lambda t: {**t, K_PROJ.replace("weight", "weight_scale_inv"): torch.ones(1)},
        {},
        "weight_scale_inv is stored as in a quantized model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_would_not_load_whole(case: str, llama: Path, tmp_path: Path) -> None:
    change, config, sentence = REFUSED[case]
    folder = changed(llama, tmp_path / "m", change, **config)
    with pytest.raises(QuantkitError, match=sentence) as caught:
        fit_of(folder)
    assert caught.value.remedy


@pytest.mark.parametrize("memory", ["1TB", "1kB"])
@pytest.mark.parametrize("case", ["a norm", "a linear", "the head", "rows", "a block"])
def test_nothing_is_drawn_at_random(
    case: str, memory: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole or streamed, a model that lacks weights is not loaded."""
    monkeypatch.setenv("QUANTKIT_MEMORY", memory)
    change, config, _ = REFUSED[case]
    with pytest.raises(QuantkitError, match="lacks|transformers cannot load"):
        open_model(changed(llama, tmp_path / "m", change, **config))


@pytest.mark.parametrize("case", ["a norm", "the head"])
def test_fetch_refuses_before_the_download(
    case: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, config, sentence = REFUSED[case]
    folder = changed(llama, tmp_path / "m", change, **config)
    with running_hub(monkeypatch, tmp_path) as server:
        server.add_model("a/b", {path.name: path.read_bytes() for path in folder.iterdir()})
        with pytest.raises(QuantkitError, match=sentence):
            fetch.Fetch().execute(make_run(tmp_path / "run", "a/b"))
        size = (folder / "model.safetensors").stat().st_size
        assert sum(n_read(r.range, size) for r in server.asked("/lfs/", "GET")) < size
    assert not (tmp_path / "run" / "1-fetch" / "headers").exists()


def n_read(asked: str | None, size: int) -> int:
    """Bytes that a request was for."""
    if not asked:
        return size
    first, last = asked.removeprefix("bytes=").split("-")
    return int(last) - int(first) + 1


def test_a_config_of_which_nothing_can_be_made(llama: Path, tmp_path: Path) -> None:
    """The process that tries it is bounded."""
    folder = changed(llama, tmp_path / "m", num_attention_heads=0)
    with pytest.raises(QuantkitError, match="transformers cannot load this model"):
        check_fit(folder)


@pytest.mark.parametrize(
    "name", ["Llama 3", "Qwen3-MoE", "gpt-oss", "Gemma 4", "Mistral 3", "GPT-2", "Mamba-2"]
)
def test_families_fit(name: str, tmp_path: Path) -> None:
    assert fit_of(write_checkpoint(FAMILIES[name], tmp_path / "m")).unread == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_fits(name: str, tmp_path: Path) -> None:
    fit = fit_of(write_checkpoint(FAMILIES[name], tmp_path / "m"))
    assert (fit.unread, fit.notes) == ((), ())


# Tensors that transformers does not read


def test_what_is_not_read_is_not_converted(llama: Path, tmp_path: Path) -> None:
    """A bias that LlamaForCausalLM has not: llama.cpp would add it."""
    bias = "model.layers.0.self_attn.q_proj.bias"
    mask = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    more = {bias: torch.ones(64).bfloat16(), "v_head.weight": torch.ones(1, 64), **mask}
    folder = changed(llama, tmp_path / "m", lambda tensors: {**tensors, **more})
    fit = fit_of(folder)
    assert set(fit.unread) == {bias, "v_head.weight"}
    assert "are stored but not part of LlamaForCausalLM" in fit.notes[0]
    for name, at in (("plain", llama), ("more", folder)):
        left_out = fit.unread if at == folder else ()
        convert(at, tmp_path / f"{name}.gguf", skeleton=True, left_out=left_out, model_name="m")
    plain, more_tensors = (GgufFile(tmp_path / f"{n}.gguf").tensors for n in ("plain", "more"))
    assert plain.keys() == more_tensors.keys()


# Which files


def shards(folder: Path, tensors: Tensors, n: int = 2) -> None:
    names = sorted(tensors)
    table = {name: f"model-{i % n + 1}-of-{n}.safetensors" for i, name in enumerate(names)}
    for file in set(table.values()):
        own = {name: tensors[name] for name in names if table[name] == file}
        save_file(own, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("whole", [True, False])
def test_the_files_are_those_that_transformers_reads(
    whole: bool, llama: Path, tmp_path: Path
) -> None:
    """A fine-tune lies over its base's shards; other safetensors lie about."""
    folder = changed(llama, tmp_path / "m")
    new = load_file(folder / "model.safetensors")
    shards(folder, {name: torch.zeros_like(tensor) for name, tensor in new.items()})
    save_file({"x": torch.zeros(2)}, folder / "another.safetensors", metadata={"format": "pt"})
    if not whole:
        (folder / "model.safetensors").unlink()
    files, _ = _get_resolved_checkpoint_files(str(folder), None, None, True, None, False)
    assert files is not None
    assert [str(path) for path in in_folder(folder)] == list(files)
    assert [str(folder / name) for name in look(str(folder)).weights] == list(files)
    convert(folder, tmp_path / "m.gguf", model_name="m")
    found = GgufFile(tmp_path / "m.gguf").values("blk.0.ffn_down.weight")
    name = "model.layers.0.mlp.down_proj.weight"
    model = load_model(folder)
    assert torch.equal(torch.tensor(found), model.get_parameter(name).float())
    assert bool(found.any()) is whole


# The head


def test_a_head_that_is_the_table_once_more(tied: Path, tmp_path: Path) -> None:
    folder = changed(
        tied,
        tmp_path / "m",
        lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()},
    )
    fit = fit_of(folder)
    assert fit.tied == (("lm_head.weight", "model.embed_tokens.weight"),)
    assert copies_in(folder, fit.tied) == copies(fit.tied, look(str(folder)), None)
    assert copies_in(folder, fit.tied) == ["lm_head.weight"]


def test_another_head_is_used_by_all(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.json says tied: transformers uses the stored head nevertheless, so does everybody."""
    torch.manual_seed(1)
    head = torch.randn(512, 64).bfloat16()
    folder = changed(tied, tmp_path / "m", lambda t: {**t, "lm_head.weight": head})
    fit = fit_of(folder)
    assert copies_in(folder, fit.tied) == copies(fit.tied, look(str(folder)), None) == []
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        right = LlamaForCausalLM.from_pretrained(folder)(input_ids=ids).logits
        for memory in ("1TB", "1kB"):
            monkeypatch.setenv("QUANTKIT_MEMORY", memory)
            assert torch.equal(open_model(folder).model(input_ids=ids).logits, right), memory
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with running_hub(monkeypatch, tmp_path) as server:
        server.add_model("a/b", files)
        assert copies(fit.tied, look("a/b"), None) == []
        files["model.safetensors"] = same_head(folder)
        server.add_model("a/c", files)
        assert copies(fit.tied, look("a/c"), None) == ["lm_head.weight"]


def same_head(folder: Path) -> bytes:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    return path.read_bytes()


# Settings that are not true any more


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8", "mxfp4"])
def test_stale_quantization(method: str, llama: Path, tmp_path: Path) -> None:
    """Saved with what the base was loaded with; the weights are plain."""
    setting = {"quant_method": method, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    setting |= {"bits": 4, "group_size": 128}
    folder = changed(llama, tmp_path / "m", quantization_config=setting)
    info = look(str(folder))
    assert info.quantization is None and "quantization_config" not in info.config
    assert f"are quantized ({method}), but none are" in info.notes[0]
    assert untrusted.build(ModelInfo, to_json(info)) == info
    assert fit_of(folder).notes == ()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        right = load_model(llama)(input_ids=ids).logits
        assert torch.equal(load_model(folder)(input_ids=ids).logits, right)
    result = convert(folder, tmp_path / "m.gguf", model_name="m")
    assert any("quantization_config removed" in text for text in result.removed)
    convert(llama, tmp_path / "plain.gguf", model_name="m")
    one, other = (GgufFile(tmp_path / f"{name}.gguf") for name in ("m", "plain"))
    assert (one.values("blk.1.attn_k.weight") == other.values("blk.1.attn_k.weight")).all()


def test_bitnet_computes_otherwise(llama: Path, tmp_path: Path) -> None:
    """Its settings say more than how weights are stored."""
    setting = {"quant_method": "bitnet", "quantization_mode": "online"}
    folder = changed(llama, tmp_path / "m", quantization_config=setting)
    with pytest.raises(QuantkitError, match=r"quantized already \(bitnet\)"):
        look(str(folder))


@pytest.mark.parametrize("setting", [[], "4bit", 7, True])
def test_odd_quantization_settings(setting: Any, llama: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path / "m", quantization_config=setting)
    with pytest.raises(
        QuantkitError, match="quantization_config in config.json is not a JSON object"
    ):
        look(str(folder))


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", None])
def test_the_weights_say_their_type(dtype: str | None, llama: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path / "m", dtype=dtype, torch_dtype=dtype)
    assert look(str(folder)).dtype == "bfloat16"
    assert {p.dtype for p in load_model(folder).parameters()} == {torch.bfloat16}
