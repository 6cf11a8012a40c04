"""The nine stages, one module each: NAME, VERSION, FIELDS and `execute(run) -> StageResult`.

`VERSION` goes up when the same inputs would give other outputs; `FIELDS` are the fields of
RunConfig that the result depends on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StageResult:
    """What a stage made: finished files in its folder, and a few facts for status and report."""

    outputs: list[Path]
    summary: dict[str, Any] = field(default_factory=dict)
