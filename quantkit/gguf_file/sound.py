"""Check that llama.cpp can run a GGUF that somebody else made.

What is known to end its process is refused with a sentence that says why. What slips through ends a
process, too, and that one alone (`quantkit.llamacpp.place`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from quantkit.errors import QuantkitError
from quantkit.gguf_file.fields import Field
from quantkit.gguf_file.header import shown
from quantkit.gguf_file.read import GgufFile

_MOST_EXPERTS = 65_536
_BLOCK = re.compile(r"blk\.(\d{1,9})\.")
_WHOLE = (
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_used_count",
    "nextn_predict_layers",
)
_EMBEDDING = "token_embd.weight"


def check_sound(file: GgufFile) -> None:
    """Raise QuantkitError for a file whose tensors and settings do not belong together."""
    for wrong in _wrong(file):
        raise QuantkitError(
            f"{shown(file.path.name)} is broken: {wrong}.", "Download or make it again."
        )


def _wrong(file: GgufFile) -> Iterator[str]:
    """What is wrong, as clauses."""
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        yield "it does not say of which architecture it is"
    for tensor in file.tensors.values():
        if len(tensor.shape) == 1 and tensor.qtype.is_quantized:
            yield f"{shown(tensor.name)} is a vector and stored as {tensor.qtype}"
    settings = {
        name.removeprefix(f"{architecture}."): field
        for name, field in file.fields.items()
        if name.startswith(f"{architecture}.")
    }
    for name, field in settings.items():
        if isinstance(field.value, float) and not math.isfinite(field.value):
            yield f"{shown(name)} is {field.value}"
        if name.endswith("_epsilon") and isinstance(field.value, float) and field.value < 0:
            yield f"{shown(name)} is {field.value}"
    for name in _WHOLE:
        if name in settings and _number(settings, name) is None:
            yield f"its {name} is no whole number"
    yield from _wrong_counts(file, settings)
    yield from _wrong_tokens(file)


def _wrong_counts(file: GgufFile, settings: Mapping[str, Field]) -> Iterator[str]:
    found = [int(match[1]) for name in file.tensors if (match := _BLOCK.match(name))]
    n_blocks = _number(settings, "block_count")
    if n_blocks is not None:
        most = max(found, default=-1) + 1
        # A block may be empty; not more of them than there are tensors.
        if n_blocks < most or n_blocks > most + len(file.tensors) or n_blocks < 1:
            yield f"it says that it has {n_blocks:,} blocks, and has tensors of {most:,}"
    n_experts = _number(settings, "expert_count") or 0
    of_experts = any("exp" in name or "ffn_gate_inp" in name for name in file.tensors)
    # One expert is written by a Llama 4 without any.
    if n_experts > _MOST_EXPERTS or (n_experts > 1 and not of_experts):
        yield f"it says that it has {n_experts:,} experts, and has no tensors for them"
    width, embedding = _number(settings, "embedding_length"), file.tensors.get(_EMBEDDING)
    if width is not None and embedding is not None and embedding.shape[-1] != width:
        yield f"its embeddings are {embedding.shape[-1]:,} wide and not {width:,}"


def _wrong_tokens(file: GgufFile) -> Iterator[str]:
    tokens = file.fields.get("tokenizer.ggml.tokens")
    if tokens is None or tokens.item is None:
        return
    n = tokens.n_items
    none = 2**32 - 1  # what says that there is no such token
    for name, field in file.fields.items():
        if name.startswith("tokenizer.ggml.") and name.endswith("_token_id"):
            known = isinstance(field.value, int) and 0 <= field.value < n
            if not known and field.value != none:
                yield f"{shown(name)} is none of its {n:,} tokens"
    embedding = file.tensors.get(_EMBEDDING)
    if embedding is not None and embedding.shape[0] < n:
        yield f"it has {n:,} tokens and {embedding.shape[0]:,} embeddings"


def _number(fields: Mapping[str, Field], name: str) -> int | None:
    field = fields.get(name)
    value = None if field is None else field.value
    return value if isinstance(value, int) and not isinstance(value, bool) else None
