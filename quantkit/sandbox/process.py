"""The parent's side: start the child, read what it says, end it. What it says is a stranger's word:
its size is bounded, it is plain JSON, and nothing in it is followed.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from evaluators import sandbox
from evaluators.sandbox import Told, Verdict
from quantkit.sandbox import fork_client, untrusted
from quantkit.sandbox.fork_client import Forked
from quantkit.sandbox.in_force import Protection
from quantkit.sandbox.limits import Limits
from quantkit.sandbox.places import always_readable, import_path
from quantkit.sandbox.start import empty_folder, environment, remove_empty

_MOST_LOG = 4 * 2**20
_MOST_SAID = 16 * 2**20  # JSON takes twenty times as much when it is read
_MOST_MESSAGES = 100_000
_PIPE_BYTES = 2**16  # that a pipe holds
_TICK_SECONDS = 0.2
_GRACE_SECONDS = 10.0  # for the keeper to end what took too long


@dataclass(frozen=True)
class Job:
    """One call. `path` comes before the packages when modules are looked for."""

    function: str
    arguments: Mapping[str, Any]
    limits: Limits = field(default_factory=Limits)
    readable: Sequence[Path] = ()
    writable: Sequence[Path] = ()
    path: Sequence[Path] = ()
    log: Path | None = None
    address_bytes: int | None = None  # where mapped files are to be limited, too
    inherited: Sequence[int] = ()  # descriptors that the function gets as they are, by number
    preload: bool = False  # torch and transformers are there already: a fork server's fork
    without: Sequence[str] = ()  # for tests: "mounts", "namespaces", "landlock", "seccomp"


@dataclass(frozen=True)
class Message:
    """What the worker says: first what is `in force`, then `facts` and `part`s while it works, at
    the end `value`, `exit` or `error`.
    """

    kind: str = ""  # nothing was said
    content: Any = None  # an exit's status, an error's name; else plain JSON, of whatever shape
    message: str = ""
    remedy: str = ""
    ours: bool = False  # a QuantkitError


@dataclass(frozen=True)
class Ended:
    """How the child ended. `why` names the limit that it was ended for."""

    status: int | None = None  # as of wait(2); None: the keeper could not tell
    why: str | None = None
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    forked: bool = False  # by a fork server
    protection: Protection = field(default_factory=Protection)
    log: str = ""  # its end

    @property
    def signal(self) -> int:
        return os.WTERMSIG(self.status) if self.status and os.WIFSIGNALED(self.status) else 0


class Child:
    """A child at work. Iterate over `messages`; leave it through `with`, which ends it whole."""

    def __init__(self, job: Job) -> None:
        self.job, self.ended = job, Ended()
        self._home: str | None = None
        self._process: subprocess.Popen[bytes] | Forked | None = None
        self._pipes: list[int] = []
        self._log = bytearray()
        self._partial = bytearray()
        self._verdict = bytearray()
        self._why: str | None = None
        self._protection: Protection | None = None
        self._n_said = self._n_messages = 0
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        job = self.job
        (result, result_w), (verdict, verdict_w), (log, log_w), (lifeline, self._lifeline) = (
            os.pipe() for _ in range(4)
        )
        theirs = (result_w, verdict_w, lifeline)  # closed here; `inherited` are the caller's
        self._pipes = [result, verdict, log, self._lifeline]
        readable = [os.path.abspath(path) for path in job.readable]
        told = Told(
            job.function,
            dict(job.arguments),
            **asdict(job.limits),
            path=[*map(str, job.path), *import_path()],
            readable=[*always_readable(), *readable, *map(str, job.path)],
            writable=[os.path.abspath(path) for path in job.writable],
            folders=[os.path.abspath(path) for path in job.writable if path.is_dir()],
            mapped_bytes=sum(_size(Path(path)) for path in readable),
            address_bytes=job.address_bytes,
            without=list(job.without),
            inherited=list(job.inherited),
            result=result_w,
            verdict=verdict_w,
            lifeline=lifeline,
        )
        try:
            if job.preload:
                same = {number: number for number in (*theirs, *job.inherited)}
                self._process = fork_client.fork(told, {1: log_w, 2: log_w, **same})
            if self._process is None:
                self._home = empty_folder()
                told = told._replace(home=self._home, owns_home=True)
                given = [*theirs, *job.inherited]
                self._process = sandbox.start(told._asdict(), environment(self._home), given, log_w)
        finally:
            for descriptor in (*theirs, log_w):
                os.close(descriptor)
        self._selector = selectors.DefaultSelector()
        for name, descriptor in (("result", result), ("verdict", verdict), ("log", log)):
            self._selector.register(descriptor, selectors.EVENT_READ, name)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def messages(self) -> Iterator[Message | None]:
        """Yield what the worker says, as it says it; None a few times a second, for the caller to
        look around. After the last, `ended` is filled in.
        """
        spoken = time.monotonic()
        deadline = spoken + self.job.limits.wall_seconds + _GRACE_SECONDS
        while self._why is None and self._selector.get_map():
            if time.monotonic() > deadline:
                self._why = "wall"
                break
            ready = self._selector.select(_TICK_SECONDS)
            if time.monotonic() - spoken >= _TICK_SECONDS:  # also while nothing but its log comes
                spoken = time.monotonic()
                yield None
            for key, _ in ready:
                data = os.read(key.fd, _PIPE_BYTES)
                if not data:
                    self._selector.unregister(key.fd)
                elif key.data == "log":
                    self._keep_log(data)
                elif key.data == "verdict":
                    self._verdict += data[: 2**16]
                else:
                    yield from self._parse(data)
                if self._why is not None:  # whatever else is ready
                    break
        self.close()

    def _parse(self, data: bytes) -> Iterator[Message]:
        self._n_said += len(data)
        self._n_messages += data.count(b"\n")
        if self._n_said > _MOST_SAID or self._n_messages > _MOST_MESSAGES:
            self._why = "answer"
            return
        self._partial += data
        if b"\n" not in data:
            return
        *lines, self._partial = self._partial.split(b"\n")
        for line in lines:
            try:
                message = untrusted.build(Message, json.loads(line))
                if self._protection is None:  # said before anything strange was seen
                    self._protection = untrusted.build(Protection, message.content)
                    continue
            except (ValueError, RecursionError):
                self._why = "answer"
                return
            yield message

    def _keep_log(self, data: bytes) -> None:
        room = _MOST_LOG - len(self._log)
        if room > 0:
            self._log += data[:room]
            if len(data) >= room:
                self._log += b"\n[the rest of the log is left out]\n"

    def close(self) -> None:
        """End everything of the child, and wait until it is gone."""
        process = self._process
        if self._pipes:
            os.close(self._pipes.pop())  # the lifeline: the keeper ends the rest
        if process is not None and process.returncode is None:
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                if isinstance(process, Forked):
                    process.kill()
                else:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            self._settle()
        for descriptor in self._pipes:
            os.close(descriptor)
        self._pipes = []
        if hasattr(self, "_selector"):
            self._selector.close()
        if self._home is not None:
            remove_empty(self._home)  # the keeper may have been there before

    def _settle(self) -> None:
        try:
            verdict = Verdict(**json.loads(self._verdict))
        except ValueError:  # the keeper was killed
            verdict = Verdict()
        self.ended = Ended(
            verdict.status,
            self._why or verdict.why,
            verdict.cpu_seconds,
            verdict.peak_bytes,
            isinstance(self._process, Forked),
            replace(self._protection or Protection(), namespaces=tuple(verdict.namespaces)),
            self._log[-(2**20) :].decode("utf-8", errors="replace"),
        )
        if self.job.log is not None:
            self.job.log.write_bytes(self._log)


def _size(path: Path) -> int:
    """Bytes of a file or of all files of a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(x.stat().st_size for x in path.glob("*") if x.is_file()) if path.is_dir() else 0
