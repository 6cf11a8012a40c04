"""Run a command as a plain user, started by root: `python plain_user.py COMMAND...`.

The interpreter may lie below a folder that only root may enter (/root): in a mount namespace of its
own such folders are replaced by empty ones that hold nothing but what is needed.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from pathlib import Path

UID = 12345
_NEWNS, _BIND, _REC, _PRIVATE = 0x00020000, 4096, 16384, 1 << 18


def main(command: list[str]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def mount(source: str, target: str, kind: str, flags: int) -> None:
        if libc.mount(source.encode(), target.encode(), kind.encode(), flags, None) != 0:
            raise OSError(ctypes.get_errno(), f"mount {target}")

    if libc.unshare(_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    mount("none", "/", "", _REC | _PRIVATE)
    needed = [sys.base_prefix, sys.prefix, str(Path(__file__).parents[2])]
    needed += [os.path.dirname(os.path.realpath(x)) for x in command if x.startswith("/")]
    for path in sorted({os.path.realpath(x) for x in needed}, key=len):
        closed = next((p for p in reversed(Path(path).parents) if not _open(p)), None)
        if closed is None:
            continue
        kept = f"/dev/shm/plain-user-{os.getpid()}"
        os.makedirs(kept)
        mount(path, kept, "", _BIND | _REC)
        mount("none", str(closed), "tmpfs", 0)
        os.chmod(closed, 0o755)
        os.makedirs(path)
        mount(kept, path, "", _BIND | _REC)
        libc.umount2(kept.encode(), 2)
        os.rmdir(kept)
    os.setgroups([])
    os.setgid(UID)
    os.setuid(UID)
    os.execv(command[0], command)


def _open(folder: Path) -> bool:
    return bool(folder.stat().st_mode & stat.S_IXOTH)


if __name__ == "__main__":
    main(sys.argv[1:])
