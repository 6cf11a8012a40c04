"""What a context costs in memory when llama.cpp runs a model: the key-value cache and its buffers.

Counted from the GGUF's own metadata as llama.cpp does for a float16 cache without sliding windows
or compressed keys, which need less: a file that is said to fit does fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantkit.ggufio.read import GgufFile

_CACHE_BYTES = 2  # float16
_UBATCH = 512  # tokens that llama.cpp decodes at once
_RUNTIME_BYTES = 200_000_000  # the program, its libraries and what it allocates for bookkeeping


@dataclass(frozen=True)
class ContextMemory:
    """Bytes beside the file itself."""

    bytes_per_token: int  # of the key-value cache
    fixed_bytes: int  # logits and activations of one batch, the program
    trained_tokens: int | None  # the context that the model was trained for

    def n_bytes(self, n_tokens: int) -> int:
        return self.fixed_bytes + n_tokens * self.bytes_per_token


def context_memory(base: GgufFile) -> ContextMemory:
    """Of a GGUF, whose header is enough."""
    values = base.metadata
    arch = str(values.get("general.architecture", ""))

    def get(name: str, default: Any = None) -> Any:
        return values.get(f"{arch}.{name}", default)

    n_layers = int(get("block_count", 0))
    width = int(get("embedding_length", 0))
    n_heads = _most(get("attention.head_count", 1)) or 1
    key = int(get("attention.key_length", width // n_heads))
    value = int(get("attention.value_length", width // n_heads))
    heads = get("attention.head_count_kv", n_heads)
    kv_heads = list(heads) if isinstance(heads, (list, tuple)) else [int(heads)] * n_layers
    cache = sum(int(n) for n in kv_heads) * (key + value) * _CACHE_BYTES
    rows = [t.shape[0] for name, t in base.tensors.items() if name == "token_embd.weight"]
    feed_forward = _most(get("feed_forward_length", 4 * width))
    buffers = _UBATCH * 4 * ((rows[0] if rows else 0) + 4 * width + 2 * feed_forward)
    trained = get("context_length")
    return ContextMemory(cache, buffers + _RUNTIME_BYTES, int(trained) if trained else None)


def _most(value: Any) -> int:
    return int(max(value)) if isinstance(value, (list, tuple)) else int(value)
