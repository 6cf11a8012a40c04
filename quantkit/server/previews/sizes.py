"""Another size of a model that was planned before: answered from its plan, at once."""

from __future__ import annotations

from typing import Any

from quantkit.config import RunConfig
from quantkit.config.budgets import for_files, settle_budgets
from quantkit.errors import UsageError
from quantkit.llamacpp.contexts import ContextMemory
from quantkit.tensors import to_json


def context_bytes(plan: dict[str, Any], n_tokens: int) -> int:
    """Memory beside the file that llama.cpp takes for a context of so many tokens."""
    return ContextMemory(**plan["context"]).n_bytes(n_tokens)


def with_sizes(plan: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """The same plan for the sizes of `config`. Raises QuantkitError when no file of the levels has
    any of them.
    """
    sizes, stock = plan["sizes"], plan["stock"]

    def mix_bytes(label: str) -> int:
        if label not in stock:
            raise UsageError(
                f"llama.cpp has no mix {label} for this model.",
                "Use one of " + ", ".join(stock) + ".",
            )
        return int(stock[label])

    budgets, refused = settle_budgets(
        config,
        plan["model"]["n_parameters"],
        mix_bytes,
        lambda n: context_bytes(plan, n),
        sizes["smallest_bytes"],
        sizes["largest_bytes"],
    )
    asked = {"budgets": to_json(budgets), "refused": to_json(refused)}
    grown = for_files(plan["estimates"], max(1, len(budgets)))
    return {**plan, "sizes": {**sizes, **asked}, "estimates": grown}
