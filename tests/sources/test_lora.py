"""LoRA adapters: merged as peft merges them, refused where it would not be exact."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import CHEAP, Run, quantkit
from hub_server import HubServer, look, running_hub
from hub_store import safetensors, tiny_model
from safetensors.torch import load_file, save_file
from test_fetch import make_run
from tiny_models import save_model, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from quantkit import sources
from quantkit.checkpoint.adapter import overlay, read_adapter
from quantkit.checkpoint.info import ModelInfo
from quantkit.checkpoint.safetensors import StoredTensor
from quantkit.errors import QuantkitError
from quantkit.evidence.card import card_data
from quantkit.gguf_file.read import GgufFile
from quantkit.sandbox import untrusted
from quantkit.sources.adapted import Base, changes
from quantkit.sources.lora import merge
from quantkit.sources.snapshot import load_snapshot
from quantkit.stages import fetch

PREFIX = "base_model.model."
TEMPLATE = "{% for m in messages %}<turn>{{ m['content'] }}</turn>{% endfor %}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with running_hub(monkeypatch, tmp_path) as hub_server:
        yield hub_server


def write_adapter(
    folder: Path, tensors: dict[str, torch.Tensor], base: str = "base", **config: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "base_model_name_or_path": base, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def pair(
    module: str, n_out: int, n_in: int, rank: int = 4, seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(rank, n_in, generator=generator),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(n_out, rank, generator=generator) / 10,
    }


def product(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    a, b = (tensors[f"{PREFIX}{module}.lora_{x}.weight"].double() for x in "AB")
    return b @ a


def merged(base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    files = [path.name for path in base.iterdir()]
    made = merge(base, files, adapter, [path.name for path in adapter.iterdir()], out)
    tensors = {}
    for path in made:
        if path.suffix == ".safetensors":
            tensors |= load_file(path)
    return tensors


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, (2, 2)),
        ({"use_rslora": True}, (4, 4)),
        ({"alpha_pattern": {"down_proj": 16}}, (2, 4)),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 2}}, (0.5, 2)),
        ({"alpha_pattern": {"proj": 99}}, (2, 2)),  # names no whole module
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_merge(tmp_path: Path, config: dict, scales: tuple[float, float], sharded: bool) -> None:
    base = tiny_llama(tmp_path / "base", dtype=torch.float32)
    before = weights(base)
    if sharded:
        names = sorted(before)
        (base / "model.safetensors").unlink()
        for i in range(2):
            save_file({n: before[n] for n in names[i::2]}, base / f"model-{i}.safetensors")
        index = {n: f"model-{i}.safetensors" for i in range(2) for n in names[i::2]}
        about = json.dumps({"metadata": {}, "weight_map": index})
        (base / "model.safetensors.index.json").write_text(about)
    tensors = pair(Q, 64, 64) | pair(DOWN, 64, 128, seed=1)
    after = merged(base, write_adapter(tmp_path / "a", tensors, **config), tmp_path / "out")
    assert after.keys() == before.keys()
    for module, scale in zip((Q, DOWN), scales, strict=True):
        name = f"{module}.weight"
        wanted = before.pop(name).double() + scale * product(tensors, module)
        assert torch.allclose(after[name].double(), wanted, atol=1e-6)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_sums_are_rounded_once(tmp_path: Path) -> None:
    """In bfloat16 a small change would be lost if it were rounded before it is added."""
    base = tiny_llama(tmp_path / "base")
    tensors = pair(Q, 64, 64)
    name = f"{Q}.weight"
    wanted = (weights(base)[name].double() + 2 * product(tensors, Q)).bfloat16()
    after = merged(base, write_adapter(tmp_path / "a", tensors), tmp_path / "out")[name]
    assert (after == wanted).float().mean() > 0.99 and after.dtype == torch.bfloat16


def test_transposed_weights(tmp_path: Path) -> None:
    """GPT-2 stores (in, out), whatever `fan_in_fan_out` says, and its checkpoints leave the name of
    the outer module out.
    """
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=1, n_head=2))
    base = save_model(tmp_path / "base", model, "spm")
    before = weights(base)
    stored = next(name for name in before if name.endswith("attn.c_attn.weight"))
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in before.items()},
        base / "model.safetensors",
    )
    module = "transformer.h.0.attn.c_attn"
    tensors = pair(module, 96, 32)
    wanted = before[stored].double() + 2 * product(tensors, module).T
    for said in (True, False):
        adapter = write_adapter(tmp_path / f"a-{said}", tensors, fan_in_fan_out=said)
        after = merged(base, adapter, tmp_path / f"out-{said}")
        found = after[stored.removeprefix("transformer.")]
        assert torch.allclose(found.double(), wanted, atol=1e-6)
    wrong = write_adapter(tmp_path / "b", pair(module, 32, 96))
    with pytest.raises(QuantkitError, match=r"\(96, 32\).*\(32, 96\)"):
        merged(base, wrong, tmp_path / "out2")


def test_other_outer_names() -> None:
    """A model that sees: its text model is called otherwise in memory than in the file."""
    names = ["language_model.model.layers.3.mlp.up_proj.weight", "vision.layers.3.fc.weight"]
    stored = {name: StoredTensor(name, "F32", (8, 8), 0, 0) for name in names}
    module = "model.language_model.layers.3.mlp.up_proj"
    tensors = {
        key: StoredTensor(key, "F32", tuple(t.shape), 0, 0) for key, t in pair(module, 8, 8).items()
    }
    base = Base(
        {module: "linear", "embed": "table", "lm_head": "linear"}, "embed", "lm_head", False
    )
    config = read_adapter("a", WHOLE, {"base_model_name_or_path": "x", "lora_alpha": 8})
    assert list(changes(config, tensors, stored, base).of) == names[:1]


def test_modules_that_were_trained_whole(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", dtype=torch.float32)
    head = torch.randn(512, 64)
    adapter = write_adapter(tmp_path / "a", {f"{PREFIX}lm_head.weight": head})
    assert torch.equal(merged(base, adapter, tmp_path / "out")["lm_head.weight"], head)
    larger = write_adapter(tmp_path / "b", {f"{PREFIX}lm_head.weight": torch.randn(520, 64)})
    with pytest.raises(QuantkitError, match=r"lm_head.weight is \(520, 64\).*\(512, 64\)"):
        merged(base, larger, tmp_path / "out2")


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (pair("model.layers.7.mlp.up_proj", 128, 64), "has no such tensor"),
        ({f"{PREFIX}{Q}.lora_A.weight": torch.ones(4, 64)}, "no complete lora_A and lora_B"),
        ({f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(4)}, "cannot be merged"),
        ({f"{PREFIX}{Q}.lora_diag": torch.ones(4)}, "cannot be merged"),
        ({f"{PREFIX}embed.lora_embedding_A": torch.ones(4, 4)}, "no complete lora_A and lora_B"),
    ],
)
def test_parts_without_a_place(tmp_path: Path, tensors: dict, sentence: str) -> None:
    base = tiny_llama(tmp_path / "base")
    with pytest.raises(QuantkitError, match=sentence):
        merged(base, write_adapter(tmp_path / "a", tensors), tmp_path / "out")


WHOLE = ["adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("files", "config", "sentence"),
    [
        (["adapter_model.bin"], {}, "pickled"),
        ([], {}, "without adapter_model.safetensors"),
        (WHOLE, {"base_model_name_or_path": None}, "names no base model"),
        (WHOLE, {"peft_type": "IA3"}, "kind IA3"),
        (WHOLE, {"use_dora": True}, "DoRA"),
        (WHOLE, {"lora_bias": True}, "biases"),
        (WHOLE, {"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        (WHOLE, {"init_lora_weights": "pissa_niter_4"}, "base was changed"),
        (WHOLE, {"lora_alpha": None}, "unusable lora_alpha"),
    ],
)
def test_refusals(files: list[str], config: dict, sentence: str) -> None:
    known = {"base_model_name_or_path": "x/base", "lora_alpha": 8, "init_lora_weights": True}
    with pytest.raises(QuantkitError, match=sentence):
        read_adapter("alice/lora", files, {**known, **config})
    assert read_adapter("alice/lora", WHOLE, known).base == "x/base"


def test_the_template_of_the_fine_tune_wins(tmp_path: Path) -> None:
    """Whichever file either keeps it in."""
    for name, own in (
        ("chat_template.jinja", TEMPLATE),
        ("tokenizer_config.json", json.dumps({"chat_template": TEMPLATE})),
    ):
        folder, adapter = tmp_path / f"{name}-base", tmp_path / f"{name}-own"
        folder.mkdir()
        adapter.mkdir()
        (folder / "chat_template.jinja").write_text("the base's")
        (folder / "tokenizer_config.json").write_text("{}")
        (adapter / name).write_text(own)
        (adapter / "adapter_config.json").write_text("{}")
        overlay(adapter, [name, "adapter_config.json"], folder)
        assert (folder / name).read_text() == own
        jinja = folder / "chat_template.jinja"
        assert not jinja.exists() or jinja.read_text() == TEMPLATE
        assert not (folder / "adapter_config.json").exists()


# From the Hub


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def publish_both(server: HubServer, tmp_path: Path, **config: Any) -> tuple[Any, Any]:
    """A base with two commits and an adapter of its first."""
    base = tiny_llama(tmp_path / "base", dtype=torch.float32)
    repo = server.add_model("meta/base", files_of(base), cardData={"license": "mit"})
    first = repo.head.sha
    changed = tiny_llama(tmp_path / "changed", dtype=torch.float32, seed=5)
    server.add_model("meta/base", files_of(changed))
    tensors = pair(Q, 64, 64)
    adapter = write_adapter(tmp_path / "a", tensors, "meta/base", revision=first, **config)
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    own = {"base_model": "meta/base", "language": "fr"}
    return repo, server.add_model("alice/Tiny-LoRA", files_of(adapter), cardData=own)


def test_an_adapter_of_the_hub_is_merged_onto_its_base(server: HubServer, tmp_path: Path) -> None:
    base, repo = publish_both(server, tmp_path)
    run = make_run(tmp_path / "run", "alice/Tiny-LoRA")
    result = fetch.Fetch().execute(run)
    first = base.commits[0].sha
    assert result.summary["sha"] == repo.head.sha
    assert (result.summary["base"], result.summary["base_sha"]) == ("meta/base", first)
    assert result.summary["license"] == "mit"  # the base's, where the adapter names none
    snapshot = load_snapshot(run.dir)
    assert snapshot.info.base is not None and snapshot.info.base.sha == first
    assert snapshot.folder == run.dir.stage_dir("fetch") / "Tiny-LoRA"
    assert (snapshot.folder / "chat_template.jinja").read_text() == TEMPLATE
    before, after = weights(tmp_path / "base"), weights(snapshot.folder)
    assert not torch.equal(before.pop(f"{Q}.weight"), after[f"{Q}.weight"])
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {path.name for path in result.outputs} >= {"model.safetensors", "snapshot.json"}
    data = card_data(snapshot.info, SimpleNamespace(outputs=()))  # type: ignore[arg-type]
    assert data.base_model == ["alice/Tiny-LoRA", "meta/base"]
    assert data.license == "mit" and data.language == "fr"


def test_a_plan_sees_the_base_with_the_adapters_tokenizer(
    server: HubServer, tmp_path: Path
) -> None:
    base, _ = publish_both(server, tmp_path)
    info = look("alice/Tiny-LoRA")
    assert info.base is not None and info.is_adapter
    assert (info.architectures, info.n_parameters) == (
        info.base.architectures,
        info.base.n_parameters,
    )
    assert info.n_download_bytes > info.base.n_download_bytes > 0
    assert untrusted.build(ModelInfo, json.loads(json.dumps(_json(info)))) == info
    folder = sources.fetch_metadata(info, None, tmp_path / "metadata")
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    assert (folder / "config.json").exists() and (folder / "model.safetensors").exists()
    assert not any("adapter" in path.name for path in folder.iterdir())
    asked = [r for r in server.requests if r.path.endswith("model.safetensors") and not r.range]
    assert not asked


def _json(info: ModelInfo) -> Any:
    from quantkit.tensors import to_json

    return to_json(info)


@pytest.mark.parametrize(
    ("base", "sentence"),
    [
        ("/home/alice/llama", "Local folders cannot be used here"),
        ("alice/lora", "is an adapter itself"),
        ("alice/four-bit", "The base of this adapter, alice/four-bit, is quantized"),
        ("nobody/nothing", "nobody/nothing"),
    ],
)
def test_bases_that_cannot_be_merged_onto(server: HubServer, base: str, sentence: str) -> None:
    quantized = json.loads(tiny_model()["config.json"])
    quantized["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    packed = safetensors({"model.embed_tokens.weight": ("U8", (16, 1), bytes(16))})
    four_bit = tiny_model(config__json=quantized, model__safetensors=packed)
    server.add_model("alice/four-bit", four_bit)
    server.add_model("alice/base", tiny_model())

    def adapter(of: str) -> dict[str, bytes]:
        settings = {"base_model_name_or_path": of, "lora_alpha": 8}
        return {
            "adapter_config.json": json.dumps(settings).encode(),
            "adapter_model.safetensors": tiny_model()["model.safetensors"],
        }

    server.add_model("alice/lora", adapter("alice/base"))
    server.add_model("alice/second", adapter(base))
    with pytest.raises(QuantkitError, match=sentence):
        look("alice/second")


def test_a_local_adapter_of_a_local_base(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", pair(Q, 64, 64), str(base))
    info = look(str(adapter))
    assert info.base is not None and info.base.local_path == str(base)
    sha = info.sha
    (base / "generation_config.json").write_text("{}")
    assert look(str(adapter)).sha != sha


@pytest.mark.slow
def test_a_run_of_an_adapter(tmp_path: Path, tiny_checkpoint: Path, offline: dict) -> None:
    """Its template is in the GGUF, its weights too, and the recipe says what it was merged onto."""
    module = "model.layers.1.self_attn.q_proj"
    adapter = write_adapter(tmp_path / "Tuned", pair(module, 96, 96), str(tiny_checkpoint))
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    answer = quantkit("run", adapter, "--out", tmp_path / "run", *CHEAP, "--json", env=offline)
    assert answer.code == 0, answer.err
    run = Run(tmp_path / "run")
    assert GgufFile(run.output).metadata["tokenizer.chat_template"] == TEMPLATE
    assert run.recipe["adapter_of"]["model"] == tiny_checkpoint.name
    assert run.output.name.startswith("Tuned-EVO-")
    card = (run.folder / "9-publish/upload/README.md").read_text()
    assert "a LoRA merged onto Tiny-Llama" in card
