"""The folder of the user in which quantkit keeps what it sets up once."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """Return quantkit's folder for what it sets up once per user."""
    return Path(os.environ.get("QUANTKIT_HOME") or Path.home() / ".cache" / "quantkit")
