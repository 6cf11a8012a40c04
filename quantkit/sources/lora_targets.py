"""Find the modules that an adapter's settings name, and how strongly each is changed, as PEFT
does.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantkit import sandbox
from quantkit.errors import QuantkitError
from quantkit.sandbox import untrusted

if TYPE_CHECKING:  # what follows is done in a process that starts for it: few imports
    from quantkit.checkpoint.adapter import Adapter

ALL_LINEAR = "all-linear"  # every linear layer but the head

# Patterns of strangers that are more than a name may take exponential time: not in this process.
_NAME = re.compile(r"\^?[\w.\\-]+\$?")


@dataclasses.dataclass(frozen=True)
class Strength:
    """Whether a module is changed at all, and the alpha and the rank of its change."""

    is_target: bool
    alpha: float
    rank: int | None  # None: the settings do not say


def strengths(adapter: Adapter, modules: Sequence[str], head: str) -> dict[str, Strength]:
    """Return the strengths by module. Raises QuantkitError when the adapter's patterns take too
    long.
    """
    patterns = [*adapter.alphas, *adapter.ranks, *adapter.whole, *adapter.layer_names]
    for names in (adapter.targets, adapter.excluded):
        patterns += [names] if isinstance(names, str) else []
    if all(_NAME.fullmatch(pattern) for pattern in patterns):
        return _match(adapter, modules, head)
    limits = sandbox.Limits(cpu_seconds=3, wall_seconds=60, memory_bytes=2**30)
    told = {"adapter": dataclasses.asdict(adapter), "modules": list(modules), "head": head}
    try:
        found: dict[str, Strength] = sandbox.call(
            f"{__name__}:match", told, limits=limits, shape=dict[str, Strength]
        )
    except sandbox.Crashed as error:
        raise QuantkitError(
            f"The adapter's patterns of module names cannot be used: the process {error.reason}.",
            "Write simpler ones in adapter_config.json of a local copy, or merge it yourself.",
        ) from None
    return {name: found[name] for name in modules}


def match(adapter: Any, modules: Sequence[str], head: str) -> dict[str, dict[str, object]]:
    """Do the same with an Adapter as JSON, and answer in JSON. Runs in the sandbox."""
    from quantkit.checkpoint.adapter import Adapter

    found = _match(untrusted.build(Adapter, adapter), modules, head)
    return {name: vars(strength) for name, strength in found.items()}


def _match(adapter: Adapter, modules: Sequence[str], head: str) -> dict[str, Strength]:
    alphas, ranks = _by_pattern(adapter.alphas), _by_pattern(adapter.ranks)
    return {
        name: Strength(
            _is_target(adapter, name, head),
            _first(alphas, name, adapter.alpha),
            _first(ranks, name, adapter.rank),
        )
        for name in modules
    }


def _by_pattern(values: Mapping[str, float]) -> list[tuple[re.Pattern[str], float]]:
    return [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in values.items()]


def _first(values: Sequence[tuple[re.Pattern[str], Any]], name: str, otherwise: Any) -> Any:
    return next((value for pattern, value in values if pattern.match(name)), otherwise)


def _is_target(adapter: Adapter, name: str, head: str) -> bool:
    if _is_named(adapter.excluded, name):
        return False
    if any(re.match(rf"(^|.*\.){whole}($|\..*)", name) for whole in adapter.whole):
        return False
    targets = adapter.targets
    if targets is None:  # PEFT's own list of the architecture
        return True
    if targets == ALL_LINEAR:
        return name != head
    if not _is_named(targets, name):
        return False
    if isinstance(targets, str) or adapter.layers is None:
        return True
    index = _layer(name, adapter.layer_names)
    return index is not None and index in adapter.layers


def _is_named(names: str | Sequence[str], name: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in names)


def _layer(name: str, layer_names: Sequence[str]) -> int | None:
    """The number of the layer that a module is in."""
    patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in layer_names] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((m for p in patterns if (m := re.match(p, name))), None)
    return None if found is None else int(found[1])
