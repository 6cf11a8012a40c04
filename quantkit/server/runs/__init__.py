"""Start runs and report their progress: the web app, a Space and the API are built on this.

Every run is `python -m quantkit resume FOLDER` in a process of its own, with its config written
before; everything known about it is read back from its folder. Nothing here imports torch,
transformers or llama_cpp.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from quantkit.errors import UsageError
from quantkit.server.executors.protocol import Order
from quantkit.server.runs.limits import PUBLIC_LIMITS, Limits
from quantkit.server.runs.progress import KlPoint, LogLine, StageView
from quantkit.server.runs.record import NoSuchRun
from quantkit.server.runs.request import RunForm, check_repo, to_config
from quantkit.server.runs.store import RunStore
from quantkit.server.runs.view import ResultFile, RunSummary, RunView

__all__ = [
    "RunForm",
    "RunStore",
    "RunSummary",
    "RunView",
    "KlPoint",
    "Limits",
    "LogLine",
    "NoSuchRun",
    "Order",
    "ResultFile",
    "StageView",
    "check_repo",
    "is_public",
    "open_store",
    "to_config",
]


def is_public(environment: Mapping[str, str] | None = None) -> bool:
    """Return whether strangers use this page: on a Space, or when QUANTKIT_PUBLIC=1 says so."""
    environment = os.environ if environment is None else environment
    return environment.get("SYSTEM") == "spaces" or environment.get("QUANTKIT_PUBLIC", "") == "1"


def open_store(environment: Mapping[str, str] | None = None) -> RunStore:
    """Open the store that the environment describes: QUANTKIT_RUNS, QUANTKIT_WORKERS.

    Raises UsageError for a number that is none.
    """
    environment = os.environ if environment is None else environment
    text = environment.get("QUANTKIT_WORKERS", "1")
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise UsageError(f"QUANTKIT_WORKERS={text} is not a number of runs.", "Use 1 to 64.")
    root = Path(environment.get("QUANTKIT_RUNS") or "runs").absolute()
    public = is_public(environment)
    limits = PUBLIC_LIMITS if public else Limits()
    return RunStore(root, dataclasses.replace(limits, workers=int(text)), public)
