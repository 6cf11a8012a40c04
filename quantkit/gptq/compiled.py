"""Tell numba where to keep compiled code, and run it on all cores."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba

from quantkit.machine.home import home

__all__ = ["numba", "over_rows"]


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


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, "rows")


def over_rows(n_rows: int, tile: int, work: Callable[[int, int], None]) -> None:
    """Call `work` with the first row of every tile of `tile` rows, and the first of the next, on
    all cores. It must not call this itself: the threads would wait for each other.
    """
    starts = range(0, n_rows, tile)
    list(_pool().map(lambda first: work(first, min(first + tile, n_rows)), starts))
