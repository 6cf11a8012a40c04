"""Take measures of a finished file: one that fails is left out, with its reason, and ends
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from quantkit.errors import QuantkitError
from quantkit.evidence.report.schema import Missing
from quantkit.evidence.report.text import without_folders
from quantkit.machine import faults

T = TypeVar("T")


class Measures:
    """Takes measures one by one; `missing` are those that could not be taken."""

    def __init__(self, note: Callable[[str], None] = lambda _: None) -> None:
        """`note` is told of every measure that could not be taken."""
        self._note = note
        self.missing: list[Missing] = []

    def take(self, name: str, measure: Callable[[], T]) -> T | None:
        """Return what `measure` returns; None where it fails, of whatever kind the failure is."""
        try:
            return measure()
        except Exception as error:
            reason = without_folders(reason_of(error))
            self.missing.append(Missing(name, reason))
            self._note(f"{name}: not measured: {reason}")
            return None


def reason_of(error: Exception) -> str:
    """Return why a measure could not be taken, as a sentence. What is to be done about it would be
    told of another command's options.
    """
    told = error if isinstance(error, QuantkitError) else faults.explain(error)
    if told is not None:
        return told.message
    said = getattr(error, "message", "") or str(error)  # the evaluators have errors of their own
    named = type(error).__name__ if not hasattr(error, "message") else ""
    return ": ".join(part for part in (named, said.strip()) if part)
