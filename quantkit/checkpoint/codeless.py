"""Make a model's folder safe for transformers: nothing in it names code, and no code is in it.

`trust_remote_code=False` beside that is the second lock, not the first: without it transformers
asks on a terminal whether to run a stranger's code.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Large, and without settings: not looked through.
_DATA = ("tokenizer.json", "vocab.json", "added_tokens.json")
_KEY = "auto_map"  # names files and repositories to load code from


@contextmanager
def codeless(folder: Path) -> Iterator[Path]:
    """Yield the folder itself if nothing in it names code; else a temporary copy without code, with
    links to the files that stay as they are.
    """
    cleaned = dict(filter(None, map(_cleaned, sorted(folder.glob("*.json")))))
    if not cleaned and all(map(_stays, folder.iterdir())):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="quantkit-codeless-") as made:
        view = Path(made)
        for path in folder.iterdir():
            if path.name in cleaned:
                (view / path.name).write_text(json.dumps(cleaned[path.name]), "utf-8")
            elif _stays(path):
                (view / path.name).symlink_to(path.resolve())
        yield view


def _stays(path: Path) -> bool:
    """Whether something in the folder is no code and no folder that may hold some."""
    return path.suffix != ".py" and (path.is_file() or path.name == "additional_chat_templates")


def strip(folder: Path) -> None:
    """Do the same to a folder that is our own, in place."""
    for name, value in filter(None, map(_cleaned, sorted(folder.glob("*.json")))):
        (folder / name).write_text(json.dumps(value), "utf-8")


def _cleaned(path: Path) -> tuple[str, Any] | None:
    """A JSON's name and what is left of it without what names code; None where it names none."""
    if path.name in _DATA or path.name.endswith(".index.json"):
        return None
    found: list[str] = []

    def keep(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found.extend(key for key, _ in pairs if key == _KEY)
        return {key: value for key, value in pairs if key != _KEY}

    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=keep)
    except (ValueError, RecursionError, OSError):
        return None  # transformers says what it thinks of it
    return (path.name, value) if found else None
