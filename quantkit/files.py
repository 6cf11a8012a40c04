"""Write files whole or not at all, and hash them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantkit.tensors import to_json

PARTIAL = ".partial"
# Threads that read and hash files, which lets go of the GIL: more than a disk can feed is no use.
READERS = min(8, os.cpu_count() or 1)


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a `.partial` name to write to; on a clean exit its bytes are flushed and it takes
    `path`'s place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    yield partial
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def copy_whole(source: Path, target: Path) -> None:
    """Copy the bytes of a file; the target has its name only when it is whole. No more is asked of
    where it lies than that: a mounted bucket may know neither locks nor links.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + PARTIAL)
    shutil.copyfile(source, partial)
    os.replace(partial, target)


def link(source: Path, target: Path) -> None:
    """Give a file a second name, in place of what has that name: its bytes lie on the disk once. On
    a file system without hard links it is copied.
    """
    if target.exists() and target.samefile(source):
        return  # renaming one name of a file to another would do nothing
    with replacing(target) as partial:
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)


def unlink(path: Path) -> int:
    """Delete a file if it is there. Return the bytes that are free then: none where it has another
    name, too.
    """
    if not path.exists():
        return 0
    stat = path.stat()
    path.unlink()
    return stat.st_size if stat.st_nlink == 1 else 0


def write_json(path: Path, value: Any) -> Path:
    """Write `value` as indented JSON, whole or not at all."""
    with replacing(path) as partial:
        partial.write_bytes(json_line(value, indent=1))
    return path


def json_line(value: Any, indent: int | None = None) -> bytes:
    """Return a line of JSON. A file name that is not UTF-8 is escaped, and read back unchanged."""
    try:
        return f"{json.dumps(to_json(value), indent=indent, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:
        return f"{json.dumps(to_json(value), indent=indent)}\n".encode()


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 text, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path
