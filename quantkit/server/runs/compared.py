"""GGUFs of others to measure beside ours, as a page's visitor names them: a file on the Hub, or a
repository, of which the file that is nearest to each of ours in size is taken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from quantkit.errors import UsageError
from quantkit.hub.given import gguf_files

MOST = 4  # files
_MOST_TIMES = 4  # as large as our largest file, what is downloaded may be
_WEB = re.compile(r"https://huggingface\.co/(?P<repo>[^/\s]+/[^/\s?#]+)(?:/(?P<rest>[^\s?#]*))?/?")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)
_FILE = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}/[\w./ -]{1,200}\.gguf", re.ASCII)
_REMEDY = "Write owner/name, owner/name/file.gguf, or the address of one on the Hub."


def parse(text: object) -> tuple[str, ...]:
    """Return what a field names: `owner/name` or `owner/name/file.gguf`, with commas between them.
    Raises UsageError.
    """
    if text is None:  # a field that was never opened
        return ()
    if not isinstance(text, str) or len(text) > 2000:
        raise UsageError("That names nothing to compare with.", _REMEDY)
    found = [_one(part) for part in re.split(r"[,\n]+", text) if part.strip()]
    if len(found) > MOST:
        raise UsageError(f"{len(found)} are too many to compare with.", f"Name at most {MOST}.")
    return tuple(dict.fromkeys(found))


def _one(text: str) -> str:
    name = text.strip().removeprefix("hf://").strip("/")
    web = _WEB.fullmatch(text.strip())
    if web is not None:
        rest = re.sub(r"^(?:blob|resolve)/[^/]+/", "", web["rest"] or "")
        file = rest if rest.endswith(".gguf") else ""
        name = f"{web['repo']}/{file}" if file else web["repo"]
    is_repo = _REPO.fullmatch(name) and not name.endswith(".gguf")
    if ".." in name or not (is_repo or _FILE.fullmatch(name)):
        raise UsageError(f"{text.strip()[:80]!r} names no GGUF on the Hub.", _REMEDY)
    return name


def settle(names: Sequence[str], sizes: Sequence[int], token: str | None) -> tuple[str, ...]:
    """Return the files as `RunConfig.compare` has them: of a repository the one nearest to each of
    our `sizes` in bytes. Asks the Hub. Raises QuantkitError.
    """
    found: list[str] = []
    for name in names:
        repo = "/".join(name.split("/")[:2])
        there = gguf_files(repo, token)
        asked = name.removeprefix(repo).strip("/")
        if asked and asked not in there:
            raise UsageError(f"{repo} has no file {asked}.", "Check the name.")
        if not there:
            raise UsageError(f"{repo} has no GGUF in one file.", "Name another repository.")
        nearest = [min(there, key=lambda file: abs(there[file] - size)) for size in sizes]
        for file in [asked] if asked else nearest:
            if there[file] > _MOST_TIMES * max(sizes, default=there[file]):
                raise UsageError(
                    f"{file} is more than {_MOST_TIMES} times as large as the file made here.",
                    "Name a smaller one.",
                )
            found.append(f"hf://{repo}/{file}")
    return tuple(dict.fromkeys(found))[:MOST]
