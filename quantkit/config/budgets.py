"""Turn the sizes that were asked for into bytes, and say why some cannot be reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quantkit.config import RunConfig
from quantkit.config.targets import DEFAULT_TARGET, Target
from quantkit.errors import QuantkitError


@dataclass(frozen=True)
class Budget:
    """A size that was asked for, in bytes of the whole file."""

    target: str
    limit_bytes: int
    refusal: str = ""  # why no file of the levels has it; empty when one has
    mix: str = ""  # the stock mix after which the file is called; empty: after what it holds


def settle_budgets(
    config: RunConfig,
    n_parameters: int,
    mix_bytes: Callable[[str], int],
    context_bytes: Callable[[int], int],
    smallest: int,
    largest: int,
    largest_made: int,
) -> tuple[tuple[Budget, ...], tuple[Budget, ...]]:
    """Return the budgets of a config by rising bytes, each once, and those that no file of
    `smallest` to `largest` bytes meets. Both are empty when all types are given and no size was
    asked for. `largest_made` are the bytes of the largest file that has no tensor as the original
    has it: a target that names what there is room for asks for no more.

    `mix_bytes` and `context_bytes` are as in `Target.limit_bytes`. Raises QuantkitError when there
    are budgets and none can be met.
    """
    found: dict[int, Budget] = {}
    refused = []
    for target in config.targets or _default_targets(config):
        limit = target.limit_bytes(n_parameters, mix_bytes, context_bytes)
        limit = target.within(limit, largest_made)
        refusal = _refusal(target, limit, smallest, largest)
        budget = Budget(str(target), limit, refusal, target.mix or "")
        if budget.refusal:
            refused.append(budget)
        else:
            found.setdefault(limit, budget)
    if refused and not found:
        raise QuantkitError(
            refused[0].refusal,
            f"Ask for {smallest:,} to {largest:,} bytes, or allow other types with --levels.",
        )
    return tuple(found[limit] for limit in sorted(found)), tuple(refused)


def _default_targets(config: RunConfig) -> tuple[Target, ...]:
    """Q4_K_M's size, or none where all types are given."""
    given = any(pattern == "default" for pattern, _ in config.types)
    return () if given else (DEFAULT_TARGET,)


def _refusal(target: Target, limit: int, smallest: int, largest: int) -> str:
    """Why no file, or every file, of the levels fits; empty when the budget is between them."""
    if limit > largest:
        return (
            f"The budget of {limit:,} bytes is above the largest file of these levels,"
            f" {largest:,} bytes."
        )
    if limit >= smallest:
        return ""
    return target.below(limit, smallest)
