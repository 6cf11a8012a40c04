"""The size as people think of it: what fits a memory with a context, or a family of files.

Both need the planner's answer about the model, so a form becomes run configs here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from quantkit.config import RunConfig, Target, parse_bytes
from quantkit.errors import QuantkitError, UsageError
from quantkit.launch.request import FAMILIES, JobForm, to_config

Ask = Callable[[RunConfig], dict[str, Any]]

_MOST_CONTEXT = 4_000_000


def to_configs(form: JobForm, public: bool, ask: Ask) -> tuple[RunConfig, ...]:
    """The runs that the form asks for: one, or one for each size of a family.

    `ask` gives the plan of a config. Raises QuantkitError.
    """
    config = to_config(form, public)
    if form.size_kind == "fits":
        limit = fitting_bytes(form, ask(config))
        return (dataclasses.replace(config, target=Target("size", str(limit))),)
    if form.size_kind == "family":
        mixes = form.family or FAMILIES["everyday"]
        return tuple(dataclasses.replace(config, target=Target("like", str(mix))) for mix in mixes)
    return (config,)


def fitting_bytes(form: JobForm, plan: dict[str, Any]) -> int:
    """The largest file that leaves room for the context. Raises QuantkitError when none does."""
    memory, context = fits(form)
    needs = context_bytes(plan, context)
    limit = memory - needs
    smallest, largest = plan["sizes"]["smallest_bytes"], plan["sizes"]["largest_bytes"]
    if limit < smallest:
        raise QuantkitError(
            f"The model does not fit in {memory / 1e9:g} GB with a context of {context:,} tokens:"
            f" its smallest file has {smallest / 1e9:.2f} GB and the context takes"
            f" {needs / 1e9:.2f} GB.",
            "Use a shorter context, or choose a smaller model.",
        )
    return min(limit, largest)


def fits(form: JobForm) -> tuple[int, int]:
    """Bytes of memory and tokens of context that the form names. Raises UsageError."""
    if not form.memory:
        raise UsageError("No memory was given.", "Write how much there is, such as 8GB.")
    memory = parse_bytes(str(form.memory)[:30])
    tokens = form.context
    if isinstance(tokens, bool) or not isinstance(tokens, (int, float)) or tokens != int(tokens):
        raise UsageError("The context is not a number of tokens.", "Write one such as 8192.")
    if not 1 <= tokens <= _MOST_CONTEXT:
        raise UsageError(f"There is no context of {tokens:,} tokens.", "Write 8192 or so.")
    return memory, int(tokens)


def context_bytes(plan: dict[str, Any], n_tokens: int) -> int:
    """Memory beside the file that llama.cpp takes for a context of so many tokens."""
    context = plan["context"]
    return int(context["fixed_bytes"] + n_tokens * context["bytes_per_token"])


def with_limit(plan: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """The same plan for another size. Raises QuantkitError when no file of the levels has it."""
    if config.target is None:
        return plan
    sizes, stock = plan["sizes"], plan["stock"]
    target = config.target
    if target.kind == "like" and target.value not in stock:
        raise UsageError(
            f"llama.cpp has no mix {target.value} for this model.",
            "Use one of " + ", ".join(stock) + ".",
        )
    limit = target.limit_bytes(plan["model"]["n_parameters"], stock.__getitem__)
    if not sizes["smallest_bytes"] <= limit <= sizes["largest_bytes"]:
        raise QuantkitError(
            f"A file of {limit / 1e6:,.0f} MB cannot be made of these levels: they give"
            f" {sizes['smallest_bytes'] / 1e6:,.0f} to {sizes['largest_bytes'] / 1e6:,.0f} MB.",
            "Choose a size in between, or other levels.",
        )
    return {**plan, "sizes": {**sizes, "limit_bytes": limit}}
