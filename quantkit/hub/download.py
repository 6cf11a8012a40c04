"""Download a model's files, all of them."""

from __future__ import annotations

import glob
import io
import logging
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from tqdm.auto import tqdm

from quantkit.checkpoint.info import ModelInfo, RepoFile
from quantkit.errors import QuantkitError
from quantkit.hub.client import PATIENT, Asked, call, endpoint
from quantkit.sizes import size

Progress = Callable[[int, int], None]  # bytes done, bytes in all

logger = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Return the folder of huggingface_hub's cache, by the environment as it is now."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]).expanduser() / "hub"
    return Path(constants.HF_HUB_CACHE)


def check_disk(folder: Path, n_bytes: int, purpose: str = "the download") -> None:
    """Raise QuantkitError when the disk under `folder` has not `n_bytes` to spare."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    n_free = shutil.disk_usage(place).free
    if n_bytes > n_free:
        raise QuantkitError(
            f"Not enough disk space: {purpose} needs {size(n_bytes)} and {place} has "
            f"{size(n_free)} free.",
            "Free some space, or put HF_HOME and --out on a larger disk.",
        )


def download(info: ModelInfo, token: str | None, progress: Progress | None = None) -> Path:
    """Return the folder with the model's files, pinned to `info.sha`, and download what the cache
    lacks.

    Only `info.files` are fetched: never code, pickles or GGUFs (the folder is the user's cache and
    may hold others that came there some other way). Files that are whole are kept, so a second
    call takes up where a broken one stopped. Raises QuantkitError.
    """
    if info.local_path is not None:
        _check_sizes(info, Path(info.local_path))
        return Path(info.local_path)
    folder = snapshot(info.id, info.sha, info.files, token, progress)
    try:
        _check_sizes(info, folder)
    except QuantkitError:
        # A file in the cache was damaged after it came: fetch the damaged ones once more.
        for file in damaged_files(info, folder):
            logger.warning("%s in the cache is damaged; downloading it again", file.path)
            (folder / file.path).resolve().unlink(missing_ok=True)
            (folder / file.path).unlink(missing_ok=True)
        folder = snapshot(info.id, info.sha, info.files, token, progress)
        _check_sizes(info, folder)
    return folder


def cached_folder(info: ModelInfo) -> Path:
    """Return where the model's files lie, or would: its own folder, or its place in the Hub's
    cache.
    """
    if info.local_path is not None:
        return Path(info.local_path)
    return cached_snapshot(info.id, info.sha)


def cached_snapshot(repo: str, revision: str) -> Path:
    """Return the place of a repository's commit in the Hub's cache."""
    folder = constants.REPO_ID_SEPARATOR.join(["models", *repo.split("/")])
    return cache_dir() / folder / "snapshots" / revision


def damaged_files(info: ModelInfo, folder: Path) -> list[RepoFile]:
    """Return the files of the model that `folder` lacks or has with another size."""

    def is_whole(file: RepoFile) -> bool:
        path = folder / file.path
        return path.is_file() and path.stat().st_size == file.n_bytes

    return [file for file in info.files if not is_whole(file)]


def _check_sizes(info: ModelInfo, folder: Path) -> None:
    damaged = damaged_files(info, folder)
    if damaged:
        raise QuantkitError(
            f"{damaged[0].path} of {info.id} is not the file of {damaged[0].n_bytes:,} bytes that "
            "was checked.",
            f"Check {folder}, restore the file, and start again in a new folder."
            if info.local_path
            else f"Delete {folder} and start again.",
        )


def snapshot(
    repo_id: str,
    sha: str,
    files: Sequence[RepoFile],
    token: str | None,
    progress: Progress | None,
) -> Path:
    """Call snapshot_download for exactly these files of a commit."""
    cache, here = cache_dir(), cached_snapshot(repo_id, sha)
    n_total = sum(file.n_bytes for file in files)
    n_cached = sum(file.n_bytes for file in files if (here / file.path).is_file())
    check_disk(cache, n_total - n_cached)
    bar = _byte_bar(progress, n_cached, n_total)

    def fetch() -> str:
        return snapshot_download(
            repo_id,
            revision=sha,
            allow_patterns=[glob.escape(file.path) for file in files],
            token=token or False,
            endpoint=endpoint(),
            cache_dir=cache,
            library_name="quantkit",
            tqdm_class=bar,
            max_workers=4,
        )

    folder = Path(call(fetch, Asked(repo_id, sha), token, PATIENT))
    if progress is not None:
        progress(n_total, n_total)
    return folder


def _byte_bar(progress: Progress | None, n_cached: int, n_total: int) -> type[tqdm]:
    """A progress bar class that shows nothing and reports the bytes on disk to `progress`.

    snapshot_download makes one bar for files and two for bytes (received and written); the
    further of the latter counts.
    """
    lock = threading.Lock()
    best = 0

    class ByteBar(tqdm):
        monitor_interval = 0  # no watcher thread

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO()})

        def display(self, *args: Any, **kwargs: Any) -> None:
            return None

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal best
            shown = super().update(n)
            if progress is not None and self.unit == "B":
                with lock:
                    if self.n > best:
                        best = int(self.n)
                        progress(min(n_cached + best, n_total), n_total)
            return shown

    return ByteBar
