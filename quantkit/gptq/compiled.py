"""Tell numba where to keep compiled code."""

from __future__ import annotations

import os
from typing import Any

import numba

from quantkit.machine.home import home

__all__ = ["numba"]


def _cache_dir() -> str:
    """Where compiled kernels are kept: with all that is set up once per user, for the code may lie
    where that user cannot write. Empty, numba's own choice, where that is so of the home, too.
    """
    folder = home()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return str(home() / "numba") if os.access(folder, os.W_OK) else ""


_config: Any = numba.config
_config.CACHE_DIR = _config.CACHE_DIR or _cache_dir()
