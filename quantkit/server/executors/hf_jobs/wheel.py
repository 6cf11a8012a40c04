"""The wheel of this very code that a Job installs: `spaces/deploy.py` ships it next to app.py."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from quantkit.errors import QuantkitError
from quantkit.hub import endpoint
from quantkit.hub.client import is_public

_FOLDER = Path(__file__).resolve().parents[4]

_NAME = "quantkit-gguf"  # of the distribution


_NO_WHEEL = (
    "Jobs cannot be started: this server has no wheel that they could install.",
    "Duplicate a Space that has one, or deploy with spaces/deploy.py.",
)
_PRIVATE = (
    "This Space is private: Jobs cannot fetch their wheel.",
    "Make it public in its settings, and restart it.",
)


def lacks(
    environment: Mapping[str, str] | None = None, folder: Path = _FOLDER
) -> tuple[str, str] | None:
    """Return what this server lacks for Jobs to install its wheel, and what to do about it."""
    environment = os.environ if environment is None else environment
    if environment.get("QUANTKIT_WHEEL"):
        return None
    address = _address(environment, folder)
    if address is None:
        return _NO_WHEEL
    return None if _is_public(address) else _PRIVATE


@cache
def _is_public(address: str) -> bool:
    """Whether a Job, which has no token for it, gets the wheel. Asked once: when a Space becomes
    private or public, it starts anew.
    """
    return is_public(address)


def job_requirement(environment: Mapping[str, str] | None = None, folder: Path = _FOLDER) -> str:
    """Return what a Job installs, pinned by its hash. QUANTKIT_WHEEL is an address that replaces
    it.

    Raises QuantkitError where there is no wheel.
    """
    environment = os.environ if environment is None else environment
    if environment.get("QUANTKIT_WHEEL"):
        return f"{_NAME} @ {environment['QUANTKIT_WHEEL']}"
    wheel, address = _wheel(folder), _address(environment, folder)
    if wheel is None or address is None:
        raise QuantkitError(*_NO_WHEEL)
    return f"{_NAME} @ {address}#sha256={hashlib.sha256(wheel.read_bytes()).hexdigest()}"


def _address(environment: Mapping[str, str], folder: Path) -> str | None:
    """Where the Space that this is has its wheel; None where it has none."""
    wheel, space = _wheel(folder), environment.get("SPACE_ID")
    return f"{endpoint()}/spaces/{space}/resolve/main/{wheel.name}" if wheel and space else None


def _wheel(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob(f"{_NAME.replace('-', '_')}-*.whl"))), None)
