"""The Linux kernel's own interfaces for giving up rights, called through ctypes: prctl, clone with
namespaces, capabilities, mounts and Landlock. Standard library only: it runs inside the child.
"""

from __future__ import annotations

import ctypes
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LINUX = sys.platform == "linux" and sys.maxsize > 2**32
MACHINE = os.uname().machine if LINUX else ""
KNOWN_MACHINE = LINUX and MACHINE in ("x86_64", "aarch64")

_libc = ctypes.CDLL(None, use_errno=True) if LINUX else None

# clone(2) and capabilities differ by machine; everything below 424 does, newer calls do not.
_CLONE = {"x86_64": 56, "aarch64": 220}
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}
_MOUNT_SETATTR = 442
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446

NEW_MOUNTS, NEW_UTS, NEW_IPC = 0x00020000, 0x04000000, 0x08000000
NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18

_SIGCHLD, _SIGKILL = 17, 9
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 36, 38, 47


def call_c(function: str, *arguments: object) -> int:
    """Call a function of the C library. Raises OSError with its errno."""
    result = getattr(_libc, function)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
    return int(result)


def syscall(number: int, *arguments: object) -> int:
    """Make a system call that the C library has no function for. Raises OSError."""
    return call_c("syscall", ctypes.c_long(number), *arguments)


def die_with_parent(parent: int) -> bool:
    """Have the kernel kill this process when its parent ends. False when it has ended already."""
    if LINUX:
        call_c("prctl", _PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    return os.getppid() == parent


def set_not_dumpable() -> None:
    """Keep everybody but the machine's administrator from reading this process through /proc or
    ptrace.
    """
    if LINUX:
        call_c("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)


def set_dumpable() -> None:
    """Undo `set_not_dumpable`, which a process that was just started need not."""
    if LINUX:
        call_c("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of what this process's descendants leave behind."""
    if LINUX:
        call_c("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def set_no_new_privileges() -> None:
    """Keep programs that are started from gaining rights through their files."""
    call_c("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def fork_into(namespaces: int) -> int:
    """Call fork() into new namespaces: 0 in the child, which is alone there. Raises OSError."""
    return syscall(_CLONE[MACHINE], ctypes.c_ulong(namespaces | _SIGCHLD), None, None, None, None)


def map_user(uid: int, gid: int) -> None:
    """Map only the own user in a new user namespace."""
    # Written one after the other: the kernel takes the map of groups only when nobody can drop one.
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"),
                       ("gid_map", f"{gid} {gid} 1")):  # fmt: skip
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Call mount(2). Raises OSError."""
    encoded = [text.encode() or None for text in (source, target, kind)]
    call_c("mount", *encoded, ctypes.c_ulong(flags), options.encode() or None)


def make_read_only(target: str, attributes: int = 0) -> None:
    """Make a mount and all below it read-only and without setuid bits. Raises OSError (Linux <
    5.12).

    mount(2) would have to name every flag that a mount already has; this only adds.
    """
    read_only, no_suid = 1, 2
    values = (ctypes.c_uint64 * 4)(read_only | no_suid | attributes, 0, 0, 0)
    at_fdcwd, recursive = -100, 0x8000
    syscall(
        _MOUNT_SETATTR, at_fdcwd, target.encode(), recursive,
        ctypes.byref(values), ctypes.c_size_t(ctypes.sizeof(values)),
    )  # fmt: skip


def enter_root(folder: str) -> None:
    """Make `folder`, a mount, the root of everything that can be named. Raises OSError."""
    os.chdir(folder)
    syscall(_PIVOT_ROOT[MACHINE], b".", b".")  # the old root now lies over the new one
    detach = 2
    call_c("umount2", b".", detach)
    os.chdir("/")


def drop_capabilities() -> None:
    """Drop all rights of an administrator for good: no program started later can get them back."""
    if os.geteuid() == 0:
        for capability in range(64):
            try:
                call_c("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
            except OSError:  # above the last one, or not ours to drop
                pass
    try:
        call_c("prctl", _PR_CAP_AMBIENT, 4, 0, 0, 0)  # PR_CAP_AMBIENT_CLEAR_ALL
    except OSError:  # Linux < 4.3 has none
        pass
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    syscall(_CAPSET[MACHINE], ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


# Landlock: rights over files, by the version of its interface that brought them.
_EXECUTE, _WRITE, _READ, _LIST = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_FOLDER, _MAKE_FILE = 1 << 7, 1 << 8
_TRUNCATE = 1 << 14
_ALL_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_FILE_RIGHTS = _EXECUTE | _WRITE | _READ | _TRUNCATE | 1 << 15
_REMOVE_FILE, _REMOVE_FOLDER, _MAKE_LINK = 1 << 5, 1 << 4, 1 << 12

READ = _READ | _LIST
# Nothing can be removed or renamed, so that what was written stays countable; no links, no pipes.
WRITE = READ | _WRITE | _TRUNCATE | _MAKE_FILE | _MAKE_FOLDER
SCRATCH = WRITE | _REMOVE_FILE | _REMOVE_FOLDER | _MAKE_LINK


def landlock_version() -> int:
    """Return the version of Landlock's interface; 0 where the kernel has none or it is switched
    off.
    """
    if not LINUX:
        return 0
    try:
        return syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    except OSError:
        return 0


def restrict_files(granted: Iterable[tuple[str, int]], version: int) -> None:
    """Restrict files by Landlock: what is not granted can no longer be opened. Paths that do not
    exist are left out. From version 4 on no TCP port either, from 6 on no signal and no abstract
    socket leads out.
    """
    handled = _ALL_RIGHTS[max(v for v in _ALL_RIGHTS if v <= version)]
    sizes: Sequence[int] = (handled, 3, 3)  # rights over files, over ports, scopes
    n = 1 if version < 4 else 2 if version < 6 else 3
    attributes = (ctypes.c_uint64 * n)(*sizes[:n])
    rules = syscall(
        _LANDLOCK_CREATE, ctypes.byref(attributes), ctypes.c_size_t(8 * n), ctypes.c_uint32(0)
    )
    for path, rights in granted:
        try:
            # O_PATH: named, not opened.
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            allowed = rights & handled & (~0 if os.path.isdir(path) else _FILE_RIGHTS)
            # struct { u64 rights; s32 descriptor; } __attribute__((packed))
            rule = allowed.to_bytes(8, sys.byteorder) + descriptor.to_bytes(4, sys.byteorder)
            beneath = 1
            syscall(_LANDLOCK_ADD, rules, beneath, rule, ctypes.c_uint32(0))
        finally:
            os.close(descriptor)
    syscall(_LANDLOCK_RESTRICT, rules, ctypes.c_uint32(0))
    os.close(rules)
