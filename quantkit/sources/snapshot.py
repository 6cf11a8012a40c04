"""A fetched model, as the stages after fetch find it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantkit import hub
from quantkit.checkpoint.info import ModelInfo
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


def model_name(snapshot: Snapshot) -> str:
    """Return what the GGUF calls the model: the Hub id, or the folder's name."""
    return snapshot.folder.name if snapshot.info.local_path else snapshot.info.id
