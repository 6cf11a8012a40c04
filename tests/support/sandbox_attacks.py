"""What code in the sandbox tries: a worker that a parser's bug gave to a stranger. Imported inside.

Each attack returns what it got, or raises, or returns None: then it did not get through.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_X86 = platform.machine() == "x86_64"


def call(number: int, *arguments: Any) -> int:
    """A system call by its number on x86-64. Raises OSError."""
    result = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)


def begun(number: int, *arguments: Any) -> str | None:
    """Whether a call that cannot succeed like this was at least begun: it failed for another
    reason than being forbidden or unknown.
    """
    result = _libc.syscall(ctypes.c_long(number), *arguments)
    error = ctypes.get_errno()
    return None if result < 0 and error in (1, 13, 38) else f"{number}: {result}, errno {error}"


def any_of(attempts: list[Callable[[], Any]]) -> list[Any]:
    got = []
    for attempt in attempts:
        try:
            found = attempt()
        except (OSError, ValueError, MemoryError, AttributeError):
            continue
        if found is not None:
            got.append(found)
    return got or []


def write(path: str, flags: int = 0) -> str:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o644))
    return f"wrote {path}"


def read(path: str) -> str:
    with open(path, "rb") as file:
        return f"{path}: {file.read(20)!r}"


def processes(*known: int) -> list[int]:
    seen = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return sorted({*seen, *known, os.getppid()} - {os.getpid(), 0})


def attacks(secret: str, outside: str, parent: int, writable: str) -> dict[str, Callable[[], Any]]:
    """By name. `secret` is a file of the parent's that is open there, too."""
    me = os.getpid()
    try:
        others = processes(parent, 1)
    except OSError:
        others = [parent, 1, os.getppid()]
    buffer = ctypes.create_string_buffer(64)

    def environment_of_others() -> Any:
        texts = any_of([lambda p=p: Path(f"/proc/{p}/environ").read_bytes() for p in others])
        return [t for t in texts if b"hf_" in t] or None

    def memory_of_others() -> Any:
        return any_of([lambda p=p: open(f"/proc/{p}/mem", "r+b") and p for p in others])

    def files_of_others() -> Any:
        return any_of([lambda p=p: os.listdir(f"/proc/{p}/fd") for p in others])

    def descriptors_of_others() -> Any:
        return any_of(
            [lambda p=p, n=n: read(f"/proc/{p}/fd/{n}") for p in others for n in range(3, 12)]
        )

    def code_32_bit() -> Any:
        """socket() through the table of 32-bit programs: int 0x80 in machine code."""
        own = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        page = mmap.mmap(-1, 4096, own, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        # push rbx; mov eax, 359; mov ebx, 2; mov ecx, 1; xor edx, edx; int 0x80; pop rbx; ret
        page.write(bytes.fromhex("53b867010000bb02000000b90100000031d2cd805bc3"))
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        result = ctypes.CFUNCTYPE(ctypes.c_int)(address)()
        return result if result >= 0 else None

    def raised_limits() -> Any:
        def higher(which: int) -> Any:
            soft, hard = resource.getrlimit(which)
            resource.setrlimit(which, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return None if hard == resource.RLIM_INFINITY else which

        names = ("CPU", "AS", "DATA", "FSIZE", "NOFILE", "CORE")
        return any_of([lambda n=n: higher(getattr(resource, f"RLIMIT_{n}")) for n in names])

    def foreign_descriptors() -> Any:
        kinds = {n: os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")}
        own = ("/dev/null", "pipe:", f"/proc/{me}", "/proc/self")
        return {n: k for n, k in kinds.items() if not k.startswith(own)} or None

    def more_than_allowed() -> Any:
        target = os.path.join(writable, "sparse")
        with open(target, "wb") as file:
            file.truncate(2**30)
        return "1 GiB"

    def code_folders() -> Any:
        places = [*sys.path, str(Path(__file__).parent), "/", "/etc", "/usr/lib", "/var/tmp"]
        places += [os.path.expanduser("~root"), "/dev/shm", "/dev", "/proc/self", "/run"]
        return any_of([lambda p=p: write(f"{p}/attack.pth") for p in places])

    def owner_and_times() -> Any:
        return any_of(
            [
                lambda: os.chmod(secret, 0o666) or "chmod",
                lambda: os.chown(secret, os.getuid(), os.getgid()) or "chown",
                lambda: os.utime(secret) or "utime",
                lambda: os.setxattr(secret, "user.attack", b"x") or "xattr",
                lambda: os.truncate(secret, 0) or "truncate",
                lambda: os.close(os.open(secret, os.O_RDONLY | os.O_TRUNC)) or "O_TRUNC",
                lambda: os.unlink(secret) or "unlink",
                lambda: os.rename(secret, secret + ".x") or "rename",
                lambda: os.chmod(outside, 0o777) or "chmod of a folder",
            ]
        )

    def tricks_with_names() -> Any:
        name = os.path.join(writable, "trick")
        return any_of(
            [
                lambda: os.link(secret, name + "-hard") or "hard link",
                lambda: os.symlink(secret, name + "-soft") or "link",
                lambda: os.mkfifo(name + "-pipe") or "fifo",
                lambda: os.mknod(name + "-node", 0o140644) or "socket",
                lambda: os.open(writable, os.O_TMPFILE | os.O_RDWR) and "file without a name",
                lambda: os.rename(writable, writable + "-moved") or "moved the folder",
            ]
        )

    def memory_out_of_sight() -> Any:
        """Pages of shared memory stay when a process lets go of them, and are no longer its own."""
        kinds: list[Callable[[], mmap.mmap]] = [
            lambda: mmap.mmap(-1, 4096),
            lambda: mmap.mmap(os.open("/dev/zero", os.O_RDWR), 4096),
        ]
        return any_of([lambda k=k: k().madvise(mmap.MADV_DONTNEED) or "shared" for k in kinds])

    def memory_in_pipes() -> Any:
        size = 2**19
        return any_of([lambda: fcntl.fcntl(os.pipe()[1], 1031, size)])  # F_SETPIPE_SZ

    def ways_without_walls() -> Any:
        """Links that the kernel follows by itself, and what it tells of itself."""
        names = [f"/proc/{p}/{n}{secret}" for p in ("self", "thread-self", 1) for n in ("root",)]
        names += [f"/proc/self/cwd/../../../../../..{secret}", "/proc/1/environ", "/proc/1/maps"]
        names += ["/proc/kcore", "/proc/kmsg", "/proc/sysrq-trigger", "/dev/kmsg"]
        return any_of([lambda n=n: read(n) for n in names])

    def own_entry() -> Any:
        names = ("oom_score_adj", "coredump_filter", "comm", "mem", "clear_refs", "uid_map")
        names += ("gid_map", "setgroups", "attr/current", "attr/exec", "loginuid", "timerslack_ns")
        return any_of(
            [
                lambda p=p, n=n: os.close(os.open(f"/proc/{p}/{n}", os.O_WRONLY)) or n
                for n in names
                for p in ("self", me, 1, parent)
            ]
        )

    def files_without_names() -> Any:
        """What is written to them is in no folder."""
        path = os.path.join(writable, "vanishing")
        open(path, "ab").close()
        return any_of(
            [
                lambda: os.rename(path, path + "-2") or "renamed",
                lambda: os.replace(path, writable + "/sparse") or "replaced",
                lambda: os.unlink(path) or "removed",
                lambda: os.remove(path + "-2") or "removed",
            ]
        )

    def rights_of_its_owner() -> Any:
        """A program that would run as whoever started this."""
        os.umask(0)
        descriptor = os.open(os.path.join(writable, "set-id"), os.O_CREAT | os.O_RDWR, 0o6777)
        os.write(descriptor, b"\x7fELF")
        mode = os.fstat(descriptor).st_mode
        return oct(mode) if mode & 0o6000 else None

    def waits_of_others() -> Any:
        code, own = open(os.__file__, "rb"), open(os.path.join(writable, "locked"), "ab")
        return any_of(
            [
                lambda: fcntl.flock(code, fcntl.LOCK_EX | fcntl.LOCK_NB) or "flock",
                lambda: fcntl.lockf(code, fcntl.LOCK_SH | fcntl.LOCK_NB) or "lock",
                lambda: fcntl.lockf(own, fcntl.LOCK_EX | fcntl.LOCK_NB) or "lock of its own file",
            ]
        )

    def controls_of_files() -> Any:
        """Flags, clones, verity, encryption: nothing of it may even begin."""
        numbers = (0x80086601, 0x40086602, 0x401C5820, 0x40049409, 0x4020940D, 0xC0189436)
        numbers += (0x40806685, 0x800C6613, 0xC0045877, 0xB701, 0x540E, 0x5423, 0x1272)
        opened = [os.open(writable, os.O_RDONLY), os.open(os.__file__, os.O_RDONLY), 1]
        space = ctypes.create_string_buffer(256)
        return [
            (n, d)
            for n in numbers
            for d in opened
            if _libc.ioctl(d, ctypes.c_ulong(n), space) >= 0 or ctypes.get_errno() != 1
        ]

    def signals() -> Any:
        flock = ctypes.create_string_buffer(16)
        ctypes.memmove(flock, (2).to_bytes(4, "little") + parent.to_bytes(4, "little"), 8)
        reading, _ = os.pipe()
        calls: list[Callable[[], Any]] = [
            lambda p=p, f=f: f(p)
            for p in (*others, -1, 0, -parent)
            for f in (
                lambda p: os.kill(p, 0) or f"kill {p}",
                lambda p: call(200, p, 0),  # tkill
                lambda p: call(234, p, p, 0),  # tgkill
                lambda p: call(129, p, 10, buffer),  # rt_sigqueueinfo
                lambda p: call(434, p, 0),  # pidfd_open
                lambda p: call(72, reading, 8, p),  # F_SETOWN
                lambda p: call(72, reading, 15, flock),  # F_SETOWN_EX
                lambda p: os.setpriority(os.PRIO_PROCESS, p, 19) or "nice",
                lambda p: os.sched_setaffinity(p, {0}) or "affinity",
            )
        ]
        return any_of(calls)

    def begins(*numbers: int) -> Callable[[], Any]:
        nothing = ctypes.c_void_p(0)
        return lambda: [x for n in numbers if (x := begun(n, nothing, nothing, nothing, nothing))]

    found: dict[str, Callable[[], Any]] = {
        "the environment of others": environment_of_others,
        "its own environment": lambda: [n for n in os.environ if "HF_T" in n or "SECRET" in n],
        "the memory of others": memory_of_others,
        "the files of others": files_of_others,
        "a descriptor of others": descriptors_of_others,
        "descriptors that it inherited": foreign_descriptors,
        "a file of the user": lambda: any_of(
            [lambda p=p: read(p) for p in (secret, "/etc/passwd", "/etc/shadow", "/dev/mem")]
        ),
        "a list of the user's files": lambda: any_of(
            [lambda p=p: os.listdir(p) or None for p in (outside, "/var", "/home", "/etc/ssl")]
        ),
        "a file outside": lambda: any_of([lambda: write(f"{outside}/new"), lambda: write(secret)]),
        "a file beside the code": code_folders,
        "owner, mode and times": owner_and_times,
        "links, pipes and names": tricks_with_names,
        "a file above the limit": more_than_allowed,
        "signals": signals,
        "raised limits": raised_limits,
        "settings of the machine": lambda: any_of(
            [
                lambda: write("/proc/sys/kernel/core_pattern"),
                lambda: write("/proc/sys/vm/drop_caches"),
            ]
        ),
        "a dump": lambda: _libc.prctl(4, 1, 0, 0, 0) == 0 or None,
        "no death signal": lambda: _libc.prctl(1, 0, 0, 0, 0) == 0 or None,
        "a tracer": lambda: _libc.prctl(0x59616D61, -1, 0, 0, 0) == 0 or None,
    }
    found |= {
        "memory out of sight": memory_out_of_sight,
        "memory in pipes": memory_in_pipes,
        "ways without walls": ways_without_walls,
        "its own entry in /proc": own_entry,
        "files without names": files_without_names,
        "rights of its owner": rights_of_its_owner,
        "waits of others": waits_of_others,
        "controls of files": controls_of_files,
        "news of a folder": lambda: any_of(
            [lambda: fcntl.fcntl(os.open(writable, os.O_RDONLY), 1026, 0x80000004) or "F_NOTIFY"]
        ),
    }
    if _X86:
        structure = (ctypes.c_uint64 * 11)(0x10000000)
        found |= {
            "ptrace": lambda: any_of([lambda p=p: call(101, 16, p, 0, 0) for p in others]),
            "process_vm": lambda: [
                x for p in others for n in (310, 311) if (x := begun(n, p, 0, 0, 0, 0, 0))
            ],
            "sockets": lambda: any_of(
                [
                    lambda f=f, k=k: call(41, f, k, 0)
                    for f in (1, 2, 10, 16, 17, 40)
                    for k in (1, 2, 3)
                ]
            ),
            "a pair of sockets": lambda: call(53, 1, 1, 0, buffer),
            "the second table (x32)": lambda: [
                x
                for n in (41, 57, 59, 62, 101, 512, 520, 521, 545)
                if (x := begun(0x40000000 | n, 2, 1, 0))
            ],
            "the 32-bit table": code_32_bit,
            "programs": begins(59, 322),
            "processes": lambda: any_of(
                [lambda: call(57), lambda: call(58), lambda: call(56, 17, 0, 0, 0, 0)]
            ),
            "clone3": lambda: begun(435, structure, 88),
            "namespaces": lambda: (
                any_of(
                    [
                        lambda f=f: call(272, f)
                        for f in (0x10000000, 0x20000000, 0x20000, 0x40000000)
                    ]
                )
                or begun(308, 0, 0)
            ),
            "a new user among threads": lambda: begun(56, 0x10000000 | 17, 0, 0, 0, 0),
            "large parts of the kernel": begins(
                425, 426, 427, 321, 323, 298, 248, 249, 250, 303, 304, 438, 312, 448, 440, 278, 300
            ),
            "memory that is not counted": begins(319, 447, 29, 68, 64, 240),
            "mounts": begins(165, 166, 155, 161, 428, 429, 430, 432, 442),
            "another user": lambda: any_of(
                [lambda: os.setuid(0) or "uid 0", lambda: os.setgid(0) or "gid 0"]
            ),
            "capabilities": lambda: begun(126, buffer, buffer),
            "typing into a terminal": lambda: begun(16, 1, 0x5412, buffer),
            "sync": begins(162, 306),
            "watches": begins(253, 294, 254),
            "asynchronous files": begins(206),
            "a filter of its own": begins(317),
            "keys, bpf, faults and old calls": begins(154, 135, 156, 159, 164, 172, 173, 470),
            "a lease": lambda: begun(72, 1, 1024, 1),
        }
    return found


def go(names: list[str] | None, **given: Any) -> dict[str, str | None]:
    """Try them all. Returns what got through by name, None where nothing did."""
    outcome: dict[str, str | None] = {}
    for name, attack in attacks(**given).items():
        if names is None or name in names:
            try:
                got = attack()
            except (OSError, ValueError, MemoryError):
                got = None
            outcome[name] = str(got)[:300] if got or got == 0 else None
    return outcome
