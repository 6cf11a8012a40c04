"""A run's config as a filled-in form, so that it can be changed and started again."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from quantkit.config import RunConfig
from quantkit.config.calibration import AUTO
from quantkit.config.devices import DEVICES
from quantkit.config.targets import DEFAULT_TARGET, BitsPerWeight, FileSize, FitsMemory, LikeMix
from quantkit.server.executors.protocol import Order
from quantkit.server.executors.registry import HERE, LOCAL
from quantkit.server.runs.request import RunForm

_NOT_IN_THE_FORM = (
    *("levels_from", "max_types", "tuning", "tensors", "eval_text", "tasks"),
    *("split_bytes", "collection"),
)


@dataclass(frozen=True)
class Again:
    """The form that would start a run once more, and the options that it has no field for. Where
    the run was to be published is not filled in: what lies there would be replaced unasked.
    """

    form: RunForm
    left_out: tuple[str, ...]
    published_to: str | None = None


def form_of(config: RunConfig, order: Order) -> Again:
    """Return the form of a run that was started as `order` says. The device of a machine elsewhere
    says nothing about this one: there it is empty.
    """
    plain = RunConfig(config.model)
    left_out = [n for n in _NOT_IN_THE_FORM if getattr(config, n) != getattr(plain, n)]
    size, fits = _size(config)
    named = [r for r in re.split(r"(?<!\\),", config.calibration) if "/" not in r]
    if len(named) < len(re.split(r"(?<!\\),", config.calibration)):
        left_out.append("the text of your own, which has to be chosen again")
    is_here = order.executor == LOCAL.name
    form = RunForm(
        model=config.model,
        **size,
        profile=config.profile,
        revision=config.revision or "",
        levels=config.levels or (),
        prefer=config.prefer,
        equalize=config.equalize,
        methods=config.methods,
        calibration=",".join(named) or AUTO,
        types=json.dumps(dict(config.types)) if config.types else "",
        seed=config.seed,
        device=config.device if is_here else "",
        compare=", ".join(n.removeprefix("hf://") for n in config.compare if "hf://" in n),
        visibility="private" if config.private else "public" if config.public else "model",
        machine=HERE if is_here else f"{order.executor}:{order.machine}",
    )
    left_out += [] if fits else ["some of its sizes"]
    return Again(form, tuple(left_out), config.publish)


def _size(config: RunConfig) -> tuple[dict[str, Any], bool]:
    """The fields of the size, and whether they say all of it."""
    targets = config.targets or (DEFAULT_TARGET,)
    first = targets[0]
    alike = [target for target in targets if type(target) is type(first)]
    whole = len(alike) == len(targets)
    if isinstance(first, LikeMix) and len(alike) > 1:
        return {"size_kind": "family", "family": tuple(t.value for t in alike)}, whole
    if isinstance(first, LikeMix):
        return {"size_kind": "like", "like": first.value}, whole
    if isinstance(first, FileSize):
        return {"size_kind": "size", "size": first.value}, len(targets) == 1
    if isinstance(first, BitsPerWeight):
        return {"size_kind": "bpw", "bpw": float(first.value)}, len(targets) == 1
    assert isinstance(first, FitsMemory)
    context = first.n_context
    same = [t.value.partition("@")[0] for t in alike if t.n_context == context]
    others = [name for name in same if name not in DEVICES]
    found = {
        "size_kind": "fits",
        "devices": tuple(name for name in same if name in DEVICES),
        "memory": others[0] if others else "",
        "context": context,
    }
    return found, len(same) == len(targets) and len(others) < 2
