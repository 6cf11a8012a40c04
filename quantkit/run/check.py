"""One check of a run, as the report shows it."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.run.folder import RunDir, read_json


@dataclass(frozen=True)
class Check:
    """One integrity check. `passed` None: it was not run, `about` says why."""

    name: str
    passed: bool | None
    about: str


def load_checks(directory: RunDir) -> list[Check]:
    """Return what a finished convert stage found of `base.gguf`."""
    return [Check(**c) for c in read_json(directory.artifacts.checks)["checks"]]
