"""Refuse numbers in config.json that no model has, by name, before anything is built from them.

Whether they are this model's is decided by transformers' own loader (`quantkit.sources.fit`), from
the shapes in the headers; here only what would take memory or time to find out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from quantkit.checkpoint.safetensors import StoredTensor
from quantkit.checkpoint.weight_files import shown
from quantkit.errors import QuantkitError

# Of these every one counts or measures something, in every architecture that has it.
_SIZES = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers n_layer n_layers num_layers n_embd"
    " n_head num_attention_heads num_key_value_heads head_dim num_experts num_local_experts"
    " n_routed_experts num_experts_per_tok moe_intermediate_size max_position_embeddings"
    " n_positions n_ctx".split()
)
_COUNT = re.compile(r"(^|_)(layers?|blocks?|experts?|heads?|depths?|groups|stages?)($|_)")
_SIZE = re.compile(r"(^|_)(size|dim|dims|embd|rank|channels|width|inner|features|state)($|_)")
_POSITIONS = re.compile(r"position|ctx|length|window|token|_id$|stride|chunk")
_MOST_COUNTED = 20_000  # layers, experts or heads, where the headers show fewer
_LONGEST = 1_000_000  # rows or columns, where the headers show fewer
_MOST_POSITIONS = 2**40
_DEEPEST = 16


def check_numbers(
    model: str, config: Mapping[str, object], tensors: Iterable[StoredTensor]
) -> None:
    """Raise QuantkitError for a size in config.json that is no number, negative, or far beyond
    anything that the headers show.
    """
    tensors = list(tensors)
    longest = max((n for t in tensors for n in t.shape), default=0)
    numbers = {int(n) for t in tensors for n in re.findall(r"\.(\d{1,6})(?=\.)", t.name)}
    most = {  # a size for each layer is a size
        _SIZE: max(_LONGEST, 4 * longest),
        _COUNT: max(_MOST_COUNTED, 2 * max(numbers, default=0), 2 * longest),
    }
    for where, key, value in _settings(config):
        name = shown(f"{where}{key}")
        if key in _SIZES and not _is_size(value):
            raise QuantkitError(
                f"config.json of {model} says {name} is {shown(repr(value))}, which is not a size.",
                "Correct it in a local copy, or use another revision.",
            )
        bound = next((n for pattern, n in most.items() if pattern.search(key)), None)
        if _POSITIONS.search(key) or (bound is None and key in _SIZES):
            bound = _MOST_POSITIONS
        for number in value if isinstance(value, list) else (value,):
            is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
            if bound is not None and is_number and not abs(number) <= bound:
                if number in (float("inf"), float("-inf")) and key not in _SIZES:
                    continue  # a limit that is none, as Mamba's time steps have
                raise QuantkitError(
                    f"config.json of {model} says {name} is {shown(f'{number:,}')}; its largest"
                    f" weight has {longest:,} rows or columns.",
                    "Correct it in a local copy, or use another revision.",
                )


def _is_size(value: Any) -> bool:
    if isinstance(value, list):  # one for each layer
        return all(_is_size(item) and not isinstance(item, list) for item in value)
    return value is None or (type(value) is int and value >= 0)


def _settings(
    config: Mapping[str, object], where: str = "", depth: int = 0
) -> Iterator[tuple[str, str, Any]]:
    """Every setting of the config and of those inside it."""
    if depth > _DEEPEST:
        raise QuantkitError(
            f"config.json nests settings more than {_DEEPEST} levels deep.",
            "No known model has such a file; check where it came from.",
        )
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{where}{key}.", depth + 1)
        else:
            yield where, key, value
