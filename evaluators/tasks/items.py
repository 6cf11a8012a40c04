"""A multiple-choice item, and a set of them with the metrics that apply."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from evaluators.errors import EvaluationError

MAX_CHOICES = 32


@dataclass(frozen=True)
class Item:
    """The model scores continuations[i] after contexts[i]; the contexts are equal but in
    WinoGrande. A continuation starts with its delimiter; `n_chars` are the characters of the choice
    itself, which acc_norm divides by.

    Raises EvaluationError when there is nothing to choose from, a continuation is empty, or the
    gold answer is none of them.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    n_chars: tuple[int, ...]
    gold: int

    def __post_init__(self) -> None:
        n = len(self.continuations)
        if not 2 <= n <= MAX_CHOICES:
            raise EvaluationError(
                f"It has {n} choices.", f"An item needs 2 to {MAX_CHOICES} of them."
            )
        for i, continuation in enumerate(self.continuations):
            if not continuation.strip():
                raise EvaluationError(
                    f"Choice {i} is empty.", "An empty choice has no probability: remove the item."
                )
        if not 0 <= self.gold < n:
            raise EvaluationError(
                f"The gold answer {self.gold} is not one of the {n} choices.",
                "Count the choices from 0.",
            )

    def digest(self) -> str:
        """Hash of what the model sees; equal items share their scores."""
        value = json.dumps([self.contexts, self.continuations])
        return hashlib.sha256(value.encode()).hexdigest()[:16]


def shared_context(context: str, choices: list[str], gold: int) -> Item:
    """Return an item in lm-evaluation-harness's usual form: one context, choices after one
    space.
    """
    return Item(
        contexts=(context,) * len(choices),
        continuations=tuple(f" {choice}" for choice in choices),
        n_chars=tuple(len(choice) for choice in choices),
        gold=gold,
    )


@dataclass(frozen=True)
class TaskItems:
    """The items of one task. `metrics` is ("acc", "acc_norm") or ("acc",)."""

    name: str
    items: tuple[Item, ...]
    metrics: tuple[str, ...]
    source: str

    def sha256(self) -> str:
        """Hash of all items with their gold answers, in order."""
        value = json.dumps([[item.digest(), item.n_chars, item.gold] for item in self.items])
        return hashlib.sha256(value.encode()).hexdigest()
