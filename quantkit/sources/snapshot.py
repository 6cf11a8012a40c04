"""A fetched model, as the stages after fetch find it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from quantkit import hub
from quantkit.checkpoint.info import ModelInfo
from quantkit.errors import QuantkitError
from quantkit.run.folder import RunDir, read_json
from quantkit.sandbox import untrusted


@dataclass(frozen=True)
class Snapshot:
    """A fetched model: what it is, and the folder with its files."""

    info: ModelInfo
    folder: Path
    left_out: tuple[str, ...] = ()  # stored tensors that are no part of the model


def load_snapshot(directory: RunDir) -> Snapshot:
    """Return the snapshot of a run whose fetch stage is finished.

    What the cache has lost since (it is the user's, and may have been emptied) is downloaded again
    at the same commit. Raises QuantkitError when a local folder has changed.
    """
    value = read_json(directory.artifacts.snapshot)
    info, folder = untrusted.build(ModelInfo, value["info"]), directory.path / value["folder"]
    is_made = not Path(value["folder"]).is_absolute()  # and looked after by the manifest
    if not is_made and hub.damaged_files(info, folder):
        folder = hub.download(info, hub.resolve_token())
    return Snapshot(info, folder, tuple(value.get("left_out", ())))


def load_quantized(directory: RunDir) -> Snapshot:
    """Return the snapshot with the folder of what is quantized, of a run whose convert stage is
    finished: the model as it was fetched, or with its channels equalized.
    """
    snapshot, equalized = load_snapshot(directory), directory.artifacts.equalized
    return replace(snapshot, folder=equalized) if equalized.exists() else snapshot


@dataclass(frozen=True)
class Place:
    """Where other ranks find a fetched model: its folder here, its files with their bytes, and the
    Hub's repository and commit where it has one.
    """

    folder: str
    files: dict[str, int]
    repo: str | None
    revision: str

    @classmethod
    def of(cls, snapshot: Snapshot) -> Place:
        info, folder = snapshot.info, snapshot.folder
        files = {file.path: file.n_bytes for file in info.files}
        is_fetched = not hub.damaged_files(info, folder)  # else it was made from what was
        if not is_fetched:
            files = {
                str(path.relative_to(folder)): path.stat().st_size
                for path in folder.rglob("*")
                if path.is_file()
            }
        repo = info.id if is_fetched and info.local_path is None else None
        return cls(str(folder.absolute()), files, repo, info.sha)

    def find(self) -> Path:
        """Return the folder on this machine: the same path, or its place in the Hub's cache. Raise
        QuantkitError when neither has the files.
        """
        places = [Path(self.folder)]
        if self.repo is not None:
            places.append(hub.cached_snapshot(self.repo, self.revision))
        for place in places:
            if all(_has(place / name, n_bytes) for name, n_bytes in self.files.items()):
                return place
        raise QuantkitError(
            f"The machine {os.uname().nodename} does not have the model's files in"
            f" {' or '.join(map(str, places))}.",
            f"Run `hf download {self.repo} --revision {self.revision}` there, or put the run's"
            " folder and the Hub's cache (HF_HOME) on a disk that all machines share."
            if self.repo is not None
            else "Put the model or the run's folder on a disk that all machines share.",
        )


def _has(path: Path, n_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == n_bytes


def model_name(snapshot: Snapshot) -> str:
    """Return what the GGUF calls the model: the Hub id, or the folder's name."""
    return snapshot.folder.name if snapshot.info.local_path else snapshot.info.id
