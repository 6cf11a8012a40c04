"""llama.cpp's own converter on tiny models: what it makes, what it must not do, how it fails."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import N_TOKENS, save_model, tiny_llama, write_tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from quantkit.checkpoint.safetensors import read_header, write_shell_of
from quantkit.errors import QuantkitError
from quantkit.llamacpp.converter import install, sandbox
from quantkit.llamacpp.converter.architectures import (
    architecture_of,
    check_architecture,
    supported_architectures,
)
from quantkit.llamacpp.converter.convert import ConversionResult, convert
from quantkit.sandbox.untrusted import Settings
from quantkit.sources.fit import check_fit, copies_in


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def listener():
    """A socket that counts who connects to it: the only server in reach."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        yield server


@pytest.fixture(scope="module")
def malicious(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose every JSON names code to load, in its folder and from a repository.

    It passes for an InternS1, one of the architectures whose tokenizer the converter loads with
    `trust_remote_code=True`.
    """
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=N_TOKENS["smollm2"],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("models") / "Evil-Qwen-Instruct"
    save_model(folder, model, "smollm2")
    canary = f"open({str(folder.parent / 'canary')!r}, 'w').write('the model was run')\n"
    (folder / "modeling_evil.py").write_text(canary + "class EvilConfig: pass\n")
    (folder / "tokenization_evil.py").write_text(
        canary + "from transformers import PreTrainedTokenizerFast as EvilTokenizer\n"
    )
    code = {
        "AutoConfig": "someone/code--modeling_evil.EvilConfig",
        "AutoModelForCausalLM": "someone/code--modeling_evil.EvilModel",
        # slow tokenizer from a repository, fast one from this folder
        "AutoTokenizer": ["someone/code--evil.T", "tokenization_evil.EvilTokenizer"],
    }
    edit_json(
        folder / "config.json",
        architectures=["InternS1ForConditionalGeneration"],
        text_config={"architectures": ["Qwen3ForCausalLM"], "auto_map": code},
        auto_map=code,
    )
    edit_json(folder / "tokenizer_config.json", auto_map=code, vocab_file="/etc/passwd")
    edit_json(folder / "generation_config.json", auto_map=code)
    (folder / "adapter.bin").write_bytes(b"not even a pickle")
    return folder


@pytest.fixture(scope="module")
def converted(
    malicious: Path, listener: socket.socket, tmp_path_factory: pytest.TempPathFactory
) -> ConversionResult:
    """The malicious model, converted for real while every road to a server leads to `listener`."""
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_ENDPOINT", "http_proxy", "https_proxy", "ALL_PROXY"):
            patch.setenv(name, url)
        patch.setenv("HF_TOKEN", "secret")
        return convert(
            malicious,
            tmp_path_factory.mktemp("out") / "base.gguf",
            model_name="someone/Evil-Qwen-Instruct",
            metadata={"general.author": "A. Nother"},
        )


def test_nothing_of_the_model_is_fetched_or_run(
    malicious: Path, converted: ConversionResult, listener: socket.socket
):
    assert not (malicious.parent / "canary").exists()
    with pytest.raises(TimeoutError):
        listener.accept()
    assert set(converted.removed) >= {
        "modeling_evil.py left out (code)",
        "adapter.bin left out (pickle)",
        "auto_map removed from config.json",
        "auto_map removed from tokenizer_config.json",
        "auto_map removed from generation_config.json",
        "vocab_file removed from tokenizer_config.json",
    }
    assert "denied" in converted.network
    assert converted.converter.endswith(install.TREE_SHA256)


@pytest.mark.slow
def test_the_bare_converter_would_run_it(malicious: Path, tmp_path: Path):
    """The control: without the sanitized copy the same model does run its code."""
    canary = malicious.parent / "canary"
    tree = install.ensure_converter()
    outcome = sandbox.run(
        "convert",
        tree,
        tmp_path / "convert.log",
        sandbox.limits_for(0, 2**30),
        readable=[malicious],
        output=tmp_path / "base.gguf",
        script=str(tree / "convert_hf_to_gguf.py"),
        arguments=[str(malicious), "--outfile", str(tmp_path / "base.gguf")],
        skeleton=True,
        pre=None,
        probes=(),
        left_out=(),
    )
    # It ran, and met the sandbox.
    log = outcome.ended.log
    assert re.search(rf"Errno \d+\] [^\n]+: '{re.escape(str(canary))}'", log), log
    assert not canary.exists()


@pytest.mark.slow
def test_the_result_is_the_model(malicious: Path, converted: ConversionResult, tmp_path: Path):
    """Metadata from the real name, weights bit for bit, and llama.cpp tokenizes like the original
    tokenizer and runs it.
    """
    reader = gguf.GGUFReader(converted.path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.name"] == "Evil Qwen Instruct"
    assert fields["general.organization"] == "Someone"
    assert fields["general.finetune"] == "Instruct"
    assert fields["general.author"] == "A. Nother"
    assert fields["general.file_type"] == int(gguf.LlamaFileType.MOSTLY_BF16)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    original = load_file(malicious / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    written = tensors["blk.1.ffn_up.weight"]
    assert written.tensor_type == gguf.GGMLQuantizationType.BF16
    assert bytes(written.data) == bytes(original.view(torch.uint8).numpy())
    assert converted.n_bytes == converted.path.stat().st_size

    write_tokenizer(tmp_path, "smollm2")
    same_tokens(converted.path, tmp_path)


def same_tokens(path: Path, tokenizer_dir: Path) -> None:
    """llama.cpp loads the file, tokenizes as the original does, and generates."""
    from llama_cpp import Llama

    llama = Llama(str(path), n_ctx=64, verbose=False)
    text = "class Ünit:  # 1234\n    return [x for x in y]"
    expected = AutoTokenizer.from_pretrained(tokenizer_dir).encode(text)
    assert llama.tokenize(text.encode()) == expected
    assert llama.create_completion(text, max_tokens=2)["usage"]["completion_tokens"] > 0
    llama.close()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_sentencepiece_model(dtype: torch.dtype, tmp_path: Path):
    """Without a model name it is called as its folder; 16 bits are F16 where they are not BF16."""
    model = tiny_llama(tmp_path / "Tiny-Llama-Base", dtype=dtype)
    result = convert(model, tmp_path / "base.gguf")
    fields = gguf.GGUFReader(result.path).fields
    assert fields["general.name"].contents() == "Tiny Llama Base"
    assert fields["general.file_type"].contents() == int(gguf.LlamaFileType.MOSTLY_F16)
    same_tokens(result.path, model)


@pytest.mark.slow
@pytest.mark.parametrize("skeleton", [False, True])
@pytest.mark.parametrize(
    ("tied", "same", "stays"), [(True, True, False), (False, True, True), (True, False, True)]
)
def test_a_head_that_is_the_table_once_more(
    tmp_path: Path, tied: bool, same: bool, stays: bool, skeleton: bool
) -> None:
    """As transformers loads it: one weight for both, where they are equal and the config ties."""
    model = tiny_llama(tmp_path / "model", tie_word_embeddings=tied)
    weights = load_file(model / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = table.clone() if same else table.roll(1, 0)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "base.gguf"
    fit = check_fit(model)
    convert(model, out, skeleton=skeleton, left_out=copies_in(model, fit.tied))
    names = {tensor.name for tensor in gguf.GGUFReader(out).tensors}
    assert ("output.weight" in names) == stays
    loaded = LlamaForCausalLM.from_pretrained(model)
    is_one = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert is_one == (not stays)


def test_a_skeleton_of_shells_has_the_header_of_the_real_file(
    malicious: Path, converted: ConversionResult, tmp_path: Path
):
    """Converted from headers alone: the same bytes up to the tensor data, and holes from there."""
    shells = tmp_path / malicious.name
    shutil.copytree(malicious, shells)
    tensors = read_header(malicious / "model.safetensors").tensors
    write_shell_of(shells / "model.safetensors", {t.name: (t.dtype, t.shape) for t in tensors})
    skeleton = convert(
        shells,
        tmp_path / "skeleton.gguf",
        skeleton=True,
        model_name="someone/Evil-Qwen-Instruct",
        metadata={"general.author": "A. Nother"},
    )
    data_offset = gguf.GGUFReader(converted.path).data_offset
    assert skeleton.path.read_bytes()[:data_offset] == converted.path.read_bytes()[:data_offset]
    assert skeleton.n_bytes == converted.n_bytes
    assert not any(skeleton.path.read_bytes()[data_offset:])


def test_what_the_converter_supports():
    supported = supported_architectures()
    assert {"LlamaForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForConditionalGeneration"} < supported
    assert not {"BertModel", "T5ForConditionalGeneration", "FooForCausalLM"} & supported
    assert (
        check_architecture(Settings({"architectures": ["LlamaForCausalLM"]})) == "LlamaForCausalLM"
    )
    inner = Settings(
        {"architectures": ["Foo"], "text_config": {"architectures": ["Qwen3ForCausalLM"]}}
    )
    assert architecture_of(inner) == "Qwen3ForCausalLM"
    with pytest.raises(QuantkitError, match="does not know the architecture FooForCausalLM"):
        check_architecture(Settings({"architectures": ["FooForCausalLM"]}))
    with pytest.raises(QuantkitError, match="does not predict the next token"):
        check_architecture(Settings({"architectures": ["BertModel"]}))
    with pytest.raises(QuantkitError, match="four hidden states side by side"):
        check_architecture(Settings({"architectures": ["Gemma3nForConditionalGeneration"]}))
    with pytest.raises(QuantkitError, match="names no architecture"):
        check_architecture(Settings({}))


@pytest.mark.slow
def test_an_unknown_architecture(tmp_path: Path):
    model = tiny_llama(tmp_path / "model")
    edit_json(model / "config.json", architectures=["FooForCausalLM"], model_type="foo")
    with pytest.raises(QuantkitError, match="does not know the architecture FooForCausalLM") as it:
        convert(model, tmp_path / "base.gguf")
    assert "convert.log" in it.value.remedy
    assert "FooForCausalLM" in (tmp_path / "convert.log").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["convert.log", "model"]


@pytest.fixture
def bpe_model(tmp_path: Path) -> Path:
    """A model with SmolLM2's tokenizer, which the converter knows by its hash."""
    return tiny_llama(tmp_path / "model", tokenizer="smollm2", vocab_size=49_200, hidden_size=32)


def change_tokenizer(model: Path, **changes: object) -> None:
    """Change a part of tokenizer.json, so that its hash is unknown."""
    edit_json(model / "tokenizer.json", **changes)


@pytest.mark.slow
def test_an_unknown_tokenizer_that_splits_like_a_known_one(bpe_model: Path, tmp_path: Path):
    """A token in front makes another hash; llama.cpp's `smollm` still splits as it does."""
    start = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    name = "<|im_start|>"
    change_tokenizer(
        bpe_model,
        post_processor={
            "type": "TemplateProcessing",
            "single": [start, text],
            "pair": [start, text, start, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {name: {"id": name, "ids": [1], "tokens": [name]}},
        },
    )
    result = convert(bpe_model, tmp_path / "base.gguf")
    assert "pre-tokenizer smollm is used" in result.warnings[0]
    field = gguf.GGUFReader(result.path).fields["tokenizer.ggml.pre"]
    assert field.contents() == "smollm"


@pytest.mark.slow
def test_an_unknown_tokenizer_that_splits_like_no_other(bpe_model: Path, tmp_path: Path):
    vowels = {"type": "Split", "pattern": {"Regex": "[aeiou]"}, "behavior": "Isolated"}
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    parts = [{**vowels, "invert": False}, {**levels, "use_regex": False}]
    change_tokenizer(bpe_model, pre_tokenizer={"type": "Sequence", "pretokenizers": parts})
    with pytest.raises(QuantkitError, match=r"\(hash [0-9a-f]{64}\), and none of llama.cpp's"):
        convert(bpe_model, tmp_path / "base.gguf")
    assert not list(tmp_path.glob("base.gguf*"))


def damage(model: Path, kind: str) -> None:
    """Break a model in one way."""

    weights = load_file(model / "model.safetensors")
    if kind == "nan":
        weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    elif kind == "block":
        edit_json(model / "config.json", num_hidden_layers=3)
    elif kind == "adapter":
        weights["model.layers.0.mlp.up_proj.lora_A.weight"] = weights["lm_head.weight"].clone()
    elif kind == "tokenizer":
        (model / "tokenizer.model").unlink()
    elif kind == "code":
        (model / "tokenizer.model").unlink()
        edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.T", None]})
    elif kind == "vocabulary":
        (model / "tokenizer.model").unlink()
        write_tokenizer(model, "smollm2")
    elif kind == "protobuf":
        (model / "tokenizer.model").write_bytes(b"\x0a\xff\xff")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("nan", "weights of blk.1.ffn_up.weight hold NaN or infinite values"),
        ("block", "block 2 of its 3 has no weights"),
        ("adapter", "does not know: model.layers.0.mlp.up_proj.lora_A"),
        ("tokenizer", "no tokenizer that the converter can read"),
        ("code", "program code that the model ships"),
        ("vocabulary", "more tokens than the vocab_size"),
        ("protobuf", "tokenizer.model is broken"),
    ],
)
def test_damaged_models_get_a_sentence(kind: str, sentence: str, tmp_path: Path):
    model = tiny_llama(tmp_path / "model")
    damage(model, kind)
    with pytest.raises(QuantkitError, match=sentence) as it:
        convert(model, tmp_path / "base.gguf")
    assert it.value.remedy
