"""The files that every sandboxed process has to read: the interpreter, its packages, ours."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from evaluators import sandbox

ROOT = Path(__file__).resolve().parent.parent.parent
_OURS = ("quantkit", "evaluators")


@cache
def import_path() -> tuple[str, ...]:
    """Return where modules come from: this code, the standard library and installed packages.
    Neither the current folder nor PYTHONPATH is among them, and no .pth file is looked at again.
    """
    return (str(ROOT), *(text for text in sandbox.import_path() if text != str(ROOT)))


@cache
def always_readable() -> tuple[str, ...]:
    """Return the paths, as they are named and resolved."""
    ours = [str(ROOT / name) for name in _OURS]
    found = [*sandbox.interpreter(), *ours, *map(os.path.realpath, ours)]
    return tuple(dict.fromkeys(found))
