"""The commit in a report: of a clone, of a changed clone, of a wheel, of neither."""

from __future__ import annotations

import subprocess
from pathlib import Path

from quantkit import __version__
from quantkit.run.provenance import COMMIT_FILE, code_version


def git(folder: Path, *arguments: str) -> str:
    known = ["-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder)]
    return subprocess.run(
        ["git", *known, *arguments], check=True, capture_output=True, text=True
    ).stdout


def test_where_it_comes_from(tmp_path: Path) -> None:
    assert code_version(tmp_path) == __version__
    git(tmp_path, "init", "-q")
    assert code_version(tmp_path) == __version__, "a clone without a commit"
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "one")
    git(tmp_path, "tag", "-a", "v9", "-m", "a tag is not the commit")
    sha = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert code_version(tmp_path) == f"{__version__} ({sha})"
    (tmp_path / "a").write_text("2")
    assert code_version(tmp_path) == f"{__version__} ({sha}+)"
    (tmp_path / COMMIT_FILE).parent.mkdir(parents=True)
    (tmp_path / COMMIT_FILE).write_text("0123456789ab")
    assert code_version(tmp_path) == f"{__version__} (0123456789ab)"
