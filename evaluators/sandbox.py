"""A process that can do no harm, in one file of the standard library: whoever starts it gives it a
job as JSON on stdin and a few descriptors, and it gives up every right before it runs anything.

    python -I -S -B sandbox.py

The file that runs is three processes:

    keeper    what was started: ends the worker when its parent is gone, time or memory is used up
    init      in namespaces of its own where the kernel gives them: its death ends all within
    worker    the one process that sees what a stranger wrote

quantkit starts it for everything that parses a stranger's bytes (`quantkit.sandbox`), `code_scores`
for programs that a model wrote. It is one file so that it can be started by its path alone, with
nothing else to be read, and be judged as a whole. What the kernel grants differs: the worker says
first what is in force, and runs nothing without a filter of system calls and files that are kept
from it, if the job is `strict`.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import os
import resource
import signal
import stat
import sys
from contextlib import contextmanager
from importlib.machinery import PathFinder
from itertools import islice
from select import POLLHUP, POLLIN, poll
from time import monotonic
from types import GeneratorType
from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Any


class Told(NamedTuple):
    """A job as its processes get it: limits (of `limits.Limits`), paths, and descriptors."""

    function: str
    arguments: dict[str, object]
    cpu_seconds: int
    wall_seconds: int
    memory_bytes: int
    file_bytes: int
    n_processes: int
    path: list[str]
    readable: list[str]
    writable: list[str]
    folders: list[str]  # those of `writable`
    mapped_bytes: int
    address_bytes: int | None
    without: list[str]
    inherited: list[int]
    result: int
    verdict: int
    lifeline: int
    home: str = ""
    owns_home: bool = False
    total_bytes: int = 0  # that may lie in `folders`: the keeper adds what is there already
    strict: bool = (
        False  # nothing runs where the kernel does not keep it from files and system calls
    )


class Verdict(NamedTuple):
    """How the worker ended, as its init and its keeper saw it. `why` names a limit."""

    status: int | None = None  # as of wait(2)
    why: str | None = None
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    namespaces: tuple[str, ...] = ()


# ---- the kernel's own interfaces: prctl, clone, capabilities, mounts, Landlock

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


# ---- a file system of the worker's own: an empty root, into which only what it may use is bound

# Every path keeps its name, links on the way included.
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
    mount("", "/", "", MS_REC | MS_PRIVATE)  # nothing below is seen outside
    mount("sandbox", base, "tmpfs", MS_NOSUID | MS_NODEV, "size=4m,nr_inodes=20k,mode=755")
    for path in _outermost(readable):
        _bind(base, path, read_only=True)
    for path in writable:
        _bind(base, path, read_only=False)
    for path in _DEVICES:
        _bind(base, path, read_only=False)
    os.makedirs(base + scratch, exist_ok=True)
    options = f"size={scratch_bytes},nr_inodes=10k,mode=700"
    mount("scratch", base + scratch, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    os.makedirs(f"{base}/proc", exist_ok=True)
    _mount_proc(f"{base}/proc")
    enter_root(base)
    # The root alone: its mounts are read-only or not on purpose.
    mount("", "/", "", MS_REMOUNT | MS_RDONLY | MS_BIND | MS_NOSUID | MS_NODEV)


def _mount_proc(target: str) -> None:
    """This namespace's processes; nothing in a container that hides parts of its own /proc."""
    for options in ("hidepid=ptraceable", ""):  # Linux < 5.8 does not know the word
        try:
            mount("proc", target, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
        except OSError:
            continue
        make_read_only(target)  # for root it holds settings of the whole machine
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
    mount(real, target, "", MS_BIND | MS_REC)
    if read_only:
        make_read_only(target)


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


# ---- the filter of system calls

# BPF over struct seccomp_data (the number at byte 0, the architecture at 4, six arguments of 64
# bits from 16 on). One process is all there is: it may start threads, but neither processes nor
# programs. So limits of the process are limits of the whole tree, and nothing can outlive it.
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000  # the bit of x86-64's second table, whose numbers pass filters of the first
_LAST = 471  # newer calls than this list knows do not exist

# Numbers on x86-64 and on aarch64 (None: it has no such call).
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # the network, and sockets of this machine
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "listen": (50, 201), "accept": (43, 202), "accept4": (288, 242),
    # programs and processes (clone is looked at below)
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, None), "vfork": (58, None),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "kcmp": (312, 272), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "setpgid": (109, 154), "setsid": (112, 157), "setpriority": (141, 140),
    "ioprio_set": (251, 30), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    # large parts of the kernel that nothing here needs
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "bpf": (321, 280), "userfaultfd": (323, 282), "perf_event_open": (298, 241),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "io_setup": (206, 0), "seccomp": (317, 277), "listns": (470, 470),
    "fanotify_init": (300, 262), "fanotify_mark": (301, 263), "lookup_dcookie": (212, 18),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "vmsplice": (278, 75),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443), "syslog": (103, 116),
    "swapon": (167, 224), "swapoff": (168, 225), "nfsservctl": (180, 42), "personality": (135, 92),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162),
    "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None), "uselib": (134, None),
    "ustat": (136, None), "sysfs": (139, None), "vhangup": (153, 58),
    # mounts and namespaces
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "open_tree_attr": (467, 467), "statmount": (457, 457),
    "listmount": (458, 458), "unshare": (272, 97), "setns": (308, 268),
    # who owns a file and who may read it: Landlock does not look at these
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "utimensat": (280, 88), "futimesat": (261, None),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "removexattrat": (466, 466), "file_setattr": (469, 469), "truncate": (76, 45),
    "symlink": (88, None), "symlinkat": (266, 36), "link": (86, None), "linkat": (265, 37),
    "mknod": (133, None), "mknodat": (259, 33), "fallocate": (285, 47),
    # memory and queues that no limit counts
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "shmat": (30, 196), "shmctl": (31, 195), "msgget": (68, 186), "msgsnd": (69, 189),
    "msgrcv": (70, 188), "msgctl": (71, 187), "semget": (64, 190), "semop": (65, 193),
    "semctl": (66, 191), "semtimedop": (220, 192), "mq_open": (240, 180), "mq_unlink": (241, 181),
    "mlock": (149, 228), "mlock2": (325, 284), "mlockall": (151, 230),
    "inotify_init": (253, None), "inotify_init1": (294, 26), "inotify_add_watch": (254, 27),
    # what others would wait for
    "flock": (73, 32), "sync": (162, 81), "syncfs": (306, 267),
    # who one is
    "setuid": (105, 146), "setgid": (106, 144), "setreuid": (113, 145), "setregid": (114, 143),
    "setresuid": (117, 147), "setresgid": (119, 149), "setfsuid": (122, 151),
    "setfsgid": (123, 152), "setgroups": (116, 159), "capset": (126, 91),
}  # fmt: skip
# Names of files in a folder that is written into. Landlock keeps them where the kernel has it.
_NAMES: dict[str, tuple[int | None, int | None]] = {
    "unlink": (87, None), "unlinkat": (263, 35), "rmdir": (84, None), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276),
}  # fmt: skip
# The C library goes on with an older call when these do not exist.
_ABSENT = {"clone3": (435, 435), "openat2": (437, 437)}

_CLONE_THREAD, _NEW_NAMESPACES = 0x00010000, 0x7E020080
_O_TMPFILE, _O_TRUNC, _O_ACCMODE = 0o20000000, 0o1000, 0o3
# Names, and what only looks: a debugger's rights, death signals and the like are not among them.
_PRCTL = (3, 15, 16, 21, 23, 27, 30, 39, 0x53564D41)
# F_SETOWN, F_SETSIG, F_SETOWN_EX: signals to others. F_SETLK, F_SETLKW, the same of an open file,
# F_SETLEASE: others wait. F_NOTIFY. F_SETPIPE_SZ: what pipes hold is memory that no limit counts.
_FCNTL_DENIED = (8, 10, 15, 6, 7, 37, 38, 1024, 1026, 1031)
# Is it a terminal and how wide, how much is there to read, does it wait, is it inherited.
_IOCTL = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
_MAP_ANONYMOUS, _MAP_KIND, _MAP_SHARED = 0x20, 0x0F, (0x01, 0x03)

_LOAD, _EQUAL, _GREATER, _ANY, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000

_Code = list[tuple[int, int, int, int]]  # operation, jump when true, jump when false, value


def _refusal(number: int) -> tuple[int, int, int, int]:
    return (_RETURN, 0, 0, _ERRNO | number)


_DENY, _NOT_THERE = _refusal(errno.EPERM), _refusal(errno.ENOSYS)
_PASS = (_RETURN, 0, 0, _ALLOW)


def _argument(index: int) -> tuple[int, int, int, int]:
    """Load the low half of an argument (both machines are little-endian)."""
    return (_LOAD, 0, 0, 16 + 8 * index)


def _when(number: int | None, code: _Code) -> _Code:
    """`code`, which returns, for one system call. The number is loaded and stays loaded after."""
    return [(_EQUAL, 0, len(code), number), *code] if number is not None else []


def _only(index: int, values: tuple[int, ...]) -> _Code:
    """Allow where an argument is one of `values`."""
    return [_argument(index), *_each(values, _PASS), _DENY]


def _but(index: int, values: tuple[int, ...]) -> _Code:
    """Allow where an argument is none of `values`."""
    return [_argument(index), *_each(values, _DENY), _PASS]


def _each(values: tuple[int, ...], then: tuple[int, int, int, int]) -> _Code:
    return [step for value in values for step in ((_EQUAL, 0, 1, value), then)]


def _opening(index: int) -> _Code:
    """Files without a name cannot be counted; to truncate without writing is not Landlock's."""
    return [
        _argument(index),
        (_ANY, 0, 1, _O_TMPFILE),
        _DENY,
        (_AND, 0, 0, _O_TRUNC | _O_ACCMODE),
        (_EQUAL, 0, 1, _O_TRUNC),
        _DENY,
        _PASS,
    ]


def _mapping(index: int) -> _Code:
    """Shared memory without a file can be put out of the sight of whoever counts a process's."""
    return [
        _argument(index),
        (_ANY, 1, 0, _MAP_ANONYMOUS),
        _PASS,
        (_AND, 0, 0, _MAP_KIND),
        *_each(_MAP_SHARED, _DENY),
        _PASS,
    ]


def filter_program(machine: str, own: int, keeps_names: bool = False) -> _Code:
    """Return the filter for a process with the number `own`; with `keeps_names` it can neither
    remove nor rename a file.
    """
    column = ("x86_64", "aarch64").index(machine)

    def number(x86_64: int | None, aarch64: int | None) -> int | None:
        return (x86_64, aarch64)[column]

    code: _Code = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, _ARCHITECTURE[machine]),
        _DENY,
        (_LOAD, 0, 0, 0),
    ]
    if machine == "x86_64":
        code += [(_GREATER, 0, 1, _X32), _DENY]
    code += [(_GREATER, 0, 1, _LAST + 1), _NOT_THERE]
    threads_only: _Code = [
        _argument(0),
        (_ANY, 0, 1, _NEW_NAMESPACES),
        _DENY,
        (_ANY, 1, 0, _CLONE_THREAD),
        _DENY,
        _PASS,
    ]
    code += _when(number(56, 220), threads_only)
    code += _when(number(257, 56), _opening(2)) + _when(number(2, None), _opening(1))
    code += _when(number(62, 129), _only(0, (own,)))  # kill
    code += _when(number(234, 131), _only(0, (own,)))  # tgkill
    code += _when(number(302, 261), _only(0, (0, own)))  # prlimit64
    code += _when(number(157, 167), _only(0, _PRCTL))
    code += _when(number(72, 25), _but(1, _FCNTL_DENIED))
    code += _when(number(16, 29), _only(1, _IOCTL))
    code += _when(number(9, 222), _mapping(3))
    for denied in (*_DENIED.values(), *(_NAMES.values() if keeps_names else ())):
        code += _when(denied[column], [_DENY])
    for absent in _ABSENT.values():
        code += _when(absent[column], [_NOT_THERE])
    return [*code, _PASS]


class _Instruction(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    ]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("code", ctypes.POINTER(_Instruction))]


def filter_calls(keeps_names: bool = False) -> None:
    """Filter this process from now on. Raises OSError where the kernel has no seccomp."""
    if not KNOWN_MACHINE:
        raise OSError(errno.ENOSYS, f"no filter is written for {MACHINE}")
    code = [_Instruction(*step) for step in filter_program(MACHINE, os.getpid(), keeps_names)]
    array = (_Instruction * len(code))(*code)
    filter_mode = 2
    set_no_new_privileges()
    call_c("prctl", 22, filter_mode, ctypes.byref(_Program(len(code), array)), 0, 0)


# ---- what the worker uses, as its keeper sees it

# Of a folder that is written into; an empty file takes a place on the disk, too.
_MOST_FILES, _MOST_DEPTH, _LEAST_BYTES = 50_000, 8, 4096


def _only_child(init: int) -> int | None:
    """Return the worker's process id as seen from here."""
    try:
        with open(f"/proc/{init}/task/{init}/children") as file:
            numbers = file.read().split()
    except OSError:
        return None
    return int(numbers[0]) if numbers else None


def _too_much(number: int, job: Told) -> str | None:
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


# ---- the worker

_SPARE_BYTES = 16 * 2**30  # of address space that is reserved and not used: stacks, libraries
SCRATCH_BYTES = 64 * 2**20
_result = -1


def tell(**facts: Any) -> None:
    """Send facts to the parent while the function still works."""
    if _result >= 0:
        _say("facts", facts)


def _say(kind: str, content: object, **more: object) -> None:
    """Send a `process.Message`."""
    data = memoryview(json.dumps({"kind": kind, "content": content, **more}).encode() + b"\n")
    while data:
        data = data[os.write(_result, data) :]


def _work(job: Told, flags: int) -> None:
    """Run the job, and never return."""
    global _result
    _result = job.result
    try:
        os.chdir(job.home)
    except OSError:  # there was no place to make one
        os.chdir("/")
    _set_limits(job, namespaces=bool(flags & NEW_USER))
    _close_others({1, 2, _result, *job.inherited})
    sys.path[:] = job.path
    # Of the folder that a package stands in only the package may be readable: its finder has to
    # have listed it before. Nothing is imported.
    PathFinder.find_spec(job.function.partition(".")[0])
    granted = _restrict(job, flags)
    _say("in force", granted)
    if job.strict and not is_safe(granted, bool(flags & NEW_MOUNTS)):
        os._exit(0)
    _know_temporary_folder(job.home)
    try:
        module, _, name = job.function.partition(":")
        value = getattr(importlib.import_module(module), name)(**job.arguments)
        if isinstance(value, GeneratorType):
            for part in value:
                _say("part", part)
            value = None
        _say("value", value)
    except SystemExit as error:
        code = 0 if error.code is None else error.code if isinstance(error.code, int) else 1
        _say("exit", code, message=str(error.code)[:4000])
    except BaseException as error:
        _say(  # first: MemoryError leaves little room
            "error",
            type(error).__name__,
            message=str(getattr(error, "message", error))[:4000],
            remedy=str(getattr(error, "remedy", ""))[:4000],
            ours=any(c.__name__ == "QuantkitError" for c in type(error).__mro__),
        )
        import traceback

        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            pass
    if "logging" in sys.modules:
        sys.modules["logging"].shutdown()
    os._exit(0)


def is_safe(granted: dict[str, int], mounts: bool) -> bool:
    """Return whether the kernel, and not only Python, keeps a worker from sockets, programs and
    other files; `granted` is what it said, `mounts` whether it has a file system of its own.
    """
    return bool(granted["seccomp"]) and bool(granted["landlock"] or mounts)


def run_file(path: str) -> None:
    """Run a Python file as a program."""
    import runpy

    runpy.run_path(path, run_name="__main__")


def _know_temporary_folder(home: str) -> None:
    """Libraries ask for it when they are imported, and look for it by writing: they are told.
    Without a file system of its own it is a name alone: what is written there could not be bounded.
    """
    import tempfile

    tempfile.tempdir = home


def _set_limits(job: Told, namespaces: bool) -> None:
    """Set hard limits of the kernel, which can only be lowered. A second after the soft limit of
    processor time (SIGXCPU, which tells the parent what happened) comes the hard one (SIGKILL).
    """
    memory = job.memory_bytes + job.mapped_bytes
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_CPU, job.cpu_seconds, job.cpu_seconds + 1)
    # One file; the keeper sums them up. What writes nowhere still has its folder in memory, and
    # may have inherited a file there.
    scratch = 0 if job.writable else SCRATCH_BYTES
    _lower(resource.RLIMIT_FSIZE, max(job.file_bytes, scratch))
    _lower(resource.RLIMIT_DATA, memory)
    if LINUX:  # macOS has mapped more before anything begins, and refuses
        _lower(resource.RLIMIT_AS, job.address_bytes or memory + _SPARE_BYTES)
    _lower(resource.RLIMIT_NOFILE, 1024)
    if namespaces and sys.platform == "linux":  # elsewhere it would count the user's other programs
        _lower(resource.RLIMIT_NPROC, job.n_processes)


def _lower(which: int, soft: int, hard: int | None = None) -> None:
    now_soft, now_hard = resource.getrlimit(which)

    def least(wanted: int, now: int) -> int:
        return wanted if now == resource.RLIM_INFINITY else min(wanted, now)

    hard = least(soft if hard is None else hard, now_hard)
    resource.setrlimit(which, (min(least(soft, now_soft), hard), hard))


def _close_others(kept: set[int]) -> None:
    last = 0
    for descriptor in sorted(kept):
        os.closerange(last, descriptor)
        last = descriptor + 1
    os.closerange(last, 65536)
    os.open(os.devnull, os.O_RDONLY)  # stdin


def _restrict(job: Told, flags: int) -> dict[str, int]:
    """Give up files, rights, sockets, programs and processes. Return by which means, as
    `in_force.Protection` has it.
    """
    found: dict[str, int] = {"landlock": 0, "seccomp": False, "capabilities": False}
    if LINUX:
        set_no_new_privileges()
        if KNOWN_MACHINE:
            drop_capabilities()
            found["capabilities"] = True
        version = landlock_version()
        if version and "landlock" not in job.without:
            restrict_files(_granted(job, flags), version)
            found["landlock"] = version
    sys.addaudithook(_refuse)
    if "seccomp" in job.without:
        return found
    try:
        # A file without a name is not counted.
        filter_calls(keeps_names=bool(job.folders) and not found["landlock"])
        found["seccomp"] = True
    except OSError:  # then it is not said to be in force
        pass
    return found


def _granted(job: Told, flags: int) -> list[tuple[str, int]]:
    granted = [(path, WRITE) for path in job.writable]
    if flags & NEW_MOUNTS:  # nothing else can be named anyway, but for the kernel's own
        granted += [(f"/{name}", READ) for name in os.listdir("/") if name != "proc"]
        granted.append((job.home, SCRATCH))
    granted += [(path, READ) for path in job.readable]
    granted += [(f"/proc/{os.getpid()}", READ), ("/proc/self", READ)]
    granted += [("/dev/null", READ | WRITE)]
    for device in ("random", "urandom"):
        granted.append((f"/dev/{device}", READ))
    for name in ("cpuinfo", "meminfo", "stat", "filesystems"):
        granted.append((f"/proc/{name}", READ))
    return granted


_REFUSED = ("socket.", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")


def _refuse(event: str, _arguments: Any) -> None:
    """The same within Python, for a sentence that says it, and where there is no filter."""
    if event.startswith(_REFUSED) and event != "socket.gethostname":
        raise PermissionError(f"{event} is denied in the sandbox")


# ---- starting it


def start(
    told: Mapping[str, object],
    environment: Mapping[str, str],
    descriptors: Iterable[int],
    output: int,
    script: str = __file__,
) -> subprocess.Popen[bytes]:
    """Start this file, or another script of the standard library alone, in a session of its own
    with `told` (a `Told`) as JSON on its stdin. It inherits nothing but `environment` and
    `descriptors`; `output` is its stdout and stderr.
    """
    import subprocess

    with in_memory(told) as stdin:
        return subprocess.Popen(
            # -I: no PYTHON* variables, no current folder. -S: no .pth file is run. -B: nothing is
            # written beside the code.
            [sys.executable, "-I", "-S", "-B", script],
            env=environment,
            cwd="/",
            stdin=stdin,
            stdout=output,
            stderr=output,
            pass_fds=tuple(descriptors),
            start_new_session=True,
        )


@contextmanager
def in_memory(told: Mapping[str, object]) -> Iterator[int]:
    """Yield the descriptor of an unnamed file that holds `told` as JSON, to be read from its
    beginning.
    """
    import tempfile

    number = os.memfd_create("job") if hasattr(os, "memfd_create") else None  # Linux has it
    with tempfile.TemporaryFile() if number is None else os.fdopen(number, "w+b") as file:
        file.write(json.dumps(told).encode())
        file.seek(0)
        yield file.fileno()


def import_path() -> tuple[str, ...]:
    """Return where installed modules come from: the standard library and packages. Neither the
    current folder nor PYTHONPATH is among them, and no .pth file is looked at again.
    """
    import site

    homes = [sys.prefix, sys.base_prefix, sys.base_exec_prefix, *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        homes.append(site.getusersitepackages())
    homes = [home.rstrip("/") + "/" for home in homes]
    return tuple(
        text
        for text in dict.fromkeys(sys.path)
        if text and os.path.exists(text) and f"{text}/".startswith(tuple(homes))
    )


def interpreter() -> tuple[str, ...]:
    """Return what every job has to read: the system's libraries, the interpreter, its packages."""
    libraries = [x for x in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if x]
    found = [*_SYSTEM, sys.prefix, sys.base_prefix, sys.base_exec_prefix, *libraries]
    found += [*import_path(), os.path.realpath(sys.executable)]
    return tuple(dict.fromkeys(x for text in found for x in (text, os.path.realpath(text))))


_SYSTEM = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/nix/store",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/usr/share/zoneinfo",
    "/sys/devices/system",
)


# ---- the keeper

_POLL_SECONDS = 0.05

# From the strongest down: the first that the kernel grants is used.
_ISOLATED = NEW_PID | NEW_NET | NEW_IPC | NEW_UTS
_LADDER = (
    (True, _ISOLATED | NEW_MOUNTS),  # only root needs no user namespace
    (False, _ISOLATED | NEW_MOUNTS | NEW_USER),
    (True, _ISOLATED),
    (False, _ISOLATED | NEW_USER),
)


def main() -> None:
    """Keep the worker, and never return."""
    with open(0, "rb", closefd=False) as file:
        job = Told(**json.load(file))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    there = sum(bytes_below(folder) or 0 for folder in job.folders)
    job = job._replace(total_bytes=there + job.file_bytes)
    init, told, flags = _start(job)
    set_not_dumpable()
    os.close(job.result)
    verdict = _keep(job, init, told)._replace(namespaces=_names(flags))
    if job.owns_home:
        try:
            os.rmdir(job.home)  # the parent may be gone
        except OSError:
            pass
    os.write(job.verdict, json.dumps(verdict._asdict()).encode())
    os._exit(0)


def _names(flags: int) -> tuple[str, ...]:
    known = {
        "user": NEW_USER,
        "pid": NEW_PID,
        "network": NEW_NET,
        "ipc": NEW_IPC,
        "mount": NEW_MOUNTS,
    }
    return tuple(name for name, flag in known.items() if flags & flag)


def _start(job: Told) -> tuple[int, int, int]:
    """Fork an init. Returns its number, a pipe that tells of its worker, and its namespaces."""
    possible = KNOWN_MACHINE and "namespaces" not in job.without
    for needs_root, flags in _LADDER if possible else ():
        if needs_root and os.geteuid() != 0:
            continue
        if flags & NEW_MOUNTS and "mounts" in job.without:
            continue
        try:
            started = _attempt(job, flags)
        except OSError:
            continue
        if started is not None:
            return *started, flags
    started = _attempt(job, 0)
    if started is None:
        os._exit(1)
    return *started, 0


def _attempt(job: Told, flags: int) -> tuple[int, int] | None:
    """An init in these namespaces, or None when they cannot be set up."""
    ids, keeper = (os.getuid(), os.getgid()), os.getpid()
    reading, writing = os.pipe()
    pid = fork_into(flags) if flags else os.fork()
    if pid == 0:
        try:
            os.close(reading)
            _init(job, flags, ids, keeper, writing)
        finally:
            os._exit(1)
    os.close(writing)
    if os.read(reading, 1) == b"+":
        return pid, reading
    os.close(reading)
    os.waitpid(pid, 0)
    return None


def _init(job: Told, flags: int, ids: tuple[int, int], keeper: int, writing: int) -> None:
    """Set the namespaces up, start the worker, wait for it, and tell how it ended."""
    if not LINUX:
        os.setpgid(0, 0)  # whoever ends it ends its worker
    alone = bool(flags & NEW_PID)  # its parent is out of sight then
    if not die_with_parent(0 if alone else keeper):
        return
    if flags & NEW_USER:
        map_user(*ids)
    if flags & NEW_MOUNTS:
        make_root(job.readable, job.writable, job.home, SCRATCH_BYTES)
    set_not_dumpable()
    own = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            if die_with_parent(own):
                _work(job, flags)
        finally:
            os._exit(1)
    os.close(job.result)
    os.write(writing, b"+")  # fails when the keeper is gone
    _, status, used = os.wait4(child, 0)
    seen = Verdict(
        status,
        cpu_seconds=round(used.ru_utime + used.ru_stime, 3),
        peak_bytes=used.ru_maxrss * (1024 if sys.platform == "linux" else 1),
    )
    os.write(writing, json.dumps(seen._asdict()).encode())


def _keep(job: Told, init: int, told: int) -> Verdict:
    """Wait for the end of the worker, or bring it about. Returns what is known about it."""
    deadline = monotonic() + job.wall_seconds
    events = poll()
    events.register(job.lifeline, POLLIN | POLLHUP)
    events.register(told, POLLIN | POLLHUP)
    number: int | None = None
    why: str | None = None
    while why is None:
        ready = {descriptor for descriptor, _ in events.poll(1000 * _POLL_SECONDS)}
        if told in ready:
            break
        if job.lifeline in ready:
            why = "parent"
        elif monotonic() > deadline:
            why = "wall"
        else:
            number = number or _only_child(init)
            why = _too_much(number or 0, job)  # of 0 there is nothing to be read
    if why is not None:
        (os.kill if LINUX else os.killpg)(init, signal.SIGKILL)
    elif writes_too_much(job):
        why = "bytes"  # all of it was written since the last look
    text = b"" if why is not None else os.read(told, 2**16)
    os.waitpid(init, 0)
    seen = Verdict(**json.loads(text)) if text else Verdict()
    return seen._replace(why=why)


if __name__ == "__main__":
    sys.modules["evaluators.sandbox"] = sys.modules[__name__]  # what runs in it asks for it by name
    main()
