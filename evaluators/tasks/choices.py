"""Our own format for any multiple-choice task, a JSON object a line:

    {"context": "Question: Where does milk keep longest?\\nAnswer:",
     "choices": ["in the fridge", "on the radiator"], "gold": 0}

The context is used as it stands, and each choice is scored after it and one space.
`evaluators/data/everyday.jsonl` is such a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluators.tasks.items import Item, shared_context


def item(row: Mapping[str, Any]) -> Item:
    choices = row["choices"]
    if isinstance(choices, str) or not all(isinstance(choice, str) for choice in choices):
        raise TypeError("choices must be a list of strings")
    if not isinstance(row["context"], str):
        raise TypeError("context must be a string")
    return shared_context(row["context"], list(choices), int(row["gold"]))
