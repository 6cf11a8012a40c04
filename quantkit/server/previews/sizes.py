"""Answer another size of a model from its existing plan, at once."""

from __future__ import annotations

from dataclasses import replace

from quantkit.config import RunConfig
from quantkit.config.budgets import settle_budgets
from quantkit.config.levels import wanted
from quantkit.errors import UsageError
from quantkit.planning.disk import by_stage
from quantkit.planning.nouns import Plan
from quantkit.planning.spending import foretold


def with_sizes(plan: Plan, config: RunConfig) -> Plan:
    """Return the same plan for the sizes of `config`. Raises QuantkitError if no file of the levels
    has any of them.
    """
    sizes, stock = plan.sizes, plan.stock

    def mix_bytes(label: str) -> int:
        if label not in stock:
            raise UsageError(
                f"llama.cpp has no mix {label} for this model.",
                "Use one of " + ", ".join(stock) + ".",
            )
        return stock[label]

    budgets, refused = settle_budgets(
        config,
        plan.model.n_parameters,
        mix_bytes,
        plan.context.n_bytes,
        sizes.smallest_bytes,
        sizes.largest_bytes,
        sizes.largest_made_bytes,
    )
    sizes = replace(sizes, budgets=budgets, refused=refused)
    made = wanted(sizes.uniform, sizes.limits, config)
    disk = by_stage(plan.footprint, config, sizes.uniform, sizes.limits, stock.values())
    n_files, levels = max(1, len(budgets)), tuple(map(str, made))
    estimates = plan.estimates.for_files(n_files)
    limits = [budget.limit_bytes for budget in budgets]
    return replace(
        plan,
        sizes=sizes,
        levels=levels,
        left_out=tuple(str(level) for level in sizes.uniform if level not in made),
        estimates=replace(
            estimates, disk=disk, disk_bytes=plan.footprint.downloaded + max(disk.values())
        ),
        profiles={name: times.for_files(n_files) for name, times in plan.profiles.items()},
        unspent=foretold(plan.alike, sizes.smallest_bytes, levels, limits, config.max_types),
    )
