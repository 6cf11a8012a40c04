"""Look at a repository of finished files, and bring some of them: what `verify` reads."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from quantkit.checkpoint.info import RepoFile
from quantkit.hub.client import Asked, call, hf_api
from quantkit.hub.download import Progress, snapshot
from quantkit.hub.reference import ModelRef


@dataclass(frozen=True)
class Repository:
    """A model repository at one commit."""

    id: str
    sha: str
    files: tuple[RepoFile, ...]

    def file(self, path: str) -> RepoFile | None:
        return next((file for file in self.files if file.path == path), None)


def look(ref: ModelRef, token: str | None) -> Repository:
    """Return what a repository holds now. Raises QuantkitError when the Hub does not say."""
    remote = call(
        lambda: hf_api(token).model_info(ref.id, revision=ref.revision, files_metadata=True),
        Asked(ref.id, ref.revision),
        token,
    )
    files = [
        RepoFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None)
        for s in remote.siblings or []
    ]
    return Repository(remote.id, str(remote.sha), tuple(files))


def bring(
    repository: Repository,
    names: Collection[str],
    token: str | None,
    progress: Progress | None = None,
) -> Path:
    """Return the folder with these of its files, pinned to its commit; what the cache lacks is
    downloaded. Raises QuantkitError.
    """
    files = [file for file in repository.files if file.path in names]
    return snapshot(repository.id, repository.sha, files, token, progress)
