"""Open the texts that a run will read, before its work begins."""

from __future__ import annotations

from pathlib import Path

from quantkit.calibration import files
from quantkit.config import RunConfig
from quantkit.errors import QuantkitError


def look(config: RunConfig) -> list[str]:
    """Open every text of a run: sentences on what is worth knowing before the work.

    Raises QuantkitError for what a stage would refuse hours later.
    """
    said = files.look(config.calibration)
    if config.eval_text or config.tasks:
        _check(config.eval_text, config.tasks)
    return said


def _check(text: str | None, items: str | None) -> None:
    """Raises QuantkitError when validate could not measure on this text, or ask these questions."""
    from evaluators import choice_items
    from evaluators.errors import EvaluationError
    from evaluators.texts import read_text

    try:
        if text and not read_text(Path(text)).strip():
            raise QuantkitError(f"The text {text} is empty.", "Give another --eval-text.")
        if items:
            choice_items.load("choices", data=Path(items))
    except EvaluationError as error:
        raise QuantkitError(error.message, error.remedy) from None
