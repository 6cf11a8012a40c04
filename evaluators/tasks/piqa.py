"""PIQA (Bisk et al. 2020), validation split, zero-shot.

Rows with `goal`, `sol1`, `sol2` and `label`; the published archive keeps the labels in a file of
their own, one a line (`--labels`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluators.tasks.items import Item, shared_context


def item(row: Mapping[str, Any]) -> Item:
    return shared_context(
        f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"])
    )
