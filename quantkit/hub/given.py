"""A GGUF that the user names to be compared with: a local file, or `hf://owner/name/file.gguf`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from huggingface_hub.hf_api import RepoFile

from quantkit import hub
from quantkit.errors import QuantkitError, UsageError
from quantkit.gguf_file.parts import part_names, stem_of
from quantkit.hub.client import PATIENT, Asked, call, hf_api
from quantkit.hub.errors import ModelNotFound

_SCHEME = "hf://"


def check_name(name: str) -> None:
    """Raise UsageError when `name` cannot be a GGUF to compare with. Reads nothing."""
    if not name.endswith(".gguf"):
        raise UsageError(f"{name} is not a .gguf file.", _EXAMPLE)
    if name.startswith(_SCHEME):
        _parts(name)


def locate(name: str) -> Path:
    """Return the path of the file, of a model in parts that of the first; what is on the Hub is
    downloaded into the user's cache.

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
    first, *others = _files(file)

    def fetch(path: str, revision: str | None) -> Path:
        where = {"revision": revision, "cache_dir": hub.cache_dir()}
        ask = partial(hf_api(token).hf_hub_download, repo_id, path, **where)
        return Path(call(ask, Asked(repo_id, revision), token, PATIENT))

    path = fetch(first, revision)
    sha = path.parents[first.count("/")].name  # the same commit, though the branch may move
    for other in others:
        fetch(other, sha)
    return path


def _files(file: str) -> list[str]:
    """A file in a repository, or all parts of the model whose first part it is."""
    folder, slash, own = file.rpartition("/")
    return [f"{folder}{slash}{part}" for part in part_names(own)]


def check_there(names: Sequence[str], token: str | None) -> str | None:
    """Look for files on the Hub before a run that would miss them at its end. Downloads nothing.

    Returns None, or why the Hub could not be asked, as a sentence. Raises UsageError for a file, or
    a part of it, that is not there, ModelNotFound for such a repository.
    """
    for name in names:
        if not name.startswith(_SCHEME):
            continue
        repo_id, revision, file = _parts(name)
        wanted, asked = _files(file), Asked(repo_id, revision)
        ask = partial(hf_api(token).get_paths_info, repo_id, wanted, revision=revision)
        try:
            there = {entry.path for entry in call(ask, asked, token)}
        except ModelNotFound:
            raise
        except QuantkitError as error:
            return error.message
        if missing := [path for path in wanted if path not in there]:
            raise UsageError(f"{repo_id} has no file {missing[0]}.", _EXAMPLE)
    return None


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
    """Return the models of a repository and their bytes, those in parts by their first: no imatrix,
    no projector, no model that lacks a part. Raises QuantkitError.
    """
    api, asked = hf_api(token), Asked(repo_id)
    tree = call(lambda: list(api.list_repo_tree(repo_id, recursive=True)), asked, token)
    sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    found = {}
    for path in sizes:
        parts = _files(path)
        is_later = stem_of(path) is not None and len(parts) == 1
        is_model = path.lower().endswith(".gguf") and not _NO_MODEL.search(path.lower())
        if is_model and not is_later and sizes.keys() >= set(parts):
            found[path] = sum(sizes[part] for part in parts)
    return found


_NO_MODEL = re.compile(r"imatrix|mmproj")
_EXAMPLE = "Give a local .gguf, or hf://owner/name/file.gguf."


def _parts(name: str) -> tuple[str, str | None, str]:
    """Repository, revision and file of `hf://owner/name[@revision]/file.gguf`."""
    parts = name.removeprefix(_SCHEME).split("/", 2)
    if len(parts) < 3 or ".." in name:
        raise UsageError(f"{name} does not name a file in a repository.", _EXAMPLE)
    ref = hub.parse_reference(f"{parts[0]}/{parts[1]}", allow_local=False)
    return ref.id, ref.revision, parts[2]
