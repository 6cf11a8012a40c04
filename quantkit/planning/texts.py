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
    if config.eval_text:
        check_text(Path(config.eval_text))
    if config.tasks:
        check_items(Path(config.tasks))
    return said


def check_text(path: Path) -> None:
    """Raise QuantkitError when validate could not measure on this text."""
    from evaluators.errors import EvaluationError
    from evaluators.texts import read_text

    try:
        text = read_text(path)
    except EvaluationError as error:
        raise QuantkitError(error.message, error.remedy) from None
    if not text.strip():
        raise QuantkitError(f"The text {path} is empty.", "Give another --eval-text.")


def check_items(path: Path) -> None:
    """Raise QuantkitError when validate could not ask these questions."""
    from evaluators import tasks
    from evaluators.errors import EvaluationError

    try:
        tasks.load("choices", data=path)
    except EvaluationError as error:
        raise QuantkitError(error.message, error.remedy) from None
