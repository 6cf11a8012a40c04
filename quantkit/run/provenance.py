"""Identify this quantkit: its version and the commit of its sources."""

from __future__ import annotations

import subprocess
from pathlib import Path

from quantkit import __version__

# Written into the wheel and onto a Space by spaces/deploy.py: neither is a clone.
COMMIT_FILE = Path("quantkit", "data", "commit.txt")
_ROOT = Path(__file__).resolve().parents[2]


def code_version(root: Path = _ROOT) -> str:
    """Return `0.1.0 (1a2b3c4d5e6f)`, with a plus after the commit if tracked files were changed, or
    only the version if the commit is not known.
    """
    commit = _commit(root)
    return f"{__version__} ({commit})" if commit else __version__


def _commit(root: Path) -> str:
    written = root / COMMIT_FILE
    if written.is_file():
        return written.read_text("ascii").strip()
    if not (root / ".git").exists():  # installed, or inside somebody else's clone
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=12"]
            + ["--dirty=+"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
