"""The files that every sandboxed process has to read: the interpreter, its packages, ours."""

from __future__ import annotations

import os
import site
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
_OURS = ("quantkit", "evaluators")
_SYSTEM = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/nix/store",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/usr/share/zoneinfo",
    "/sys/devices/system",
)


@cache
def import_path() -> tuple[str, ...]:
    """Return where modules come from: this code, the standard library and installed packages.
    Neither the current folder nor PYTHONPATH is among them, and no .pth file is looked at again.
    """
    homes = [Path(sys.prefix), Path(sys.base_prefix), Path(sys.base_exec_prefix)]
    homes += [Path(text) for text in site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        homes.append(Path(site.getusersitepackages()))
    installed = [
        text
        for text in sys.path
        if text and os.path.exists(text) and any(Path(text).is_relative_to(x) for x in homes)
    ]
    return (str(ROOT), *dict.fromkeys(text for text in installed if text != str(ROOT)))


@cache
def always_readable() -> tuple[str, ...]:
    """Return the paths, as they are named and resolved."""
    libraries = [x for x in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if x]
    found = [*_SYSTEM, sys.prefix, sys.base_prefix, sys.base_exec_prefix, *libraries]
    found += import_path()[1:]
    found += [str(ROOT / name) for name in _OURS]
    found.append(os.path.realpath(sys.executable))
    return tuple(dict.fromkeys(x for text in found for x in (text, os.path.realpath(text))))
