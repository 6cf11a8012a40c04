"""A file system of the child's own: an empty root, into which only what it may use is bound.

Every path keeps its name, links on the way included. Standard library only: runs in the child.
"""

from __future__ import annotations

import os

from quantkit.sandbox import kernel
from quantkit.sandbox.kernel import MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_PRIVATE, MS_REC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_DEVICES = ("/dev/null", "/dev/random", "/dev/urandom")
_LONGEST_CHAIN = 40  # of links


# Any folder that holds nothing that is bound: the new root grows over it.
_BASE = "/proc"


def make_root(
    readable: Sequence[str], writable: Sequence[str], scratch: str, scratch_bytes: int
) -> None:
    """Leave nothing to be named but `readable`, `writable`, a few devices, a /proc that shows this
    pid namespace alone, and `scratch`, a folder in memory of at most `scratch_bytes`. Raises
    OSError where the kernel or a container does not allow it.
    """
    base = _BASE
    kernel.mount("", "/", "", MS_REC | MS_PRIVATE)  # nothing below is seen outside
    kernel.mount("sandbox", base, "tmpfs", MS_NOSUID | MS_NODEV, "size=4m,nr_inodes=20k,mode=755")
    for path in _outermost(readable):
        _bind(base, path, read_only=True)
    for path in writable:
        _bind(base, path, read_only=False)
    for path in _DEVICES:
        _bind(base, path, read_only=False)
    os.makedirs(base + scratch, exist_ok=True)
    options = f"size={scratch_bytes},nr_inodes=10k,mode=700"
    kernel.mount("scratch", base + scratch, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    os.makedirs(f"{base}/proc", exist_ok=True)
    _mount_proc(f"{base}/proc")
    kernel.enter_root(base)
    # The root alone: its mounts are read-only or not on purpose.
    kernel.mount("", "/", "", kernel.MS_REMOUNT | kernel.MS_RDONLY | MS_BIND | MS_NOSUID | MS_NODEV)


def _mount_proc(target: str) -> None:
    """This namespace's processes; nothing in a container that hides parts of its own /proc."""
    for options in ("hidepid=ptraceable", ""):  # Linux < 5.8 does not know the word
        try:
            kernel.mount("proc", target, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
        except OSError:
            continue
        kernel.make_read_only(target)  # for root it holds settings of the whole machine
        return


def _outermost(paths: Iterable[str]) -> list[str]:
    """Without what another one already holds, once each."""
    kept: list[str] = []
    for path in sorted(set(paths), key=lambda p: p.rstrip("/") + "/"):
        if not (kept and f"{path}/".startswith(kept[-1].rstrip("/") + "/")):
            kept.append(path)
    return kept


def _bind(base: str, path: str, read_only: bool) -> None:
    """Show `path` under the new root, by its own name. What is not there stays out."""
    real = _with_links(base, path)
    if real is None:
        return
    target = base + real
    if os.path.isdir(real):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if not os.path.lexists(target):
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    kernel.mount(real, target, "", MS_BIND | MS_REC)
    if read_only:
        kernel.make_read_only(target)


def _with_links(base: str, path: str) -> str | None:
    """The real path that `path` names, after making the links on its way in the new root."""
    for _ in range(_LONGEST_CHAIN):
        parts = path.strip("/").split("/")
        for i in range(1, len(parts) + 1):
            head = "/" + "/".join(parts[:i])
            if os.path.islink(head):
                target = os.readlink(head)
                os.makedirs(os.path.dirname(base + head), exist_ok=True)
                if not os.path.lexists(base + head):
                    os.symlink(target, base + head)
                rest = os.path.join(os.path.dirname(head), target, *parts[i:])
                path = os.path.normpath(rest)
                break
        else:
            return path if os.path.exists(path) else None
    return None
