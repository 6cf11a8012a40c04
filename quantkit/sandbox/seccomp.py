"""The filter of system calls: a BPF program over struct seccomp_data (the number at byte 0, the
architecture at 4, six arguments of 64 bits from 16 on). Standard library only.

One process is all there is: it may start threads, but neither processes nor programs. So limits of
the process are limits of the whole tree, and nothing can outlive it.
"""

from __future__ import annotations

import ctypes
import errno
import os

from quantkit.sandbox import kernel

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


def _result(number: int) -> tuple[int, int, int, int]:
    return (_RETURN, 0, 0, _ERRNO | number)


_DENY, _NOT_THERE = _result(errno.EPERM), _result(errno.ENOSYS)
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


def program(machine: str, own: int, keeps_names: bool = False) -> _Code:
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


def install(keeps_names: bool = False) -> None:
    """Filter this process from now on. Raises OSError where the kernel has no seccomp."""
    if not kernel.KNOWN_MACHINE:
        raise OSError(errno.ENOSYS, f"no filter is written for {kernel.MACHINE}")
    code = [_Instruction(*step) for step in program(kernel.MACHINE, os.getpid(), keeps_names)]
    array = (_Instruction * len(code))(*code)
    filter_mode = 2
    kernel.set_no_new_privileges()
    kernel.call_c("prctl", 22, filter_mode, ctypes.byref(_Program(len(code), array)), 0, 0)
