"""A GGUF that the user names to be compared with: a local file, or `hf://owner/name/file.gguf`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from huggingface_hub.hf_api import RepoFile

from quantkit import hub
from quantkit.errors import UsageError
from quantkit.hub.client import PATIENT, Asked, call, hf_api

_SCHEME = "hf://"


def check_name(name: str) -> None:
    """Raise UsageError when `name` cannot be a GGUF to compare with. Reads nothing."""
    if not name.endswith(".gguf"):
        raise UsageError(f"{name} is not a .gguf file.", _EXAMPLE)
    if name.startswith(_SCHEME):
        _parts(name)


def locate(name: str) -> Path:
    """Return the path of the file; one on the Hub is downloaded into the user's cache.

    Raises UsageError when it is not there, QuantkitError for whatever the Hub refuses.
    """
    check_name(name)
    if not name.startswith(_SCHEME):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UsageError(f"There is no file {name}.", "Check the path.")
        return path
    repo_id, revision, file = _parts(name)
    token = hub.resolve_token()
    where = {"revision": revision, "cache_dir": hub.cache_dir()}
    fetch = partial(hf_api(token).hf_hub_download, repo_id, file, **where)
    return Path(call(fetch, Asked(repo_id, revision), token, PATIENT))


def short_names(names: Sequence[str]) -> list[str]:
    """Return what files are called in tables: their own names, with the repository's or the
    folder's in front where two have the same. Most publishers name theirs alike.
    """
    own = [name.rsplit("/", 1)[-1] for name in names]
    found = []
    for name, last in zip(names, own, strict=True):
        folders = name.removeprefix(_SCHEME).split("/")[:-1]
        n = 2 if name.startswith(_SCHEME) else 1
        where = folders[:n] if name.startswith(_SCHEME) else folders[-n:]
        found.append("/".join([*where, last]) if own.count(last) > 1 else last)
    return found


def gguf_files(repo_id: str, token: str | None) -> dict[str, int]:
    """Return the models of a repository that are one GGUF each, and their bytes: no imatrix, no
    projector, no part of a larger one. Raises QuantkitError.
    """
    api, asked = hf_api(token), Asked(repo_id)
    tree = call(lambda: list(api.list_repo_tree(repo_id, recursive=True)), asked, token)
    return {
        entry.path: entry.size
        for entry in tree
        if isinstance(entry, RepoFile)
        and entry.path.lower().endswith(".gguf")
        and not _NO_MODEL.search(entry.path.lower())
    }


_NO_MODEL = re.compile(r"imatrix|mmproj|-\d{5}-of-\d{5}\.gguf$")
_EXAMPLE = "Give a local .gguf, or hf://owner/name/file.gguf."


def _parts(name: str) -> tuple[str, str | None, str]:
    """Repository, revision and file of `hf://owner/name[@revision]/file.gguf`."""
    parts = name.removeprefix(_SCHEME).split("/", 2)
    if len(parts) < 3 or ".." in name:
        raise UsageError(f"{name} does not name a file in a repository.", _EXAMPLE)
    ref = hub.parse_reference(f"{parts[0]}/{parts[1]}", allow_local=False)
    return ref.id, ref.revision, parts[2]
