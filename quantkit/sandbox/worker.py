"""The worker: gives up everything but what it was given, then runs one function on a job.

The order matters: what needs rights comes first, the filter of system calls last. Only then is
anything imported that a stranger's bytes could reach.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
from types import GeneratorType

from quantkit.sandbox import kernel, seccomp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from quantkit.sandbox.told import Told

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


def run(job: Told, flags: int) -> None:
    """Run the job, and never return."""
    global _result
    _result = job.result
    try:
        os.chdir(job.home)
    except OSError:  # there was no place to make one
        os.chdir("/")
    set_limits(job, namespaces=bool(flags & kernel.NEW_USER))
    _close_others({1, 2, _result, *job.inherited})
    _say("in force", restrict(job, flags))
    sys.path[:] = job.path
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


def _know_temporary_folder(home: str) -> None:
    """Libraries ask for it when they are imported, and look for it by writing: they are told.
    Without a file system of its own it is a name alone: what is written there could not be bounded.
    """
    import tempfile

    tempfile.tempdir = home


def set_limits(job: Told, namespaces: bool) -> None:
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


def restrict(job: Told, flags: int) -> dict[str, int]:
    """Give up files, rights, sockets, programs and processes. Return by which means, as
    `in_force.Protection` has it.
    """
    found: dict[str, int] = {"landlock": 0, "seccomp": False, "capabilities": False}
    if kernel.LINUX:
        kernel.set_no_new_privileges()
        if kernel.KNOWN_MACHINE:
            kernel.drop_capabilities()
            found["capabilities"] = True
        version = kernel.landlock_version()
        if version and "landlock" not in job.without:
            kernel.restrict_files(_granted(job, flags), version)
            found["landlock"] = version
    sys.addaudithook(_refuse)
    if "seccomp" in job.without:
        return found
    try:
        # A file without a name is not counted.
        seccomp.install(keeps_names=bool(job.folders) and not found["landlock"])
        found["seccomp"] = True
    except OSError:  # then it is not said to be in force
        pass
    return found


def _granted(job: Told, flags: int) -> list[tuple[str, int]]:
    granted = [(path, kernel.WRITE) for path in job.writable]
    if flags & kernel.NEW_MOUNTS:  # nothing else can be named anyway, but for the kernel's own
        granted += [(f"/{name}", kernel.READ) for name in os.listdir("/") if name != "proc"]
        granted.append((job.home, kernel.SCRATCH))
    granted += [(path, kernel.READ) for path in job.readable]
    granted += [(f"/proc/{os.getpid()}", kernel.READ), ("/proc/self", kernel.READ)]
    granted += [("/dev/null", kernel.READ | kernel.WRITE)]
    for device in ("random", "urandom"):
        granted.append((f"/dev/{device}", kernel.READ))
    for name in ("cpuinfo", "meminfo", "stat", "filesystems"):
        granted.append((f"/proc/{name}", kernel.READ))
    return granted


_DENIED = ("socket.", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")


def _refuse(event: str, _arguments: Any) -> None:
    """The same within Python, for a sentence that says it, and where there is no filter."""
    if event.startswith(_DENIED) and event != "socket.gethostname":
        raise PermissionError(f"{event} is denied in the sandbox")
