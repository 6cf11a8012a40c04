"""A generator of trouble: from a seed, a small checkpoint with one to three oddities.

An oddity stands for something that people's checkpoints really have, or that breaks them: dtypes
that are mixed, tensors too many or too few, renamed or stale shards, odd vocabularies, settings
that do not agree with the weights. Each says what may come of it:

    RIGHT    transformers loads it whole, and so must the project
    EITHER   a right file or a refusal
    REFUSED  nothing right can be made of it

A draft (`Draft`) is changed in memory and written once; `trouble_adapters.py` puts adapters on one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from enliven import enliven
from safetensors.torch import save
from tiny_models import N_TOKENS, write_tokenizer

RIGHT, EITHER, REFUSED = "right", "either", "refused"

Tensors = dict[str, torch.Tensor]

_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_KINDS = {  # name: config class, model class, tokenizer, settings
    "llama": ("LlamaConfig", "LlamaForCausalLM", "spm", {}),
    "llama-bpe": ("LlamaConfig", "LlamaForCausalLM", "bpe", {}),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", "spm", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", "spm", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", "bpe", {}),
    "qwen2-tied": ("Qwen2Config", "Qwen2ForCausalLM", "bpe", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", "bpe", {"head_dim": 64}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", "spm", {"pad_token_id": 0}),
}


@dataclass
class Draft:
    """A checkpoint before it is written."""

    kind: str
    tensors: Tensors
    config: dict[str, Any]
    generation: dict[str, Any]
    files: dict[str, bytes]  # the tokenizer's, and what lies beside the weights
    shards: list[Tensors] | None = None  # with an index; else one file
    shard_names: list[str] = field(default_factory=list)
    index: dict[str, str] = field(default_factory=dict)  # changes to the weight map
    has_index: bool = True
    single: str = "model.safetensors"
    last: list[Callable[[Path], None]] = field(default_factory=list)  # done to the written folder

    @property
    def is_tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings"))

    def json(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.files.get(name, b"{}"))
        return value

    def put_json(self, name: str, **changes: Any) -> None:
        self.files[name] = json.dumps({**self.json(name), **changes}).encode()

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        self.put("config.json", json.dumps(self.config).encode())
        self.files.setdefault("generation_config.json", json.dumps(self.generation).encode())
        if self.shards is None:
            self.put(self.single, save(contiguous(self.tensors), {"format": "pt"}))
        else:
            self._put_shards()
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        for change in self.last:
            change(folder)
        return folder

    def put(self, name: str, data: bytes) -> None:
        self.files[name] = data

    def _put_shards(self) -> None:
        assert self.shards is not None
        n = len(self.shards)
        names = self.shard_names or [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
        weight_map = {}
        for name, tensors in zip(names, self.shards, strict=True):
            self.put(name, save(contiguous(tensors), {"format": "pt"}))
            weight_map |= dict.fromkeys(tensors, name)
        weight_map |= self.index
        if self.has_index:
            index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
            self.put("model.safetensors.index.json", json.dumps(index).encode())


def contiguous(tensors: Tensors) -> Tensors:
    """Copies of their own: safetensors saves no shared memory."""
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


@cache
def _sound(kind: str) -> tuple[Tensors, dict[str, Any], dict[str, Any]]:
    """A sound model of a kind: weights in bfloat16, config, generation config."""
    config_class, model_class, tokenizer, settings = _KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(
        **{**_SIZES, "vocab_size": N_TOKENS[tokenizer], "tie_word_embeddings": False, **settings}
    )
    model = getattr(transformers, model_class)(config).float().requires_grad_(False).eval()
    enliven(model)
    model.to(torch.bfloat16)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    said = {**config.to_dict(), "architectures": [model_class], "dtype": "bfloat16"}
    return tensors, said, model.generation_config.to_dict()


@cache
def _tokenizer_files(kind: str) -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), kind)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def sound_draft(kind: str) -> Draft:
    """A draft that nothing is wrong with."""
    tensors, config, generation = _sound(kind)
    clean = {key: value for key, value in generation.items() if value is not None}
    files = dict(_tokenizer_files(_KINDS[kind][2]))
    return Draft(kind, dict(tensors), json.loads(json.dumps(config)), clean, files)


@dataclass(frozen=True)
class Oddity:
    """`change` does it to a draft; None where that draft cannot have it."""

    name: str
    outcome: str
    change: Callable[[random.Random, Draft], str | None]
    field: str  # two of one field are not put on one draft


ODDITIES: dict[str, Oddity] = {}


def oddity(outcome: str, field: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(change: Callable[[random.Random, Draft], str | None]) -> Callable[..., Any]:
        name = change.__name__.replace("_", "-")
        ODDITIES[name] = Oddity(name, outcome, change, field)
        return change

    return register


@dataclass(frozen=True)
class Trouble:
    """A written checkpoint: what MODEL names, what is odd about it, what may come of it."""

    seed: int
    path: Path
    kind: str
    oddities: tuple[str, ...]
    outcome: str

    @property
    def is_adapter(self) -> bool:
        return (self.path / "adapter_config.json").is_file()

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.kind} with {', '.join(self.oddities)}"


def worst(outcomes: list[str]) -> str:
    return next((o for o in (REFUSED, EITHER) if o in outcomes), RIGHT)


def make_trouble(seed: int, folder: Path) -> Trouble:
    """The checkpoint of a seed, in a new folder."""
    import trouble_adapters
    import trouble_files  # noqa: F401  registers more oddities

    rng = random.Random(seed)
    kind = rng.choice(sorted(_KINDS))
    draft = sound_draft(kind)
    torch.manual_seed(seed)  # after the sound model, which is made once
    done: list[str] = []
    outcomes: list[str] = []
    wanted = rng.choice((1, 1, 2, 2, 3))
    fields: set[str] = set()
    for found in _shuffled(rng):
        if len(done) == wanted:
            break
        if found.field in fields:
            continue
        try:
            said = found.change(rng, draft)
        except _Unfit:
            continue
        if said is not None:
            fields.add(found.field)
            done.append(f"{found.name} ({said})" if said else found.name)
            outcomes.append(found.outcome)
    path = draft.write(folder / "model")
    if rng.random() < 0.2:
        adapter = trouble_adapters.add_adapter(rng, path, folder / "adapter", worst(outcomes))
        if adapter is not None:
            path = folder / "adapter"
            done.append(adapter.said)
            outcomes.append(adapter.outcome)
    return Trouble(seed, path, kind, tuple(done), worst(outcomes))


def _shuffled(rng: random.Random) -> Iterator[Oddity]:
    names = sorted(ODDITIES)
    rng.shuffle(names)
    return (ODDITIES[name] for name in names)


# The weights.


class _Unfit(Exception):
    """What was done to the draft before leaves no room for an oddity."""


def some_linear(rng: random.Random, draft: Draft) -> str:
    names = [n for n, t in draft.tensors.items() if t.dim() == 2 and ".layers." in n]
    if not names:
        raise _Unfit
    return rng.choice(sorted(names))


@oddity(RIGHT, "dtype")
def mixed_dtypes(rng: random.Random, draft: Draft) -> str:
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    for name, tensor in draft.tensors.items():
        draft.tensors[name] = tensor.to(rng.choice(kinds))
    return ""


@oddity(RIGHT, "dtype")
def another_dtype_than_said(rng: random.Random, draft: Draft) -> str:
    stored = rng.choice((torch.float32, torch.float16))
    draft.tensors = {name: tensor.to(stored) for name, tensor in draft.tensors.items()}
    key = rng.choice(("dtype", "torch_dtype"))
    draft.config.pop("dtype", None)
    draft.config[key] = rng.choice(("bfloat16", "float64", "float32", None))
    return f"{stored}, {key} {draft.config[key]}"


@oddity(EITHER, "dtype")
def doubles(rng: random.Random, draft: Draft) -> str:
    name = some_linear(rng, draft)
    draft.tensors[name] = draft.tensors[name].double()
    return name


@oddity(EITHER, "dtype")
def integer_weights(rng: random.Random, draft: Draft) -> str:
    name = some_linear(rng, draft)
    kind = rng.choice((torch.int8, torch.int16, torch.uint8, torch.int32, torch.int64, torch.bool))
    draft.tensors[name] = (draft.tensors[name].float() * 8).round().clamp(0, 100).to(kind)
    return f"{kind} {name}"


@oddity(EITHER, "dtype")
def float8_without_scales(rng: random.Random, draft: Draft) -> str:
    name = some_linear(rng, draft)
    draft.tensors[name] = draft.tensors[name].to(torch.float8_e4m3fn)
    return name


@oddity(RIGHT, "extra")
def rotary_buffers(rng: random.Random, draft: Draft) -> str:
    for layer in range(draft.config["num_hidden_layers"]):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        draft.tensors[name] = torch.rand(32)
    return ""


@oddity(EITHER, "extra")
def extra_weights(rng: random.Random, draft: Draft) -> str:
    name = rng.choice(
        (
            "model.layers.0.self_attn.q_proj_extra.weight",
            "model.layers.1.mlp.gate.weight",
            "value_head.weight",
            "model.layers.0.self_attn.q_norm.weight",
            "model.layers.1.post_feedforward_layernorm.weight",
            "score.weight",
        )
    )
    if name in draft.tensors:
        return None  # type: ignore[return-value]
    shape = (64,) if "q_norm" in name else (256,) if "layernorm" in name else (8, 256)
    draft.tensors[name] = torch.randn(shape).bfloat16()
    return name


@oddity(EITHER, "extra")
def extra_layer(rng: random.Random, draft: Draft) -> str:
    """SharedKV by a merge, or a prediction head that config.json does not speak of."""
    for name, tensor in list(draft.tensors.items()):
        if ".layers.1." in name:
            draft.tensors[name.replace(".layers.1.", ".layers.2.")] = tensor.clone()
    return ""


@oddity(EITHER, "extra")
def extra_biases(rng: random.Random, draft: Draft) -> str:
    part = rng.choice(("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "self_attn.k_proj"))
    for layer in range(2):
        weight = draft.tensors.get(f"model.layers.{layer}.{part}.weight")
        if weight is None or f"model.layers.{layer}.{part}.bias" in draft.tensors:
            return None  # type: ignore[return-value]
        bias = torch.randn(len(weight)).bfloat16()
        draft.tensors[f"model.layers.{layer}.{part}.bias"] = bias
    return part


@oddity(REFUSED, "missing")
def missing_tensor(rng: random.Random, draft: Draft) -> str:
    name = rng.choice(sorted(n for n in draft.tensors if "rotary" not in n))
    del draft.tensors[name]
    return name


@oddity(REFUSED, "missing")
def missing_layer(rng: random.Random, draft: Draft) -> str:
    draft.tensors = {n: t for n, t in draft.tensors.items() if ".layers.1." not in n}
    return ""


@oddity(REFUSED, "shape")
def empty_tensor(rng: random.Random, draft: Draft) -> str:
    name = some_linear(rng, draft)
    draft.tensors[name] = draft.tensors[name][: rng.choice((0, 0, 1))]
    return name


@oddity(REFUSED, "shape")
def cut_or_turned(rng: random.Random, draft: Draft) -> str | None:
    name = some_linear(rng, draft)
    tensor = draft.tensors[name]
    rows, columns = tensor.shape
    changed = rng.choice((tensor[: rows // 2], tensor[:, : columns // 2], tensor.T, tensor[None]))
    if changed.shape == tensor.shape:
        return None
    draft.tensors[name] = changed.contiguous()
    return f"{name} {tuple(changed.shape)}"


@oddity(REFUSED, "values")
def not_finite(rng: random.Random, draft: Draft) -> str:
    name = some_linear(rng, draft)
    tensor = draft.tensors[name].clone()
    if not tensor.is_floating_point() or tensor.numel() < 2 or tensor.itemsize < 2:
        return None  # type: ignore[return-value]
    tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice((float("nan"), float("inf")))
    draft.tensors[name] = tensor
    return name


@oddity(RIGHT, "values")
def zeros(rng: random.Random, draft: Draft) -> str:
    """Layers that a merge or a pruning emptied."""
    name = some_linear(rng, draft)
    draft.tensors[name] = torch.zeros_like(draft.tensors[name])
    return name


@oddity(EITHER, "values")
def outlier(rng: random.Random, draft: Draft) -> str:
    """Beyond float16, and one that is large for any type."""
    name = some_linear(rng, draft)
    tensor = draft.tensors[name].clone()
    if tensor.dtype in (torch.bfloat16, torch.float32) and tensor.numel():
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice((90_000.0, 300.0))
    draft.tensors[name] = tensor
    return name


# The head.


@oddity(RIGHT, "head")
def head_stored_once_more(rng: random.Random, draft: Draft) -> str | None:
    if not draft.is_tied:
        return None
    draft.tensors["lm_head.weight"] = draft.tensors["model.embed_tokens.weight"].clone()
    return ""


@oddity(EITHER, "head")
def another_head(rng: random.Random, draft: Draft) -> str | None:
    """config.json says tied, and another head is stored."""
    if not draft.is_tied:
        return None
    table = draft.tensors["model.embed_tokens.weight"]
    draft.tensors["lm_head.weight"] = (torch.randn(table.shape) * 0.06).to(table.dtype)
    return ""


@oddity(REFUSED, "head")
def no_head(rng: random.Random, draft: Draft) -> str | None:
    if draft.is_tied:
        draft.config["tie_word_embeddings"] = False
    elif "lm_head.weight" in draft.tensors:
        del draft.tensors["lm_head.weight"]
    return ""


@oddity(EITHER, "head")
def tied_without_a_word(rng: random.Random, draft: Draft) -> str:
    """What the class does where config.json is silent."""
    draft.config.pop("tie_word_embeddings", None)
    return draft.kind


@oddity(EITHER, "head")
def tied_though_a_head_is_stored(rng: random.Random, draft: Draft) -> str | None:
    if draft.is_tied:
        return None
    draft.config["tie_word_embeddings"] = True
    return ""


# Settings.


@oddity(EITHER, "activation")
def another_activation(rng: random.Random, draft: Draft) -> str:
    draft.config["hidden_act"] = rng.choice(("gelu", "relu", "gelu_pytorch_tanh", "swish"))
    return str(draft.config["hidden_act"])


@oddity(EITHER, "rope")
def another_rope(rng: random.Random, draft: Draft) -> str:
    theta = {"rope_theta": 10000.0}
    scaling = rng.choice(
        (
            {"rope_type": "linear", "factor": 4.0, **theta},
            {"rope_type": "dynamic", "factor": 4.0, **theta},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, **theta},
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
                **theta,
            },
            {"rope_type": "default", "rope_theta": 500_000.0},
            {"rope_type": "default", "partial_rotary_factor": 0.5, **theta},
        )
    )
    older = rng.random() < 0.5
    draft.config.pop("rope_parameters", None)
    if older:
        draft.config["rope_theta"] = scaling.pop("rope_theta")
        draft.config["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    else:
        draft.config["rope_parameters"] = scaling
    return f"{scaling}{' older names' if older else ''}"


@oddity(REFUSED, "sizes")
def wrong_number(rng: random.Random, draft: Draft) -> str | None:
    key, value = rng.choice(
        (
            ("num_hidden_layers", 3),
            ("num_hidden_layers", 10**9),
            ("num_hidden_layers", -1),
            ("num_key_value_heads", 4),
            ("vocab_size", 500),
            ("vocab_size", 10**9),
            ("hidden_size", 2**31),
            ("hidden_size", 128),
            ("intermediate_size", 500),
            ("num_attention_heads", 0),
            ("hidden_size", "256"),
            ("num_hidden_layers", None),
            ("vocab_size", 512.5),
            ("hidden_size", [256]),
        )
    )
    draft.config[key] = value
    return f"{key} {value!r}"


@oddity(EITHER, "sizes")
def fewer_layers_than_stored(rng: random.Random, draft: Draft) -> str:
    draft.config["num_hidden_layers"] = 1
    for key in ("layer_types",):
        if isinstance(draft.config.get(key), list):
            draft.config[key] = draft.config[key][:1]
    return ""


@oddity(EITHER, "settings")
def settings_left_out(rng: random.Random, draft: Draft) -> str | None:
    keys = "rms_norm_eps hidden_act max_position_embeddings head_dim num_key_value_heads"
    keys += " architectures attention_bias bos_token_id eos_token_id"
    key = rng.choice([key for key in keys.split() if key in draft.config])
    del draft.config[key]
    return key


@oddity(EITHER, "settings")
def odd_setting(rng: random.Random, draft: Draft) -> str:
    key, value = rng.choice(
        (
            ("rms_norm_eps", 0.1),
            ("rms_norm_eps", "1e-6"),
            ("pretraining_tp", 2),
            ("attention_dropout", 0.5),
            ("use_cache", False),
            ("sliding_window", 8),
            ("output_hidden_states", True),
            ("torchscript", True),
            ("attention_bias", True),
            ("mlp_bias", True),
            ("logits_scaling", 8.0),
            ("chunk_size_feed_forward", 16),
            ("is_decoder", True),
            ("pad_token_id", 10**6),
            ("transformers_version", "9.9.9"),
            ("_name_or_path", "/etc/passwd"),
            ("auto_map", {"AutoModelForCausalLM": "modeling_evil.Evil"}),
            ("architectures", []),
            ("architectures", ["MistralForCausalLM"]),
            ("model_type", "mistral"),
            ("model_type", "nothing-known"),
        )
    )
    draft.config[key] = value
    return f"{key} {value!r}"


@oddity(RIGHT, "quantization")
def stale_quantization(rng: random.Random, draft: Draft) -> str:
    settings = rng.choice(
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"},
            {"load_in_8bit": True, "quant_method": "bitsandbytes"},
            {"bits": 4, "group_size": 128, "quant_method": "gptq", "desc_act": False},
            {"bits": 4, "group_size": 128, "quant_method": "awq", "zero_point": True},
        )
    )
    draft.config["quantization_config"] = settings
    return str(settings["quant_method"])


@oddity(EITHER, "quantization")
def odd_quantization(rng: random.Random, draft: Draft) -> str:
    value = rng.choice(([], "fp8", {"quant_method": 7}, {"quant_method": "unheard-of"}, 4))
    draft.config["quantization_config"] = value
    return repr(value)
