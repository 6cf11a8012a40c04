"""Calibration text that visitors send: checked as text, kept for a day until a run takes it into
its own folder, and deleted with that.
"""

from __future__ import annotations

import codecs
import re
import secrets
import time
from pathlib import Path

from quantkit.errors import UsageError
from quantkit.files import write_text
from quantkit.server.runs.record import owner_hash

FILE = "own-text.txt"  # in the folder of a run
MOST_BYTES = 4_000_000
_FOLDER = ".texts"
_MOST_KEPT_BYTES = 200_000_000  # of all visitors; the oldest go first
_KEPT_SECONDS = 86_400.0
_LEAST_CHARACTERS = 1000
_NAME = re.compile(r"[A-Za-z0-9_-]{16}", re.ASCII)
_NO_TEXT = re.compile("[\0-\x08\x0e-\x1a\x1c-\x1f]")
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def keep(root: Path, owner: str, data: bytes) -> tuple[str, int]:
    """Keep a visitor's text below the folder of the runs. Returns the name to ask for it by, and
    its characters. Raises UsageError for what is no text, or too much or too little of it.
    """
    text = _checked(data)
    folder = root / _FOLDER / owner_hash(owner)[:32]
    folder.mkdir(parents=True, exist_ok=True)
    name = secrets.token_urlsafe(12)
    write_text(folder / name, text)
    _sweep(root / _FOLDER)
    return name, len(text)


def kept(root: Path, owner: str, name: str) -> Path:
    """Return where a visitor's own text lies. Raises UsageError."""
    folder = root / _FOLDER / owner_hash(owner)[:32]
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not (folder / name).is_file():
        raise UsageError("Your own text is no longer here.", "Choose the file again.")
    return folder / name


def _checked(data: bytes) -> str:
    if len(data) > MOST_BYTES:
        raise UsageError(
            f"The text is larger than {MOST_BYTES / 1e6:.0f} MB.",
            "Choose a part of it: calibration uses about 1 MB.",
        )
    mark, encoding = next(((m, e) for m, e in _BOMS if data.startswith(m)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError:
        raise UsageError("The file is not text in UTF-8.", "Save it as UTF-8 text.") from None
    if _NO_TEXT.search(text):
        raise UsageError("The file is not plain text.", "Choose a text file.")
    if len(text.strip()) < _LEAST_CHARACTERS:
        raise UsageError(
            f"The text has fewer than {_LEAST_CHARACTERS:,} characters.",
            "Choose a longer one: 100,000 and more are good.",
        )
    return text


def _sweep(folder: Path) -> None:
    """Drop what nobody took in a day, and the oldest where there is too much."""
    found = []
    for path in folder.glob("*/*"):
        try:
            stat = path.stat()
        except OSError:  # somebody else's sweep
            continue
        found.append((stat.st_mtime, stat.st_size, path))
    total = sum(size for _, size, _ in found)
    for changed, size, path in sorted(found):
        if total > _MOST_KEPT_BYTES or changed < time.time() - _KEPT_SECONDS:
            path.unlink(missing_ok=True)
            total -= size
