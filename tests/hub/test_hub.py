"""Naming a model and looking at it: references, what is learnt without weights, every refusal.

Through the real huggingface_hub client, against a local server that speaks the Hub's protocol.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from hub_server import HubServer, look, running_hub
from hub_store import CONFIG, bf16, safetensors, sharded_model, tiny_model, write

from quantkit import hub
from quantkit.checkpoint.info import ModelInfo, known_model_types
from quantkit.errors import QuantkitError, UsageError
from quantkit.sandbox import untrusted
from quantkit.tensors import to_json


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with running_hub(monkeypatch, tmp_path) as hub_server:
        yield hub_server


# References


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("  Qwen/Qwen3-0.6B\n", "Qwen/Qwen3-0.6B"),
        ("gpt2", "gpt2"),
        ("a/b@v1.0", "a/b@v1.0"),
        ("https://huggingface.co/a/b", "a/b"),
        ("https://huggingface.co/a/b/", "a/b"),
        ("http://hf.co/a/b?library=x#card", "a/b"),
        ("huggingface.co/a/b", "a/b"),
        ("https://huggingface.co/gpt2", "gpt2"),
        ("https://huggingface.co/gpt2/tree/main", "gpt2@main"),
        ("https://huggingface.co/a/b/tree/v2", "a/b@v2"),
        ("https://huggingface.co/a/b/tree/refs%2Fpr%2F3", "a/b@refs/pr/3"),
        ("https://huggingface.co/a/b/tree/refs/pr/3/sub", "a/b@refs/pr/3"),
        ("https://huggingface.co/a/b/blob/main/config.json", "a/b@main"),
        ("https://huggingface.co/a/b/resolve/abc123/x.safetensors?download=true", "a/b@abc123"),
        ("https://huggingface.co/api/models/a/b", "a/b"),
        ("https://huggingface.co/a/b/discussions/4", "a/b"),
        ("hf://a/b", "a/b"),
        ("hf://models/a/b@main", "a/b@main"),
        ("demo:smollm2-135m", "demo:smollm2-135m"),
    ],
)
def test_references_to_the_hub(text: str, expected: str) -> None:
    assert str(hub.parse_reference(text)) == expected


def test_local_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    here = hub.ModelRef("local", str(tmp_path / "owner" / "name"))
    assert hub.parse_reference("./owner/name") == here
    assert hub.parse_reference(str(tmp_path / "owner" / "name")) == here
    assert hub.parse_reference("owner/name") == here
    assert hub.parse_reference("owner/name", allow_local=False).kind == "hub"
    with pytest.raises(UsageError, match="no revisions"):
        hub.parse_reference("./owner/name", "main")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "Enter a model"),
        ("a/b/c", "not a model's id"),
        ("a b", "not a model's id"),
        ("a/b\0", "not a model"),
        ("x" * 600, "not a model"),
        ("../../etc/nowhere", "There is no folder"),
        ("/nowhere/at/all", "There is no folder"),
        ("~/nowhere-at-all", "There is no folder"),
        ("~nobody-of-this-name/x", "There is no folder"),
        (__file__, "is a file"),
        ("https://example.com/a/b", "not on the Hugging Face Hub"),
        ("https://huggingface.co.example.com/a/b", "not on the Hugging Face Hub"),
        ("file:///etc/passwd", "not on the Hugging Face Hub"),
        ("https://huggingface.co/datasets/a/b", "a/b is a dataset"),
        ("https://huggingface.co/spaces/a/b", "a/b is a Space"),
        ("hf://datasets/a/b", "a/b is a dataset"),
        ("https://huggingface.co/docs/hub", "does not name a model"),
        ("https://huggingface.co/", "does not name a model"),
        ("demo:llama", "The only demo"),
        ("a/b@../../x", "not a revision"),
        ("https://huggingface.co/a/b/tree/v2?", "v1 was asked for, too"),
    ],
)
def test_bad_references(text: str, sentence: str) -> None:
    revision = "v1" if "v1" in sentence else None
    with pytest.raises(UsageError, match=sentence) as caught:
        hub.parse_reference(text, revision)
    assert caught.value.remedy


def test_public_page_reads_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be used here"):
        hub.parse_reference(str(tmp_path), allow_local=False)


# Looking at a model


def test_inspect_learns_everything_without_weights(server: HubServer) -> None:
    card = {"license": "other", "license_name": "x", "license_link": "y", "language": "de"}
    repo = server.add_model(
        "alice/tiny", tiny_model(), cardData=card, pipeline_tag="text-generation", tags=["t"]
    )
    info = look("alice/tiny")
    assert (info.id, info.sha, info.kind) == ("alice/tiny", repo.head.sha, "hub")
    assert (info.n_parameters, info.n_by_dtype) == (156, {"BF16": 152, "F32": 4})
    assert (info.architectures, info.model_type, info.dtype) == (
        ("LlamaForCausalLM",),
        "llama",
        "bfloat16",
    )
    assert (info.license, info.license_name, info.license_link) == ("other", "x", "y")
    assert (info.languages, info.pipeline_tag, info.tags) == (("de",), "text-generation", ("t",))
    names = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert [file.path for file in info.files] == names
    assert info.n_download_bytes == sum(len(tiny_model()[name]) for name in names)
    weights = next(file for file in info.files if file.path == "model.safetensors")
    assert weights.sha256 == hashlib.sha256(tiny_model()["model.safetensors"]).hexdigest()
    assert untrusted.build(ModelInfo, json.loads(json.dumps(to_json(info)))) == info


def test_inspect_reads_long_headers_by_range(server: HubServer) -> None:
    tensors = {f"layer.{i}." + "x" * 90: ("BF16", (2,), bf16(2)) for i in range(1500)}
    data = safetensors({**tensors, "big": ("BF16", (1_000_000,), bf16(1_000_000))})
    server.add_model("alice/long", tiny_model(model__safetensors=data))
    assert look("alice/long").n_parameters == 1_003_000
    # The CDN answers ranges: the header came in two pieces, and no weights with it.
    assert sum(int(r.range.split("-")[1]) for r in server.asked("/lfs/")) < 600_000
    assert len(server.asked("/lfs/")) == 2


def test_inspect_sharded(server: HubServer) -> None:
    server.add_model("alice/shards", sharded_model(3))
    info = look("alice/shards")
    assert info.n_parameters == 156
    assert [name[:11] for name in info.weights] == ["model-00001", "model-00002", "model-00003"]


def test_stale_index_beside_a_single_file(server: HubServer) -> None:
    stale = {"model.safetensors.index.json": b"{}", "x.safetensors.index.json": b"{}"}
    server.add_model("alice/x", {**tiny_model(), **stale})
    info = look("alice/x")
    assert info.weights == ("model.safetensors",)
    assert not any(file.path.endswith(".index.json") for file in info.files)


def test_inspect_pins_the_revision(server: HubServer) -> None:
    old = server.add_model("alice/tiny", tiny_model()).head.sha
    server.add_model("alice/tiny", sharded_model(), branch="dev")
    assert look("alice/tiny", revision=old[:40]).n_parameters == 156
    assert look("alice/tiny").sha == old
    assert look("alice/tiny@dev").n_parameters == 156


def test_legacy_ids_are_followed(server: HubServer) -> None:
    server.add_model("openai/gpt2", tiny_model())
    server.aliases["gpt2"] = "openai/gpt2"
    assert look("gpt2").id == "openai/gpt2"


def test_local_folder_gives_the_same(server: HubServer, tmp_path: Path) -> None:
    server.add_model("alice/tiny", tiny_model())
    folder = write(tmp_path / "tiny", tiny_model())
    here, there = look(str(folder)), look("alice/tiny")
    assert (here.kind, here.id) == ("local", "tiny")
    for name in ("architectures", "n_parameters", "n_by_dtype", "weights", "n_download_bytes"):
        assert getattr(here, name) == getattr(there, name)
    assert (here.license, here.languages, here.base_model, here.tags) == (
        "apache-2.0",
        ("en", "fr"),
        ("someone/base",),
        ("chat",),
    )
    cached = tmp_path / "models--alice--tiny" / "snapshots" / "abc"
    assert look(str(write(cached, tiny_model()))).id == "alice/tiny"
    (folder / "notes.bin").write_bytes(b"not part of the model")
    assert look(str(folder)).sha == here.sha
    (folder / "tokenizer.json").write_bytes(b'{"version": "1.1"}')
    assert look(str(folder)).sha != here.sha


def config(**changed: object) -> dict[str, object]:
    return {**CONFIG, **changed}


WEIGHTS = tiny_model()["model.safetensors"]
SHARDS = sharded_model()
REFUSED = {
    "only pickles": (tiny_model(model__safetensors=None, **{"tiny-Q4_K_M__gguf": None}), "pickled"),
    "only gguf": (
        tiny_model(model__safetensors=None, pytorch_model__bin=None),
        "only GGUF files.*Give the original instead: someone/base",
    ),
    "odd names": ({"config.json": b"{}", "x.safetensors": WEIGHTS}, "no model.safetensors and no"),
    "nothing": ({"README.md": b"hello"}, "no safetensors weights"),
    "no config": (tiny_model(config__json=None), "no config.json"),
    "bad config": (tiny_model(config__json="{"), "config.json of .* is not a JSON object"),
    "deep config": (tiny_model(config__json="[" * 100_000), "is not a JSON object"),
    "lora": (
        {"adapter_config.json": b'{"base_model_name_or_path": "x/base"}', "a.safetensors": WEIGHTS},
        "LoRA adapter without adapter_model.safetensors",
    ),
    "diffusers": (tiny_model(model_index__json="{}"), "diffusers pipeline"),
    "encoder": (tiny_model(config__json=config(architectures=["BertModel"])), "not a causal"),
    "masked": (tiny_model(config__json=config(architectures=["BertForMaskedLM"])), "not a causal"),
    "classifier": (
        tiny_model(config__json=config(architectures=["LlamaForSequenceClassification"])),
        "LlamaForSequenceClassification is an encoder, a classifier",
    ),
    "clip": (tiny_model(config__json=config(architectures=["CLIPModel"])), "not a causal"),
    "seq2seq": (
        tiny_model(
            config__json=config(
                architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True
            )
        ),
        "encoder-decoder",
    ),
    "other weights": (
        tiny_model(config__json=config(transformers_weights="x.safetensors")),
        "sets transformers_weights, which makes transformers read other files",
    ),
    "unnamed": (tiny_model(config__json=config(architectures=None)), "names no architecture"),
    "remote code": (
        tiny_model(config__json=config(model_type="evil", auto_map={"AutoModel": "x.Y"})),
        "only with code from its own repository",
    ),
    "unknown": (tiny_model(config__json=config(model_type="evil")), "does not know this kind"),
    "truncated": (tiny_model(model__safetensors=WEIGHTS[:-9]), "is truncated: its header desc"),
    "cut header": (tiny_model(model__safetensors=WEIGHTS[:40]), "ends inside its header"),
    "stub": (tiny_model(model__safetensors=WEIGHTS[:4]), "has only 4 bytes"),
    "empty": (tiny_model(model__safetensors=b""), "has only 0 bytes"),
    "too long": (tiny_model(model__safetensors=WEIGHTS + b"xx"), "2 bytes more"),
    "not safetensors": (tiny_model(model__safetensors=b"\x80" * 99), "does not start like"),
    "garbled header": (
        tiny_model(model__safetensors=WEIGHTS[:8] + b"x" + WEIGHTS[9:]),
        "header cannot be read",
    ),
    "overlap": (
        tiny_model(model__safetensors=WEIGHTS.replace(b"[64, 96]", b"[60, 92]")),
        "overlap others",
    ),
    "missing shard": (
        {k: v for k, v in SHARDS.items() if "00002" not in k},
        "index names model-00002-of-00003.safetensors, which is missing",
    ),
    "index escapes": (
        tiny_model(
            model__safetensors=None,
            **{"model.safetensors.index.json": '{"weight_map": {"a": "../../x.safetensors"}}'},
        ),
        "names ../../x.safetensors, which is not a safetensors file in the model's folder",
    ),
    "no metadata": (
        {
            **SHARDS,
            "model.safetensors.index.json": SHARDS["model.safetensors.index.json"].replace(
                b"metadata", b"metafora"
            ),
        },
        'has no "metadata", and transformers refuses such an index',
    ),
    "stored twice": (
        {**SHARDS, "model-00002-of-00003.safetensors": SHARDS["model-00001-of-00003.safetensors"]},
        "is stored twice, in model-00001-of-00003.safetensors and in model-00002",
    ),
    "strange names": (
        tiny_model(config__json=config(architectures=["\x1b[31m<b>\nBertModel"])),
        r"language model: .\[31m<b>.BertModel is",
    ),
    "empty index": (
        tiny_model(model__safetensors=None, **{"model.safetensors.index.json": "{}"}),
        "lists no weights",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("where", ["hub", "local"])
def test_refusals(server: HubServer, tmp_path: Path, case: str, where: str) -> None:
    files, sentence = REFUSED[case]
    if where == "hub":
        server.add_model("alice/x", files, cardData={"base_model": "someone/base"})
        text = "alice/x"
    else:
        text = str(write(tmp_path / "x", files))
    with pytest.raises(QuantkitError) as caught:
        look(text)
    assert re.search(sentence, str(caught.value)), str(caught.value)
    assert caught.value.remedy and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "architecture",
    [
        "GPT2LMHeadModel",
        "Gemma3ForConditionalGeneration",
        "Qwen3MoeForCausalLM",
        "XLNetLMHeadModel",
    ],
)
def test_language_models_pass(server: HubServer, architecture: str) -> None:
    server.add_model("a/b", tiny_model(config__json=config(architectures=[architecture])))
    assert look("a/b").architectures == (architecture,)


def test_known_model_types_without_importing_transformers() -> None:
    assert {"llama", "qwen3", "gemma3_text", "gpt2"} <= known_model_types()
