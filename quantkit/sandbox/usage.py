"""Measure what the worker uses, as its keeper sees it: memory, threads, and what lies in the
folders that it may write into. Standard library only: runs in the child.
"""

from __future__ import annotations

import os
import stat
from itertools import islice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantkit.sandbox.told import Told

# Of a folder that is written into; an empty file takes a place on the disk, too.
_MOST_FILES, _MOST_DEPTH, _LEAST_BYTES = 50_000, 8, 4096


def only_child(init: int) -> int | None:
    """Return the worker's process id as seen from here."""
    try:
        with open(f"/proc/{init}/task/{init}/children") as file:
            numbers = file.read().split()
    except OSError:
        return None
    return int(numbers[0]) if numbers else None


def too_much(number: int, job: Told) -> str | None:
    """Return the name of a limit that the worker exceeds, None if it exceeds none."""
    facts = _facts(number)
    # Shared memory that it was given need not be in its sight.
    given = [os.fstat(descriptor) for descriptor in job.inherited]
    shared = sum(512 * found.st_blocks for found in given if stat.S_ISREG(found.st_mode))
    taken = sum(facts.get(name, 0) for name in ("RssAnon", "RssShmem", "VmSwap"))
    if 1024 * taken + shared > job.memory_bytes:
        return "memory"
    if facts.get("Threads", 0) > job.n_processes:
        return "processes"
    return "bytes" if writes_too_much(job) else None


def _facts(number: int) -> dict[str, int]:
    """Memory in kB and threads of a process. One whose first thread has ended says nothing of its
    memory: then the others are asked.
    """
    facts = _status(f"/proc/{number}/status")
    if "RssAnon" in facts or facts.get("Threads", 0) < 2:
        return facts
    try:
        threads = os.listdir(f"/proc/{number}/task")
    except OSError:
        return facts
    found = (_status(f"/proc/{number}/task/{thread}/status") for thread in threads)
    return next((alive for alive in found if "RssAnon" in alive), facts)


def _status(path: str) -> dict[str, int]:
    """Empty for what has just ended."""
    facts = {}
    try:
        with open(path) as file:
            for line in file:
                name, _, value = line.partition(":")
                if name in ("RssAnon", "RssShmem", "VmSwap", "Threads"):
                    facts[name] = int(value.split()[0])
    except OSError:
        pass
    return facts


def writes_too_much(job: Told) -> bool:
    """Return whether its folders hold more than they may, or what cannot be counted."""
    taken = [bytes_below(folder) for folder in job.folders]
    return None in taken or sum(filter(None, taken)) > job.total_bytes


def bytes_below(folder: str) -> int | None:
    """Return what everything in a folder takes, no links followed. None where that cannot be said:
    a folder is closed, or there are more files than can be looked at twenty times a second.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return 0
    except OSError:
        return None
    try:
        sizes = list(islice(_sizes(descriptor, _MOST_DEPTH), _MOST_FILES + 1))
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None if len(sizes) > _MOST_FILES else sum(sizes)


def _sizes(folder: int, depth: int) -> Iterator[int]:
    """Of all below an open folder: by its descriptor, for a path can be longer than can be named.
    Raises OSError for what cannot be entered, or is too deep.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                yield max(_LEAST_BYTES, 512 * entry.stat(follow_symlinks=False).st_blocks)
                if not entry.is_dir(follow_symlinks=False):
                    continue
                if not depth:
                    raise OSError("too deep")
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                inner = os.open(entry.name, flags, dir_fd=folder)
            except FileNotFoundError:  # it has just been removed
                continue
            try:
                yield from _sizes(inner, depth - 1)
            finally:
                os.close(inner)
