"""A JSONL file of answers that a rerun need not ask for again.

A line counts for the very model file (sha256) and question that it was written for, for nothing
else: {"model": ..., "task": ..., "item": ..., and the answer under a name of its own}.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evaluators.errors import EvaluationError


class AnswerLog:
    """The answers of one model: `answers` by the item's hash. `field` is what a line calls them.

    Raises EvaluationError when the file holds something else.
    """

    def __init__(self, path: Path, model: str, field: str) -> None:
        self._path = path
        self._model = model
        self._field = field
        self.answers: dict[str, Any] = {}
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):  # a run was killed while it wrote
            with path.open("r+b") as file:
                file.truncate(whole)
        for line in data[:whole].splitlines():
            try:
                entry = json.loads(line)
                if entry["model"] == model and field in entry:
                    self.answers[entry["item"]] = entry[field]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise EvaluationError(
                    f"{path} holds something other than scored items.", "Choose another --out."
                ) from None

    def append(self, task: str, item: str, answer: Any) -> None:
        """Add an answer to the file and to `answers`."""
        self.answers[item] = answer
        entry = {"model": self._model, "task": task, "item": item, self._field: answer}
        with self._path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
