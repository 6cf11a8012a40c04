"""Publish a folder to the Hub: all of it in one commit, or nothing; a second time changes nothing.

`HfApi.upload_folder` is not used. With hf_xet it commits in parts every few minutes and repeats a
commit whose answer was lost, which leaves a half-filled repository or the same commit twice. Here
large files go first, one by one (an upload that was cut short is taken up again), then a single
`create_commit` on top of the commit that was looked at. When its answer is lost, the repository is
looked at again before anything is sent.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.hf_api import RepoFile as RemoteFile
from huggingface_hub.utils import disable_progress_bars

from quantkit.errors import NeedsToken, QuantkitError, UsageError
from quantkit.files import PARTIAL, sha256_file
from quantkit.hub.client import PATIENT, Asked, call, hf_api
from quantkit.hub.errors import ModelNotFound
from quantkit.hub.reference import parse_reference
from quantkit.sandbox.untrusted import Settings

logger = logging.getLogger(__name__)

_NEED_TOKEN = NeedsToken(
    "Publishing needs a token.", "It needs the permission to write to the repository."
)


@dataclass(frozen=True)
class PublishedFile:
    """A file as it is now on the Hub."""

    path: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class PublishedRepo:
    """Where a run was published."""

    repo_id: str
    url: str
    sha: str  # the commit that holds the files
    files: tuple[PublishedFile, ...]
    changed: tuple[str, ...]  # paths this call wrote; empty when all was there already
    private: bool  # whether the repository is


def check_write(repo_id: str, token: str | None, private: bool = False) -> str:
    """Return the full id of a repository that `token` may write to or create. Creates nothing, so
    that a run that fails later leaves no empty repository behind.

    `repo_id` may be a bare name: then it is the account's own. Raises QuantkitError when there is
    no token, it may not write, the namespace is someone else's, or a public repository of that
    name exists and `private` was asked for.
    """
    full_id = check_account(repo_id, token)
    api, asked = hf_api(token), Asked(full_id, writing=True)
    try:
        remote = call(lambda: api.model_info(full_id), asked, token)
    except ModelNotFound:
        return full_id  # created when there is something to put in it
    _check_privacy(full_id, private, bool(remote.private))
    call(lambda: api.auth_check(full_id, write=True), asked, token)
    return full_id


def check_account(repo_id: str, token: str | None) -> str:
    """Return the full id of a repository in a namespace that `token` may write to. Raises
    QuantkitError.
    """
    if token is None:
        raise _NEED_TOKEN
    api = hf_api(token)
    account = call(lambda: api.whoami(token=token), Asked(writing=True), token)
    full_id = _full_id(repo_id, str(account["name"]))
    namespace = full_id.split("/")[0]
    orgs = {org["name"] for org in account.get("orgs", []) if org.get("roleInOrg") != "read"}
    if namespace not in {account["name"], *orgs}:
        raise QuantkitError(
            f"The token belongs to {account['name']}, who cannot publish under {namespace}.",
            f"Publish to {account['name']}/{full_id.split('/')[1]}, or use another token.",
        )
    if not _token_writes(Settings(account).section("auth"), full_id):
        raise QuantkitError(
            f"This token is read-only, and cannot publish to {full_id}.",
            "Make a token with write permission for it on the Hub's settings page.",
        )
    return full_id


def is_open(repo_id: str) -> bool:
    """Return whether everyone may read a model: asked without a token."""
    api = hf_api(None)
    try:
        remote = call(lambda: api.model_info(repo_id), Asked(repo_id), None, PATIENT)
    except ModelNotFound:
        return False
    return not (remote.private or remote.gated or remote.disabled)


def _full_id(repo_id: str, account: str) -> str:
    """Raises UsageError when this is not a repository's id."""
    ref = parse_reference(repo_id, allow_local=False)
    if not ref.is_on_hub or ref.revision is not None:
        raise UsageError(f"{repo_id} is not a repository to publish to.", "Write owner/name.")
    return ref.id if "/" in ref.id else f"{account}/{ref.id}"


def _token_writes(auth: Settings, repo_id: str) -> bool:
    """What whoami says of the token. Unknown kinds of token pass: the Hub has the last word."""
    token = auth.section("accessToken")
    if token.get("role") == "read":
        return False
    scopes = token.section("fineGrained").get("scoped")
    if token.get("role") != "fineGrained" or not isinstance(scopes, list):
        return True
    mine = (repo_id, repo_id.split("/")[0])
    return any(
        "repo.write" in scope.texts("permissions") and scope.section("entity").get("name") in mine
        for scope in map(Settings, scopes)
    )


def _check_privacy(repo_id: str, wanted_private: bool, is_private: bool) -> None:
    if wanted_private and not is_private:
        raise QuantkitError(
            f"{repo_id} is public, but a private repository was asked for.",
            "Choose another name, make it private on the Hub first, or use --public.",
        )


def publish(
    folder: Path,
    repo_id: str,
    token: str | None,
    private: bool = False,
    message: str = "Upload with quantkit",
    progress: Callable[[int, int], None] | None = None,
    known: Mapping[str, str] | None = None,
) -> PublishedRepo:
    """Put the files of `folder` into the model repository `repo_id`, which is created if missing.

    Files that others put there stay. Files that are there already with the same bytes are not
    sent, and when none differs no commit is made. `progress` gets the bytes that are there; `known`
    are the sha256 of files as they were made: others are not published.
    Raises QuantkitError; then calling again continues where it stopped.
    """
    if token is None:
        raise _NEED_TOKEN
    files = _local_files(folder)
    for file in files:
        if (known or {}).get(file.path, file.sha256) != file.sha256:
            raise _changed(file.path)
    api = hf_api(token)
    if "/" not in repo_id:
        repo_id = check_write(repo_id, token, private)
    asked = Asked(repo_id, writing=True)
    call(lambda: api.create_repo(repo_id, private=private, exist_ok=True), asked, token, PATIENT)
    remote = call(lambda: api.model_info(repo_id), asked, token, PATIENT)
    repo_id, asked = remote.id, Asked(remote.id, writing=True)
    is_private = bool(remote.private)
    _check_privacy(repo_id, private, is_private)
    upload = _Upload(api, asked, token, folder, files, message, progress)
    with disable_progress_bars():  # they would write over the run's own lines
        sha = call(upload.push, asked, token, PATIENT)
        left = upload.differing(sha)
    if left:
        raise QuantkitError(
            f"{left[0].path} in {repo_id} is not the file that was uploaded.",
            "Publish again; if it happens again, something else writes to this repository.",
        )
    changed = tuple(sorted(upload.changed))
    return PublishedRepo(repo_id, asked.url, sha, tuple(files), changed, is_private)


def _changed(name: str) -> QuantkitError:
    return QuantkitError(
        f"{name} is not the file that was made and measured: its bytes have changed.",
        "Check the disk, and resume: the file is made again. Nothing was published.",
    )


def _local_files(folder: Path) -> list[PublishedFile]:
    """What is to be published: every file but hidden and unfinished ones. Raises QuantkitError."""
    files = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and not path.name.endswith(PARTIAL):
            files.append(PublishedFile(name.as_posix(), path.stat().st_size, sha256_file(path)))
    if not files:
        raise QuantkitError(f"There is nothing to publish in {folder}.", "Finish a run first.")
    return files


def _position(path: Path) -> int:
    """How far this process has read an open file; 0 where it has none open.

    Neither of huggingface_hub's two ways to upload says how far it is. Both read the file through a
    descriptor of this process, and no faster than they send it.
    """
    best = 0
    with suppress(OSError):
        target = path.stat()
        for name in os.listdir("/dev/fd"):
            with suppress(OSError):  # closed in the meantime
                if os.path.samestat(os.fstat(int(name)), target):
                    best = max(best, os.lseek(int(name), 0, os.SEEK_CUR))
    return best


def is_same(file: PublishedFile, remote: RemoteFile, path: Path) -> bool:
    """Compare by content: sha256 for large (LFS) files, git's own hash for small ones."""
    if remote.size != file.n_bytes:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == file.sha256
    blob = hashlib.sha1(b"blob %d\0" % file.n_bytes)
    blob.update(path.read_bytes())  # the Hub stores no more than some MB outside LFS
    return remote.blob_id == blob.hexdigest()


class _Upload:
    """One call of `publish`. Every request has a budget of tries of its own, so that a long upload
    on a bad line ends only when one request fails again and again.
    """

    def __init__(
        self,
        api: HfApi,
        asked: Asked,
        token: str,
        folder: Path,
        files: Sequence[PublishedFile],
        message: str,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._api = api
        self._repo_id = asked.repo_id
        self._step = partial(call, asked=asked, token=token, waits=PATIENT)
        self._folder = folder
        self._files = files
        self._message = message
        self._progress = progress
        self.changed: set[str] = set()

    def push(self) -> str:
        """Look, upload what differs, commit. Returns the commit that has all files.

        Safe to repeat after any failure: it starts by looking at what is there.
        """
        head = str(self._step(lambda: self._api.model_info(self._repo_id)).sha)
        todo = self.differing(head)
        self.changed.update(file.path for file in todo)
        n_left = sum(file.n_bytes for file in todo)
        self._report(n_left)
        if not todo:
            return head
        operations = []
        for file in sorted(todo, key=lambda file: file.n_bytes):  # the card before the long wait
            operations.append(self._preupload(file, n_left))
            n_left -= file.n_bytes
            if n_left:
                self._report(n_left)
        commit = self._api.create_commit(
            self._repo_id, operations, commit_message=self._message, parent_commit=head
        )
        self._report(0)
        return commit.oid

    def _preupload(self, file: PublishedFile, n_left: int) -> CommitOperationAdd:
        """Send the content of a large file; small ones travel with the commit."""
        operation = CommitOperationAdd(file.path, str(self._folder / file.path))
        operation.upload_info.sha256 = bytes.fromhex(file.sha256)  # known: not hashed again
        path = self._folder / file.path
        send = partial(self._api.preupload_lfs_files, self._repo_id, [operation], free_memory=False)
        try:
            with self._watching(path, n_left):
                self._step(send)
        finally:  # read once more: nothing is committed whose bytes changed while they were sent
            if sha256_file(path) != file.sha256:
                raise _changed(file.path)
        return operation

    @contextmanager
    def _watching(self, path: Path, n_left: int) -> Iterator[None]:
        """Report every second how far the file at `path` was read for its upload."""
        done = threading.Event()

        def watch() -> None:
            best = 0
            while not done.wait(1.0):
                best = max(best, _position(path))
                self._report(n_left - best)

        thread = threading.Thread(target=watch, daemon=True)
        if self._progress is not None:
            thread.start()
        try:
            yield
        finally:
            done.set()
            if thread.ident is not None:
                thread.join()

    def differing(self, sha: str) -> list[PublishedFile]:
        """Return the local files that the commit `sha` lacks or has with other bytes."""
        paths = [file.path for file in self._files]
        found = self._step(lambda: self._api.get_paths_info(self._repo_id, paths, revision=sha))
        remote = {entry.path: entry for entry in found if isinstance(entry, RemoteFile)}
        return [
            file
            for file in self._files
            if file.path not in remote
            or not is_same(file, remote[file.path], self._folder / file.path)
        ]

    def _report(self, n_left: int) -> None:
        n_total = sum(file.n_bytes for file in self._files)
        if self._progress is not None:
            self._progress(n_total - n_left, n_total)
