"""Find out how much memory this process can still take, and whether the kernel has killed others
for lack of it.

The machine, every control group above us (of version 1 and 2) and our own `ulimit` may each be what
there is least of.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
_NO_LIMIT = 1 << 60  # version 1 writes a number of this size where there is none


@dataclass(frozen=True)
class Free:
    """Bytes that may still be taken, what sets that bound, as in "by `ulimit -v`", and what this
    process has of it already.
    """

    n_bytes: int
    bound: str
    own: int = 0

    @property
    def is_limit(self) -> bool:
        """Return whether it is a `ulimit`, under which an allocation fails where it is made."""
        return "ulimit" in self.bound


def free() -> Free:
    """Return the least that the machine, our control groups and our limits leave; a large number
    where the system does not say.
    """
    return min([*_machine(), *_groups(), *limits()], key=lambda x: x.n_bytes, default=_PLENTY)


_PLENTY = Free(1 << 62, "on this machine")


def give_back() -> None:
    """Give memory that is no longer used back to the system, where its C library can: glibc keeps
    half a gigabyte after a model was loaded and dropped.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def limits() -> list[Free]:
    """Return what `ulimit` leaves of address space and data; the resident set's is a wish, and
    kept.
    """
    import resource

    taken = _own()
    kinds = {
        "-v": (resource.RLIMIT_AS, taken.vms),
        "-m": (resource.RLIMIT_RSS, taken.rss),
        "-d": (resource.RLIMIT_DATA, getattr(taken, "data", 0)),  # Linux alone tells it
    }
    found = []
    for option, (kind, n_bytes) in kinds.items():
        soft = resource.getrlimit(kind)[0]
        if soft != resource.RLIM_INFINITY:
            found.append(Free(max(0, soft - n_bytes), f"by `ulimit {option}`", n_bytes))
    return found


def _own() -> Any:
    """What this process has; zeros where the system does not tell."""
    try:
        return psutil.Process().memory_info()
    except (psutil.Error, OSError):
        return SimpleNamespace(rss=0, vms=0)


def kills() -> dict[str, int]:
    """Return how many processes the kernel has ended for want of memory: in our own group, and on
    the machine since it started. What is not known is not there.
    """
    found = {}
    for folder in _own_groups():
        for name in ("memory.events", "memory.oom_control"):
            counts = _table(folder / name)
            if "oom_kill" in counts:
                found["group"] = counts["oom_kill"]
                break
        if "group" in found:
            break
    machine = _table(_PROC / "vmstat")
    return found | ({"machine": machine["oom_kill"]} if "oom_kill" in machine else {})


def _machine() -> Iterator[Free]:
    try:
        yield Free(psutil.virtual_memory().available, "on this machine", _own().rss)
    except (psutil.Error, OSError):
        return


def _groups() -> Iterator[Free]:
    """Of every group above us that has a limit. Pages of files are given up when they are needed.

    A group whose files cannot be read sets no bound.
    """
    for folder in _own_groups():
        for limit, usage, inactive in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                said, used = ((folder / name).read_text("utf-8").strip() for name in (limit, usage))
                if said == "max" or int(said) >= _NO_LIMIT:
                    continue
                cached = _table(folder / "memory.stat").get(inactive, 0)
                yield Free(
                    max(0, int(said) - int(used) + cached),
                    "in this container or group",
                    _own().rss,
                )
            except (OSError, ValueError):
                continue


def _own_groups() -> Iterator[Path]:
    """Folders of our memory group and of all above it, innermost first. In a container the path is
    the host's and not there: then the top is ours.
    """
    tops = {_CGROUP, _CGROUP / "memory", _CGROUP / "unified"}
    own = [""]
    try:
        for line in (_PROC / "self" / "cgroup").read_text("utf-8").splitlines():
            _, kinds, path = line.split(":", 2)
            if not kinds or "memory" in kinds.split(","):
                own.append(path)
    except (OSError, ValueError):
        pass
    seen = set()
    for top in sorted(tops):
        for path in sorted(own, key=len, reverse=True):
            folder = top / path.strip("/")
            for group in (folder, *folder.parents):
                if not group.is_relative_to(top):
                    break
                if group not in seen and group.is_dir():
                    seen.add(group)
                    yield group


def _table(path: Path) -> dict[str, int]:
    """`name number` lines; empty where there are none."""
    try:
        lines = [line.split() for line in path.read_text("utf-8").splitlines()]
        return {words[0]: int(words[1]) for words in lines if len(words) == 2}
    except (OSError, ValueError):
        return {}
