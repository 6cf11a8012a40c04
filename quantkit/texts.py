"""The texts that a run will read, opened before its work begins."""

from __future__ import annotations

from pathlib import Path

from quantkit.calibration import files
from quantkit.config import RunConfig
from quantkit.meter import check_items, check_text


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
