"""Check the minimum protection that a public page needs before it converts models.

No token stands in an environment; the processes that hold one cannot be read; the kernel filters
the system calls of the converter; and a stranger's bytes reach no code that runs outside.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache

from evaluators.sandbox import set_not_dumpable
from quantkit import sandbox
from quantkit.errors import QuantkitError
from quantkit.sandbox import secrets
from quantkit.sandbox.places import ROOT, import_path

_PROBE = f"{__name__}:writable_code"
_CODE = (".py", ".pyc", ".so", ".pth")
_LIMITS = sandbox.Limits(cpu_seconds=60, wall_seconds=300)  # 100,000 files on a slow disk


def check_floor(environment: Mapping[str, str] | None = None) -> None:
    """Raise QuantkitError on a page for strangers that lacks any of it. Elsewhere, what is missing
    is said (quantkit.sandbox.Protection), because only the user's own models are at stake.
    """
    environment = os.environ if environment is None else environment
    if environment.get("SYSTEM") != "spaces" and environment.get("QUANTKIT_PUBLIC") != "1":
        return
    open_ones = sorted(n for n in secrets.HUB if environment.get(n))
    if open_ones:
        raise _refusal(
            f"{open_ones[0]} is in the environment of the process that converts models",
            "Start the page with `python app.py`, which takes it out.",
        )
    set_not_dumpable()
    lacking = _lacking()
    if lacking is not None:
        raise _refusal(*lacking)


def _refusal(what: str, remedy: str) -> QuantkitError:
    return QuantkitError(f"This page is public and cannot convert models: {what}.", remedy)


@cache
def _lacking() -> tuple[str, str] | None:
    """What this machine lacks and what to do; None when it has all."""
    if not sandbox.protection().seccomp:
        return (
            "the system does not filter system calls (seccomp)",
            "Use Linux on x86-64 or arm64, in a container that allows seccomp.",
        )
    # Whether the code is writable is judged from inside the sandbox, where a stranger's bytes are
    # read, by trying: on a Space without Docker the packages belong to the user that runs the app,
    # and the kernel (Landlock, mounts) is what keeps the sandbox from them. Where it has neither,
    # the rights of the files have to do it, as in the Docker Space.
    trees = [*import_path()[1:], f"{ROOT}/quantkit", f"{ROOT}/evaluators"]
    found = sandbox.call(
        _PROBE, {"trees": trees, "root": str(ROOT)}, limits=_LIMITS, shape=str | None
    )
    if found is not None:
        return (
            f"the process that reads models could change the code of the page ({found})",
            "Install code and packages as root and run the page as another user"
            " (spaces/Dockerfile), or use a kernel with Landlock.",
        )
    return None


def writable_code(trees: list[str], root: str) -> str | None:
    """Return a folder in which a file can be made, `root` or one below `trees`, or a file of code
    there that can be written to; None without any. Runs in the sandbox.
    """
    if _takes_files(root):
        return root
    seen: set[str] = set()
    for tree in trees:
        for folder, inner, names in os.walk(tree):
            inner[:] = [name for name in inner if os.path.join(folder, name) not in seen]
            seen.add(folder)
            if _takes_files(folder):
                return folder
            for name in names:
                path = os.path.join(folder, name)
                if name.endswith(_CODE) and os.access(path, os.W_OK) and _opens(path, 0):
                    return path
    return None


def _takes_files(folder: str) -> bool:
    path = os.path.join(folder, f"quantkit-probe-{os.getpid()}.tmp")
    if not os.access(folder, os.W_OK) or not _opens(path, os.O_CREAT | os.O_EXCL):
        return False
    os.unlink(path)
    return True


def _opens(path: str, flags: int) -> bool:
    """Whether it can be opened to be written to; nothing is written."""
    try:
        os.close(os.open(path, os.O_WRONLY | flags, 0o600))
    except OSError:
        return False
    return True
