"""HellaSwag (Zellers et al. 2019), validation split, zero-shot.

The clean-up is lm-evaluation-harness's, letter by letter: `[title]` marks become sentence ends,
other bracketed marks of the WikiHow part go, and one pass halves double spaces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from evaluators.tasks.items import Item, shared_context


def clean(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def item(row: Mapping[str, Any]) -> Item:
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    return shared_context(
        clean(f"{row['activity_label']}: {context}"),
        [clean(ending) for ending in row["endings"]],
        int(row["label"]),
    )
