"""Files that the user names: texts, tasks, and GGUFs to be compared with, which are local or
`hf://owner/name/file.gguf`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from quantkit import hub
from quantkit.calibration import files
from quantkit.config import RunConfig
from quantkit.errors import QuantkitError, UsageError
from quantkit.hub.client import PATIENT, Asked, call, hf_api

_SCHEME = "hf://"


def look(config: RunConfig) -> list[str]:
    """Open every text that a run will read: sentences on what is worth knowing before the work.

    Raises QuantkitError for what a stage would refuse hours later.
    """
    from evaluators import tasks
    from evaluators.errors import EvaluationError
    from evaluators.texts import read_text

    said = files.look(config.calibration)
    try:
        if config.eval_text and not read_text(Path(config.eval_text)).strip():
            raise QuantkitError(f"{config.eval_text} holds no text.", "Give another --eval-text.")
        if config.tasks:
            tasks.load("choices", data=Path(config.tasks))
    except EvaluationError as error:
        raise QuantkitError(error.message, error.remedy) from None
    return said


def check_name(name: str) -> None:
    """Raises UsageError when `name` cannot be a GGUF to compare with. Reads nothing."""
    if not name.endswith(".gguf"):
        raise UsageError(f"{name} is not a .gguf file.", _EXAMPLE)
    if name.startswith(_SCHEME):
        _parts(name)


def locate(name: str) -> Path:
    """The file on this machine; one on the Hub is downloaded into the user's cache.

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
    fetch = partial(
        hf_api(token).hf_hub_download,
        repo_id,
        file,
        revision=revision,
        cache_dir=hub.cache_dir(),
    )
    return Path(call(fetch, Asked(repo_id, revision), token, PATIENT))


def short_names(names: Sequence[str]) -> list[str]:
    """What files are called in tables: their own names, with the repository's or the folder's in
    front where two have the same. Most publishers name theirs alike.
    """
    own = [name.rsplit("/", 1)[-1] for name in names]
    found = []
    for name, last in zip(names, own, strict=True):
        folders = name.removeprefix(_SCHEME).split("/")[:-1]
        n = 2 if name.startswith(_SCHEME) else 1
        where = folders[:n] if name.startswith(_SCHEME) else folders[-n:]
        found.append("/".join([*where, last]) if own.count(last) > 1 else last)
    return found


_EXAMPLE = "Give a local .gguf, or hf://owner/name/file.gguf."


def _parts(name: str) -> tuple[str, str | None, str]:
    """Repository, revision and file of `hf://owner/name[@revision]/file.gguf`."""
    parts = name.removeprefix(_SCHEME).split("/", 2)
    if len(parts) < 3 or ".." in name:
        raise UsageError(f"{name} does not name a file of a repository.", _EXAMPLE)
    ref = hub.parse_reference(f"{parts[0]}/{parts[1]}", allow_local=False)
    return ref.id, ref.revision, parts[2]
