"""Ask the pinned converter which models it can convert.

The converter has two tables, one of text models and one of projectors (`mmproj`: the vision or
audio encoder of a multimodal model, a GGUF of its own). A multimodal architecture is usually in
both; its language model is converted through the first, which is the one that counts here.
"""

from __future__ import annotations

import functools
import os
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from quantkit.errors import QuantkitError
from quantkit.files import write_json
from quantkit.llamacpp.converter import sandbox
from quantkit.llamacpp.converter.floor import check_floor
from quantkit.llamacpp.converter.install import (
    TREE_SHA256,
    describe,
    ensure_converter,
    install_dir,
)
from quantkit.run.folder import read_json
from quantkit.sandbox import untrusted
from quantkit.sandbox.untrusted import Settings

# GGUF architectures that do not predict the next token: encoders, encoder-decoders, diffusion
# models, codecs, and drafts that only work beside another model.
NOT_CAUSAL = frozenset(
    """
    bert nomic-bert nomic-bert-moe neo-bert modern-bert jina-bert-v2 jina-bert-v3 eurobert
    gemma-embedding llama-embed t5 t5encoder wavtokenizer-dec dream llada llada-moe rnd1 eagle3
    dflash gemma4-assistant qwen3tts pockettts clip
    """.split()
)

# GGUF architectures that cannot be run a block at a time here, and why.
BEYOND_REACH = {"gemma3n": "its blocks hand on four hidden states side by side (AltUp)"}


@functools.cache
def _tables(tree: Path, versions: str) -> sandbox.Tables:
    """The converter's tables; kept next to the pinned tree for the next process."""
    kept = install_dir() / "architectures.json"
    pinned = not os.environ.get("QUANTKIT_CONVERTER")
    if pinned and kept.exists():
        tables = untrusted.build(sandbox.Tables, read_json(kept))
        if tables.made_with == versions:
            return tables
    with tempfile.TemporaryDirectory(prefix="quantkit-") as scratch:
        log = Path(scratch) / "list.log"
        outcome = sandbox.run("list_architectures", tree, log, sandbox.limits_for(0, 0))
    if not outcome.ok or outcome.said.tables is None:
        raise QuantkitError(
            f"The converter does not start: {outcome.end.message or outcome.ended.log[-300:]}.",
            "Run `make install` again: its packages are pinned.",
        )
    tables = replace(outcome.said.tables, made_with=versions)
    if pinned:
        write_json(kept, tables)
    return tables


def tables() -> sandbox.Tables:
    """Return the converter's, with the installed transformers. Takes seconds once, then
    milliseconds.

    Raises QuantkitError when the converter cannot be set up or does not start.
    """
    check_floor()
    tree = ensure_converter()
    libraries = " ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    return _tables(tree, f"{describe(tree)} {TREE_SHA256} {libraries}")


def supported_architectures() -> frozenset[str]:
    """Return the Hugging Face architectures of causal language models that are converted and
    quantized.
    """
    out = NOT_CAUSAL | set(BEYOND_REACH)
    return frozenset(hf for hf, gguf in tables().text.items() if gguf not in out)


def architecture_of(config: Settings) -> str | None:
    """Return the architecture whose text model a `config.json` describes, as the converter reads
    it.
    """
    own, inner = (_first(part.get("architectures")) for part in config.parts)
    # A few multimodal models have a class of their own even when the inner one is known.
    return inner if inner is not None and own not in _OWN_TEXT_CLASS else own


def _first(names: object) -> str | None:
    return str(names[0]) if isinstance(names, list) and names else None


# From get_model_architecture of the converter's conversion/base.py.
_OWN_TEXT_CLASS = {
    "StepVLForConditionalGeneration",
    "Sarashina2VisionForCausalLM",
    "Exaone4_5_ForConditionalGeneration",
    "Step3p7ForConditionalGeneration",
    "KimiK3ForConditionalGeneration",
}


def check_architecture(config: Settings) -> str:
    """Return the architecture of a `config.json`, if it can be converted and predicts text.

    Raises QuantkitError otherwise: before anything large is downloaded.
    """
    name = architecture_of(config)
    if name is None:
        raise QuantkitError(
            "The model's config.json names no architecture.",
            "Give a transformers checkpoint of a language model.",
        )
    known = tables().text
    if name not in known:
        raise unsupported(name)
    if known[name] in NOT_CAUSAL:
        raise QuantkitError(
            f"{name} is not a causal language model: it does not predict the next token.",
            "Choose a text-generating model; for this one use llama.cpp's converter directly.",
        )
    if known[name] in BEYOND_REACH:
        raise QuantkitError(
            f"{name} is not supported: {BEYOND_REACH[known[name]]}.",
            "Choose another model (Gemma 3 and Gemma 4 are supported); llama.cpp's own tools"
            " quantize this one.",
        )
    return name


def unsupported(name: str) -> QuantkitError:
    """Return the error for an architecture that the converter does not have."""
    return QuantkitError(
        f"llama.cpp's converter does not know the architecture {name}.",
        "Choose a model of a known family, or try a newer llama.cpp through QUANTKIT_CONVERTER.",
    )
