"""The folder of the user in which quantkit keeps what it sets up once."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def home() -> Path:
    """Return quantkit's folder for what it sets up once per user."""
    return Path(os.environ.get("QUANTKIT_HOME") or Path.home() / ".cache" / "quantkit")


@contextmanager
def locked(what: str) -> Iterator[None]:
    """Hold the lock of what is set up there: one process at a time sets it up."""
    home().mkdir(parents=True, exist_ok=True)
    with (home() / f"{what}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
