"""The wheel of this very code that a Job installs: `spaces/deploy.py` ships it next to app.py."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from quantkit.errors import QuantkitError
from quantkit.hub import endpoint

_FOLDER = Path(__file__).resolve().parents[4]

_NAME = "quantkit-gguf"  # of the distribution


def can_start_jobs(environment: Mapping[str, str] | None = None, folder: Path = _FOLDER) -> bool:
    """Return whether this server has a wheel that a Job can fetch."""
    environment = os.environ if environment is None else environment
    return bool(environment.get("QUANTKIT_WHEEL")) or (
        bool(environment.get("SPACE_ID")) and _wheel(folder) is not None
    )


def job_requirement(environment: Mapping[str, str] | None = None, folder: Path = _FOLDER) -> str:
    """Return what a Job installs, pinned by its hash. QUANTKIT_WHEEL is an address that replaces
    it.

    Raises QuantkitError where there is no wheel.
    """
    environment = os.environ if environment is None else environment
    if environment.get("QUANTKIT_WHEEL"):
        return f"{_NAME} @ {environment['QUANTKIT_WHEEL']}"
    wheel, space = _wheel(folder), environment.get("SPACE_ID")
    if wheel is None or not space:
        raise QuantkitError(
            "This server has no wheel that a Job could install.",
            "Deploy it with spaces/deploy.py, or set QUANTKIT_WHEEL to the wheel's address.",
        )
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return f"{_NAME} @ {endpoint()}/spaces/{space}/resolve/main/{wheel.name}#sha256={sha256}"


def _wheel(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob(f"{_NAME.replace('-', '_')}-*.whl"))), None)
