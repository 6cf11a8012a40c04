"""The budgets of a run and its finished files."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.config.budgets import Budget
from quantkit.run.folder import RunDir, read_json


def load_budgets(directory: RunDir) -> list[Budget]:
    """Return the budgets of a run whose search stage is finished, smallest first."""
    table = read_json(directory.artifacts.budgets)["budgets"]
    return [Budget(**row) for row in table]


@dataclass(frozen=True)
class Output:
    """One finished file: its name in the stage's folder, its label and its budget."""

    file: str
    n_bytes: int
    label: str
    budget: Budget

    @property
    def recipe(self) -> str:
        return f"recipes/{self.file.removesuffix('.gguf')}.json"


def load_outputs(directory: RunDir) -> list[Output]:
    """Return the files of a run whose stitch stage is finished, by rising budget."""
    table = read_json(directory.artifacts.outputs)["outputs"]
    return [Output(**{**row, "budget": Budget(**row["budget"])}) for row in table]
