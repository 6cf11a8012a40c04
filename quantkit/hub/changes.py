"""Find out what publishing would change in a repository, before anything is written."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.hf_api import RepoFile as RemoteFile

from quantkit.hub.client import Asked, call, hf_api, read_start
from quantkit.hub.errors import ModelNotFound
from quantkit.hub.upload import PublishedFile, check_write, is_same

NEW, CHANGED, SAME, KEPT = "new", "changed", "same", "kept"
_CARD = "README.md"
_MAX_CARD_BYTES = 200_000
_MAX_KEPT = 200
_MAX_LINES = 1000


@dataclass(frozen=True)
class Change:
    """A file and what happens to it. Kept files are others' and stay."""

    path: str
    n_bytes: int
    kind: str


@dataclass(frozen=True)
class RepoChanges:
    """The changes that a publish would make."""

    repo_id: str
    exists: bool
    private: bool
    changes: tuple[Change, ...]
    card_diff: tuple[str, ...]  # lines of a unified diff, empty for a new card

    @property
    def n_bytes(self) -> int:
        return sum(change.n_bytes for change in self.changes if change.kind in (NEW, CHANGED))


def compare(
    files: Sequence[PublishedFile],
    paths: Mapping[str, Path],
    repo_id: str,
    token: str | None,
    private: bool = False,
) -> RepoChanges:
    """Return what publishing `files` would change. Writes nothing.

    `paths` says where the files lie that are here: small ones are compared by their content.
    Raises QuantkitError when the token may not write there.
    """
    repo_id = check_write(repo_id, token, private)
    api, asked = hf_api(token), Asked(repo_id)
    try:
        remote = call(lambda: api.model_info(repo_id), asked, token)
    except ModelNotFound:
        new_files = tuple(Change(file.path, file.n_bytes, NEW) for file in files)
        return RepoChanges(repo_id, False, private, new_files, ())
    sha = str(remote.sha)
    names = [file.path for file in files]
    found = call(lambda: api.get_paths_info(repo_id, names, revision=sha), asked, token)
    there = {entry.path: entry for entry in found if isinstance(entry, RemoteFile)}
    changes = [
        Change(file.path, file.n_bytes, _kind(file, there.get(file.path), paths.get(file.path)))
        for file in files
    ]
    others = [s.rfilename for s in remote.siblings or [] if s.rfilename not in names]
    changes += [Change(name, 0, KEPT) for name in sorted(others)[:_MAX_KEPT]]
    old = new = ""
    if _CARD in there and _CARD in paths:
        old = read_start(repo_id, sha, _CARD, _MAX_CARD_BYTES, token).decode("utf-8", "replace")
        new = paths[_CARD].read_text("utf-8").replace("<owner>/<repo>", repo_id)
    # Comparing takes quadratic time, and somebody else may have written the card that is there.
    before, after = (text.splitlines()[:_MAX_LINES] for text in (old, new))
    lines = difflib.unified_diff(before, after, "now", "after", lineterm="")
    return RepoChanges(repo_id, True, bool(remote.private), tuple(changes), tuple(lines))


def _kind(file: PublishedFile, remote: RemoteFile | None, path: Path | None) -> str:
    if remote is None:
        return NEW
    if remote.lfs is None and path is None:
        return CHANGED
    return SAME if is_same(file, remote, path or Path(file.path)) else CHANGED


def add_to_collection(
    collection: str, repo_id: str, token: str | None, private: bool = False
) -> None:
    """Put a model into a collection; once is enough. `collection` is the last part of its URL, or
    the title of one of the model's owner, which is created, `private` or not, if there is none.
    Raises QuantkitError.
    """
    api = hf_api(token)
    asked = Asked(thing=f"the collection {collection}", writing=True)
    slug = collection
    if "/" not in slug:
        owner = repo_id.partition("/")[0]
        slug = call(
            lambda: (
                api.create_collection(
                    collection, namespace=owner, private=private, exists_ok=True
                ).slug
            ),
            asked,
            token,
        )
    call(lambda: api.add_collection_item(slug, repo_id, "model", exists_ok=True), asked, token)
