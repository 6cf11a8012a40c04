"""The budgets of a run and its finished files."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.config.budgets import Budget
from quantkit.run.folder import RunDir, read_as


@dataclass(frozen=True)
class Budgets:
    """What the search is after, smallest first, and what it may count on."""

    budgets: tuple[Budget, ...]
    refused: tuple[Budget, ...]
    expects_tuning: bool
    not_tuned: str  # why not, where that was asked for
    choices: str  # a hash of all that the numbers of choices stand for


def load_budgets(directory: RunDir) -> tuple[Budget, ...]:
    """Return the budgets of a run whose search stage is finished, smallest first."""
    return read_as(Budgets, directory.artifacts.budgets).budgets


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


@dataclass(frozen=True)
class Outputs:
    """The finished files by rising budget, and budgets that a smaller one's file serves as well:
    their `refusal` says how.
    """

    outputs: tuple[Output, ...]
    left_out: tuple[Budget, ...]


def load_outputs(directory: RunDir) -> Outputs:
    """Return what a run whose stitch stage is finished has made."""
    return read_as(Outputs, directory.artifacts.outputs)
