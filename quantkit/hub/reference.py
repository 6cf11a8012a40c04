"""Parse what a user typed as MODEL: a Hub id, a Hub URL, a local folder or the demo."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from quantkit.config import DEMO_MODEL
from quantkit.errors import UsageError, check_writable_name
from quantkit.hub.client import endpoint

_EXAMPLE = "Write owner/name, a Hub URL, or the path of a local folder."
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co", "www.hf.co")
_NOT_MODELS = {"datasets": "dataset", "spaces": "Space", "buckets": "bucket", "papers": "paper"}
_PAGES = ("docs", "blog", "collections", "learn", "models", "organizations", "posts", "settings")
_VIEWS = ("tree", "blob", "resolve", "raw", "commit", "commits", "edit", "blame")
_REVISION = re.compile(r"[\w][\w./+\-]{0,199}", re.ASCII)


@dataclass(frozen=True)
class ModelRef:
    """Where a model is. `id` is owner/name, an absolute path, or the demo's name."""

    kind: Literal["hub", "local", "demo"]
    id: str
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        return self.kind == "local"

    @property
    def is_on_hub(self) -> bool:
        return self.kind == "hub"

    @property
    def is_demo(self) -> bool:
        return self.kind == "demo"

    def __str__(self) -> str:
        return self.id if self.revision is None else f"{self.id}@{self.revision}"


def parse_reference(
    text: str, revision: str | None = None, *, allow_local: bool = True
) -> ModelRef:
    """Understand what a user typed. A folder that exists wins over a Hub id of the same name.

    With `allow_local=False` (a public page) the file system is not touched. Raises UsageError.
    """
    text = text.strip()
    if not text or len(text) > 500 or not text.isprintable():
        raise UsageError("Enter a model." if not text else "That is not a model.", _EXAMPLE)
    if text.lower().startswith("demo:"):
        return _demo(text, revision)
    if _is_address(text):
        return _address(text, revision)
    if allow_local and (folder := _local_folder(text)) is not None:
        if revision is not None:
            raise UsageError(
                "A local folder has no revisions.", "Leave --revision out, or give a Hub id."
            )
        return ModelRef("local", str(folder))
    if text.startswith(("/", ".", "~")) or "\\" in text:
        raise UsageError(
            f"There is no folder {text}." if allow_local else "Local folders cannot be used here.",
            _EXAMPLE if allow_local else "Write owner/name or a Hub URL.",
        )
    repo_id, at, suffix = text.partition("@")
    return ModelRef("hub", _valid_id(repo_id), _one_revision(suffix if at else None, revision))


def _demo(text: str, revision: str | None) -> ModelRef:
    if text.lower() != DEMO_MODEL or revision is not None:
        raise UsageError(
            f"The only demo is {DEMO_MODEL}.", f"Write {DEMO_MODEL}, without a revision."
        )
    return ModelRef("demo", DEMO_MODEL)


def _is_address(text: str) -> bool:
    own_host = urlsplit(endpoint()).netloc
    return "://" in text or text.lower().split("/")[0] in (*_HOSTS, own_host)


def _address(text: str, revision: str | None) -> ModelRef:
    """A Hub address as copied from a browser, or `hf://[models/]owner/name[@revision]`."""
    try:
        address = urlsplit(text if "://" in text else f"https://{text}")
    except ValueError:
        raise UsageError(f"{text!r} is not a URL.", _EXAMPLE) from None
    if address.scheme.lower() == "hf":
        path, at, suffix = f"{address.netloc}{address.path}".partition("@")
        parts = [unquote(part) for part in path.split("/") if part]
        url_revision = suffix.split("/")[0] if at else None
    else:
        known = (*_HOSTS, urlsplit(endpoint()).netloc.lower())
        if address.scheme.lower() not in ("http", "https") or address.netloc.lower() not in known:
            raise UsageError(f"{text} is not on the Hugging Face Hub.", _EXAMPLE)
        parts = [unquote(part) for part in address.path.split("/") if part]
        url_revision = None
    if parts[:1] == ["api"]:
        parts = parts[1:]
    if parts[:1] == ["models"] and len(parts) > 1:
        parts = parts[1:]
    if parts and parts[0] in _NOT_MODELS:
        raise UsageError(
            f"{'/'.join(parts[1:3]) or text} is a {_NOT_MODELS[parts[0]]}, not a model.",
            "Give the id of a model.",
        )
    if not parts or parts[0] in _PAGES:
        raise UsageError(f"{text} does not name a model.", _EXAMPLE)
    n_id = 1 if len(parts) == 1 or parts[1] in _VIEWS else 2
    rest = parts[n_id:]
    if len(rest) >= 2 and rest[0] in _VIEWS:
        # Only refs/pr/1 and refs/convert/parquet have slashes; a branch with one is cut off here
        # and then not found, with a sentence that names what was looked for.
        url_revision = "/".join(rest[1:4]) if rest[1] == "refs" else rest[1]
    return ModelRef("hub", _valid_id("/".join(parts[:n_id])), _one_revision(url_revision, revision))


def _local_folder(text: str) -> Path | None:
    """The absolute path when `text` names an existing folder. Raises UsageError for a file."""
    try:
        path = Path(text).expanduser()
        if path.is_dir():
            check_writable_name(str(path.resolve()))
            return path.resolve()
        is_file = path.is_file()
    except (OSError, RuntimeError):  # longer than the file system takes; ~ of an unknown user
        return None
    if is_file:
        raise UsageError(
            f"{text} is a file, not a model's folder.", f"Give {path.parent}/ instead."
        )
    return None


def _valid_id(repo_id: str) -> str:
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UsageError(f"{repo_id!r} is not a model's id on the Hub.", _EXAMPLE) from None
    return repo_id


def _one_revision(in_text: str | None, asked: str | None) -> str | None:
    """The revision from the address or from --revision; they may not contradict each other."""
    if in_text is not None and asked is not None and in_text != asked:
        raise UsageError(
            f"The URL names the revision {in_text}, but {asked} was asked for, too.",
            "Give only one of them.",
        )
    revision = asked if asked is not None else in_text
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UsageError(
            f"{revision!r} is not a revision.", "Give a branch, a tag or a commit such as main."
        )
    return revision
