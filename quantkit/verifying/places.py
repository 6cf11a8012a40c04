"""Where published files lie: a folder, or a repository of the Hub at one commit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from quantkit import hub
from quantkit.errors import QuantkitError, UsageError
from quantkit.evidence import receipt as receipts
from quantkit.evidence.receipt.schema import MOST_BYTES
from quantkit.hub.repository import Repository, bring, look
from quantkit.run.folder import RunDir

CARD, REPORT = "README.md", "report.json"
_MOST_CARD = 4_000_000
_MOST_LISTED = 20_000


@dataclass(frozen=True)
class Place:
    """`sizes` are the bytes of every file there, by name. Of a repository only what was brought is
    in `folder`.
    """

    name: str
    folder: Path
    sizes: Mapping[str, int]
    repository: Repository | None = None

    @property
    def repo(self) -> str | None:
        """The id of the repository; None for a folder."""
        return self.repository.id if self.repository else None

    def path(self, name: str) -> Path:
        return self.folder / name

    def bring(self, names: Collection[str]) -> Place:
        """Return the place with these files at hand. Raises QuantkitError."""
        if self.repository is None:
            return self
        return replace(self, folder=bring(self.repository, names, hub.resolve_token()))


def open_place(what: str, revision: str | None) -> Place:
    """Return the place with receipt, card and report at hand, as far as they are there.

    Raises UsageError for what is no place, QuantkitError when there is no receipt or the Hub does
    not give it.
    """
    reference = hub.parse_reference(what, revision)
    if reference.is_demo:
        raise UsageError(f"{what} is no repository.", "Give owner/name, or a folder.")
    place = _folder(Path(reference.id)) if reference.is_local else _repository(reference)
    if receipts.NAME not in place.sizes:
        raise QuantkitError(
            f"{place.name} has no {receipts.NAME}.",
            "It was made by an older quantkit, or by something else: `quantkit compare` measures"
            " any GGUF.",
        )
    bounds = {receipts.NAME: MOST_BYTES, REPORT: MOST_BYTES, CARD: _MOST_CARD}
    for name, most in bounds.items():
        if place.sizes.get(name, 0) > most:
            raise QuantkitError(f"{name} of {place.name} has more than {most:,} bytes.")
    return place.bring(bounds)


def _folder(folder: Path) -> Place:
    """A folder of files, or of a run that staged them."""
    staged = RunDir(folder).artifacts.upload
    folder = staged if staged.is_dir() else folder
    sizes: dict[str, int] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
        if len(sizes) > _MOST_LISTED:
            raise QuantkitError(f"{folder} holds more than {_MOST_LISTED:,} files.")
    return Place(str(folder), folder, sizes)


def _repository(reference: hub.ModelRef) -> Place:
    found = look(reference, hub.resolve_token())
    sizes = {file.path: file.n_bytes for file in found.files}
    name = f"{found.id} at {found.sha[:12]}"
    return Place(name, hub.cached_snapshot(found.id, found.sha), sizes, found)
