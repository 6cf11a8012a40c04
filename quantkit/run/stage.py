"""What a stage is given and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from quantkit.config import PROFILES, Profile, RunConfig
from quantkit.run.events import EventLog
from quantkit.run.folder import RunDir, StageRecord


@dataclass(frozen=True)
class Run:
    """What a stage is given: what was asked, where it is written, and who listens."""

    config: RunConfig
    dir: RunDir
    events: EventLog

    @property
    def profile(self) -> Profile:
        return PROFILES[self.config.profile]

    @cached_property
    def records(self) -> dict[str, StageRecord]:
        """Records of the stages finished before this one."""
        return self.dir.records()


@dataclass(frozen=True)
class StageResult:
    """What a stage made: finished files in its folder, and a few facts for status and report."""

    outputs: list[Path]
    summary: dict[str, Any] = field(default_factory=dict)
