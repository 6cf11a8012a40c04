"""WinoGrande (Sakaguchi et al. 2019), XL validation split, zero-shot, by partial evaluation.

The options fill the blank of the *context*, and the same rest of the sentence is scored after
either: so there is no length to normalize by, and the only metric is acc.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluators.tasks.items import Item


def item(row: Mapping[str, Any]) -> Item:
    sentence: str = row["sentence"]
    blank = sentence.index("_")
    rest = sentence[blank + 1 :].strip()
    options = (row["option1"], row["option2"])
    return Item(
        contexts=tuple(sentence[:blank] + option for option in options),
        continuations=(f" {rest}", f" {rest}"),
        n_chars=(len(rest), len(rest)),
        gold={"1": 0, "2": 1}[str(row["answer"])],
    )
