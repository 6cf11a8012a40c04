"""The base class of stages, their input and their result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from quantkit.config import PROFILES, Profile, RunConfig
from quantkit.ranks.group import ALONE, Ranks
from quantkit.ranks.join import Task
from quantkit.run.artifacts import NAMES, Artifacts
from quantkit.run.events import EventLog
from quantkit.run.folder import RunDir, StageRecord


@dataclass(frozen=True)
class Run:
    """The input of a stage: the config, the run's folder, who listens to events, and the processes
    that share the work.
    """

    config: RunConfig
    dir: RunDir
    events: EventLog
    ranks: Ranks = ALONE

    @property
    def profile(self) -> Profile:
        return PROFILES[self.config.profile]

    @property
    def artifacts(self) -> Artifacts:
        return self.dir.artifacts

    @cached_property
    def records(self) -> dict[str, StageRecord]:
        """Records of the stages finished before this one."""
        return self.dir.records()


@dataclass(frozen=True)
class StageResult:
    """The result of a stage: finished files in its folder, and a few facts for status and
    report.
    """

    outputs: Sequence[Path]
    summary: object = field(default_factory=dict)  # a dataclass or a table


class Stage(ABC):
    """One of the nine. The first line of its docstring says on the page what it does. Stages are
    imported to look at them: heavy imports belong into `execute`.
    """

    name: ClassVar[str]
    version: ClassVar[int]  # goes up when the same inputs would give other outputs
    fields: ClassVar[tuple[str, ...]] = ()  # of RunConfig, that the result depends on
    takes_long: ClassVar[bool] = False  # so that a lack of memory is said before it begins

    @property
    def about(self) -> str:
        return (type(self).__doc__ or "").partition("\n")[0].rstrip(".")

    @abstractmethod
    def execute(self, run: Run) -> StageResult:
        """Do the work and return the finished files. Raise QuantkitError for what is refused; what
        was finished by then is taken up by the next attempt.
        """

    @property
    def tasks(self) -> Mapping[str, Task]:
        """Return what the other ranks do for this stage: functions of their `Ranks` and of the
        payload, by the name that `execute` gives `run.ranks.task`.
        """
        return {}

    def extra_inputs(self, config: RunConfig) -> dict[str, str]:
        """Return the hashes of the files that the config names, by what they are named for."""
        return {}

    def is_intermediate(self, path: str) -> bool:
        """Return whether `clean` may drop an output."""
        return False

    def last_reader(self, path: str) -> str:
        """Return the name of the last stage that reads an output."""
        return NAMES[-1]

    def is_current(self, config: RunConfig, record: StageRecord) -> bool:
        """Return False where a record of the same inputs is not enough."""
        return True
