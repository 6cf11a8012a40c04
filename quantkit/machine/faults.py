"""Explain errors of the system: a disk that is full or cannot be written, too little memory, a
limit. It may come from anywhere, also from a library that tells it in its own way.

Everything that ends a command goes through `explain`. What it does not know is a bug.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError, chain_of
from quantkit.machine import room
from quantkit.sizes import size

_AGAIN = "run the same command again: finished work is kept"
_LITTLE_DISK = 16_000_000  # bytes: a disk with less is what was full
_FEW_FILES = 16
_MANY_FILES = 1024  # as many may be open as a run ever needs
_LITTLE_MEMORY = 1 << 30  # bytes: with less, whatever dies without a reason died for want of it


@dataclass(frozen=True)
class Place:
    """A folder that is written to, and how to choose another."""

    folder: Path
    otherwise: str  # as in "set TMPDIR to another folder"


def places(run: Path | None) -> list[Place]:
    """Return where a command writes; `run` is its folder, if it has one."""
    found = [] if run is None else [Place(run, "choose another --out")]
    found.append(Place(Path(_temporary()), "set TMPDIR to another folder"))
    home = os.path.expanduser("~")
    own = os.environ.get("QUANTKIT_HOME") or os.path.join(home, ".cache", "quantkit")
    hub = os.environ.get("HF_HOME") or os.path.join(home, ".cache", "huggingface")
    found.append(Place(Path(own), "set QUANTKIT_HOME to another folder"))
    found.append(Place(Path(hub), "set HF_HOME to another folder"))
    return found


def _temporary() -> str:
    return tempfile.tempdir or os.environ.get("TMPDIR") or "/tmp"


def explain(
    error: BaseException, run: Path | None = None, needs: int = 0, stage: str = ""
) -> QuantkitError | None:
    """Return what an error means for whoever gave the command; None where that is not known.

    `run` is the folder that is worked in; `needs` is about what memory the stage takes.
    """
    if isinstance(error, QuantkitError):
        return _doubted(error, run, needs, stage)
    for link in chain_of(error):
        told = _of_memory(link, needs, stage) or _of_system(link, run)
        if told is not None:
            return told
    if _may_be_memory(str(error), error) and _is_tight(needs):
        return QuantkitError(f"{_lacks(needs, stage)} This is the likely cause.", _more())
    return None


# ---- disks, files and limits

_TOLD = {
    errno.ENOSPC: r"No space left on device",
    errno.EDQUOT: r"[Dd]isk quota exceeded",
    errno.EROFS: r"Read-only file system",
    errno.EACCES: r"Permission denied",
    errno.EIO: r"Input/output error",
    errno.EMFILE: r"Too many open files",
    errno.EFBIG: r"File too large",
    errno.ENAMETOOLONG: r"File name too long",
}

_UNCLEAN = getattr(errno, "EUCLEAN", errno.EIO)  # Linux's, of a damaged file system

# What a write or an open file is told without its path.
_WITHOUT_PATH = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}
_WITHOUT_PATH |= {errno.EMFILE, errno.ENFILE, errno.ESTALE}


def _of_system(error: BaseException, run: Path | None) -> QuantkitError | None:
    """A sentence for an error of the system, also for one that only a text tells of."""
    text = str(error)
    path: Any = None
    if isinstance(error, FileNotFoundError) and error.errno is None:
        number, path = _of_safetensors(text)
    elif isinstance(error, OSError):
        number, path = error.errno, error.filename
    else:
        said = (n for n, words in _TOLD.items() if re.search(rf"{words}|os error {n}\b", text))
        number = next(said, None)
    if isinstance(error, UnicodeEncodeError) and "surrogates not allowed" in text:
        shown = error.object.encode("utf-8", "backslashreplace").decode()[:200]
        return QuantkitError(f"The name {shown} is not UTF-8.", "Rename the file.")
    if "No usable temporary directory" in text:
        return QuantkitError(
            "No folder for temporary files can be written to and has room.",
            "Set TMPDIR to one.",
        )
    if "Could not determine home directory" in text:
        return QuantkitError(
            "This user has no home folder.",
            "Set QUANTKIT_HOME and HF_HOME to folders that you can write to.",
        )
    if "cannot cache function" in text:  # numba's
        number, path = errno.EACCES, places(run)[-2].folder
    if "start new thread" in text and _is_tight(0):  # its stack did not fit
        return QuantkitError(_lacks(0, ""), _more())
    if "start new thread" in text or (number == errno.EAGAIN and isinstance(error, OSError)):
        return QuantkitError(
            "The system does not let this user start more processes or threads.",
            f"Raise the limit (`ulimit -u`) or end other processes, and {_AGAIN}.",
        )
    if number is None or (isinstance(error, OSError) and not path and number not in _WITHOUT_PATH):
        return None
    where = (
        _place_of(Path(os.fsdecode(path)), run) if isinstance(path, (str, bytes, Path)) else None
    )
    if number in (errno.ENOSPC, errno.EDQUOT):
        return _full(where or _fullest(places(run)), number)
    return _of_path(number, path, where or places(run)[0], run)


def _of_safetensors(text: str) -> tuple[int | None, str | None]:
    """Number and path of what safetensors tells of a file that it could not open: always that there
    is none, with the path in the text alone. Where there is one, its own open says why not; where
    that works, too, it was refused for want of descriptors that are free again by now.
    """
    found = re.fullmatch(r"No such file or directory: (.+)", text, re.DOTALL)
    if found is None:
        return None, None
    try:
        os.close(os.open(found[1], os.O_RDONLY))
    except OSError as error:
        return error.errno, found[1]
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (errno.EMFILE if 0 <= soft < _MANY_FILES else None), found[1]


def _of_path(number: int, path: Any, place: Place, run: Path | None) -> QuantkitError | None:
    shown = _shown(path) if path else str(place.folder)
    otherwise = place.otherwise[0].upper() + place.otherwise[1:]
    if number in (errno.EACCES, errno.EPERM):
        return QuantkitError(
            f"This user is not allowed to read or write {shown}.",
            f"Change its permissions, or {place.otherwise}.",
        )
    if number == errno.EROFS:
        return QuantkitError(f"{shown} is on a read-only disk.", f"{otherwise}.")
    if number in (errno.EIO, errno.ESTALE, _UNCLEAN):
        return QuantkitError(
            f"The disk of {shown} is failing: the system reports an input/output error.",
            f"Check the disk. With a sound one, {_AGAIN}.",
        )
    if number in (errno.EMFILE, errno.ENFILE):
        return QuantkitError(
            "Too many files are open at once.",
            f"Raise the limit (`ulimit -n`) to {_MANY_FILES} or more, and {_AGAIN}.",
        )
    if number == errno.EFBIG:
        return QuantkitError(
            f"{shown} holds a file that grew larger than this system or `ulimit -f` allows.",
            f"Raise the limit, or {place.otherwise}.",
        )
    if number in (errno.ENOTDIR, errno.EEXIST):
        is_link = bool(path) and os.path.islink(path)
        what = "a link that leads to no folder" if is_link else "a file"
        return QuantkitError(f"{shown} is {what}, but a folder is needed there.", f"{otherwise}.")
    if number == errno.EISDIR:
        return QuantkitError(f"{shown} is a folder, but a file is needed there.", f"{otherwise}.")
    if number == errno.ENAMETOOLONG:
        return QuantkitError("A name is longer than this disk allows.", f"{otherwise}.")
    if number == errno.ELOOP:
        return QuantkitError(f"{shown} is a link that leads to itself.", f"{otherwise}.")
    if number == errno.ENOENT and not place.folder.is_dir():
        return QuantkitError(f"The folder {place.folder} cannot be created.", f"{otherwise}.")
    if number == errno.ENOENT and run is not None and _is_below(path, run):
        return QuantkitError(
            f"{shown} is gone.", f"If it was deleted, {_AGAIN}, and what was lost is made again."
        )
    if number == errno.ENOENT:
        return QuantkitError(f"There is no {shown}.", "Check the path.")
    return None


def _full(place: Place, number: int) -> QuantkitError:
    if number == errno.EDQUOT:
        said = f"Your quota on the disk of {place.folder} is used up."
    elif (left := _room(place.folder)) and left[1] < _FEW_FILES and left[0] > _LITTLE_DISK:
        said = f"The disk of {place.folder} cannot hold more files: its inodes are used up."
    else:
        said = f"The disk of {place.folder} is full."
    if place.otherwise.endswith("--out"):  # a run does not move
        return QuantkitError(said, f"Free some space, and {_AGAIN}.")
    return QuantkitError(said, f"Free some space, or {place.otherwise}; then {_AGAIN}.")


def _fullest(known: Sequence[Place]) -> Place:
    """Where a disk was likely full, of an error that does not say: the run's own, unless another
    has next to no room and this one has.
    """
    own = _room(known[0].folder)
    if own is None or own[0] < _LITTLE_DISK or own[1] < _FEW_FILES:
        return known[0]
    rooms = [(found, place) for place in known if (found := _room(place.folder)) is not None]
    little = [
        p for (n_bytes, n_files), p in rooms if n_bytes < _LITTLE_DISK or n_files < _FEW_FILES
    ]
    return little[0] if little else known[0]


def _room(folder: Path) -> tuple[int, int] | None:
    """Free bytes and files of a folder's disk; None where it cannot be asked."""
    for path in (folder, *folder.absolute().parents):
        try:
            found = os.statvfs(path)
        except OSError:
            continue
        n_files = found.f_favail if found.f_files else 1 << 60  # some disks do not count files
        return found.f_bavail * found.f_frsize, n_files
    return None


def _place_of(path: Path, run: Path | None) -> Place:
    """The innermost known place that holds a path, else the path's own folder."""
    holding = [place for place in places(run) if _is_below(path, place.folder)]
    deepest = max(holding, key=lambda place: len(place.folder.absolute().parts), default=None)
    return deepest or Place(path.absolute().parent, "give another path")


def _is_below(path: Any, folder: Path) -> bool:
    inner, outer = (Path(os.path.realpath(os.fsdecode(x))) for x in (path, folder))
    return inner.is_relative_to(outer) or outer.is_relative_to(inner)


def _shown(path: Any) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


# ---- memory

_NO_MEMORY = re.compile(
    r"Cannot allocate memory|can't allocate memory|std::bad_alloc|Unable to allocate"
    r"|[Mm]emory allocation .{0,40}failed|failed to map segment|failed to allocate|out of memory"
    r"|os error 12\b|cannot mmap|failed to mmap",
)
# What is said, or not, by what dies where an allocation has failed.
_VAGUE = re.compile(
    r"llama\.cpp (cannot|failed)|is not one that this llama\.cpp supports|signal \d+|SIG[A-Z]+\b"
    r"| died\b| crashed|was killed|ended without|without (setting an )?exception"
    r"|cannot load any more|shared object|needed more than its|not a whole GGUF",
)


def _of_memory(error: BaseException, needs: int, stage: str) -> QuantkitError | None:
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which not every stage has
        return QuantkitError(
            "The GPU has too little free memory.",
            "End other programs that use it, or resume with QUANTKIT_MEMORY below what it has.",
        )
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or number == errno.ENOMEM or _NO_MEMORY.search(str(error)):
        return QuantkitError(_lacks(needs, stage), _more())
    return None


def _doubted(error: QuantkitError, run: Path | None, needs: int, stage: str) -> QuantkitError:
    """An error whose reason may be another: what fails for want of memory or disk often blames the
    file, or does not know where it was.
    """
    if error.message == "The disk is full.":
        return _full(_fullest(places(run)), errno.ENOSPC)
    if _NO_MEMORY.search(str(error)):
        return QuantkitError(_lacks(needs, stage), _more())
    if _may_be_memory(str(error), error) and _is_tight(needs):
        found = room.free()
        likely = (
            f"A lack of memory is the likely cause: {size(found.n_bytes)} are free {found.bound}."
        )
        return QuantkitError(error.message, f"{likely} {_more()}")
    return error


def _may_be_memory(text: str, error: BaseException) -> bool:
    return isinstance(error, (SystemError, ImportError)) or bool(
        _VAGUE.search(text) or _NO_MEMORY.search(text)
    )


def _is_tight(needs: int) -> bool:
    found = room.free()
    return found.n_bytes < _LITTLE_MEMORY or found.n_bytes + found.own < needs


def _lacks(needs: int, stage: str) -> str:
    found = room.free()
    takes = f", and the {stage} stage takes about {size(needs)}" if needs and stage else ""
    return f"There is too little memory: {size(found.n_bytes)} are free {found.bound}{takes}."


def _more() -> str:
    if room.free().is_limit:
        return f"Raise that limit, and {_AGAIN}."
    return f"End other programs that use memory, or add memory, and {_AGAIN}."


def little_memory(needs: int, stage: str) -> str:
    """Return what to say before a stage that takes more memory than there is; empty where there is
    enough.
    """
    for found in [room.free(), *room.limits()]:
        mapped = _MAPPED if "-v" in found.bound else 0
        if found.n_bytes + found.own < needs + mapped:
            return (
                f"there is little memory: {stage} takes about {size(needs + mapped)}, and"
                f" {size(found.n_bytes + found.own)} are free {found.bound}: it may fail"
            )
    return ""


_MAPPED = 1_000_000_000  # address space of libraries, stacks and arenas, beside what is resident


def ended_for_memory(last: Mapping[str, object]) -> str:
    """Return whether the process whose last words hold these counts of `room.kills` was likely
    ended by the kernel for want of memory: a sentence, or nothing.
    """
    now = room.kills()
    for where, said in (("group", "in this container or group"), ("machine", "on this machine")):
        before = last.get(where)
        if isinstance(before, int) and now.get(where, 0) > before:
            return (
                "It ended without a message, and the kernel has since killed processes for lack of"
                f" memory {said}: it was probably one of them."
            )
    return ""
