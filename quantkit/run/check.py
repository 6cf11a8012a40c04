"""One check of a run, as the report shows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One integrity check. `passed` None: it was not run, `about` says why."""

    name: str
    passed: bool | None
    about: str
