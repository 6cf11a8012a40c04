"""ARC-Easy and ARC-Challenge (Clark et al. 2018), test split, zero-shot.

Rows as on the Hub (`question`, `choices.text`, `choices.label`, `answerKey`) or as in AI2's own
JSONL, where the question and its choices are nested (`question.stem`, `question.choices[]`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluators.tasks.items import Item, shared_context


def item(row: Mapping[str, Any]) -> Item:
    question = row["question"]
    if isinstance(question, str):
        texts, labels = row["choices"]["text"], row["choices"]["label"]
    else:
        texts = [choice["text"] for choice in question["choices"]]
        labels = [choice["label"] for choice in question["choices"]]
        question = question["stem"]
    gold = list(labels).index(row["answerKey"])
    return shared_context(f"Question: {question}\nAnswer:", list(texts), gold)
