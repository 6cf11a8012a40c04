"""The queue of one root folder: which run is next, which takes too long, which is old; and the
thread that manages it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

from quantkit.server.executors import process
from quantkit.server.runs.adopt import forget
from quantkit.server.runs.clock import Clock
from quantkit.server.runs.follow import Follower
from quantkit.server.runs.limits import (
    CLEAN,
    CLEANED_FILE,
    DELETE,
    Limits,
    is_overdue,
    what_is_due,
)
from quantkit.server.runs.record import (
    CANCELLED,
    QUEUED,
    STARTED,
    STOPPED,
    RunRecord,
    save_record,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

_TRASH = ".deleted-"
_SWEEP_SECONDS = 600.0
_GRACE_SECONDS = 10.0  # between asking a worker to end and ending it
_FORGOTTEN = (
    "The server was restarted while this run was waiting, and it keeps sign-ins in memory only:"
    " sign in (or give the token) again and resume it."
)


class Scheduler:
    """Starts what may start and ends what has to end. Only one server of a root does."""

    def __init__(
        self,
        root: Path,
        limits: Limits | None = None,
        public: bool = False,
        clock: Clock | None = None,
    ) -> None:
        self.root = root
        self._clock = clock or Clock(root)
        self._ending: dict[str, float] = {}  # runs that were asked to end, and when
        self.limits = limits or Limits()
        self.public = public
        self._lock = threading.RLock()
        self._followers: dict[str, Follower] = {}
        self._tokens: dict[str, str] = {}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._scheduler_lock: IO[bytes] | None = None
        self._next_sweep = 0.0

    def start(self) -> None:
        """Start the thread that starts queued runs. Does nothing when it runs already."""
        if self._thread is None:
            self.root.mkdir(parents=True, exist_ok=True)
            for left in self.root.glob(f"{_TRASH}*"):
                shutil.rmtree(left, ignore_errors=True)
            self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread. Workers go on."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(5)
            self._thread = None
        if self._scheduler_lock is not None:
            self._scheduler_lock.close()
            self._scheduler_lock = None

    def _loop(self) -> None:
        while not self._closing.wait(0.5):
            try:
                self.tick()
            except Exception:
                logger.exception("the scheduler stumbled and goes on")

    def tick(self) -> None:
        """Start what may start, end what was cancelled. Only one server of a root does."""
        with self._lock:
            if not self._is_scheduler():
                return
            for run_id, child in list(self._children.items()):
                if child.poll() is not None:  # takes the exit status, so that no zombie stays
                    del self._children[run_id]
            waiting, n_here, n_away = [], 0, 0
            for follower in list(self._scan().values()):
                record = follower.record
                if record is None:
                    continue
                if record.phase == QUEUED:
                    waiting.append(follower)
                elif process.is_alive(record.pid, record.pid_started):
                    n_here += not record.is_remote
                    n_away += record.is_remote
                    guarded(follower, partial(self._watch, follower))
            waiting.sort(key=lambda follower: record_of(follower).since)
            for follower in waiting:
                if record_of(follower).is_remote:
                    if n_away < self.limits.remote:
                        n_away += 1
                        guarded(follower, partial(self._start_worker, follower))
                elif n_here < self.limits.workers:
                    n_here += 1
                    guarded(follower, partial(self._start_worker, follower))
            if time.monotonic() > self._next_sweep:
                self._next_sweep = time.monotonic() + _SWEEP_SECONDS
                self._sweep()

    def _watch(self, follower: Follower) -> None:
        """End a worker that was asked to end and did not, or that takes too long."""
        record, name = record_of(follower), follower.folder.name
        assert record.pid is not None
        if record.phase not in (CANCELLED, STOPPED):
            self._ending.pop(name, None)
            if is_overdue(record, self.limits, self._clock.now()):
                self._stop_overdue(follower, record)
        elif time.monotonic() > self._ending.setdefault(name, time.monotonic()) + _GRACE_SECONDS:
            process.kill_group(record.pid, record.pid_started, signal.SIGKILL)

    def _stop_overdue(self, follower: Follower, record: RunRecord) -> None:
        assert record.pid is not None and self.limits.seconds is not None
        hours = self.limits.seconds / 3600
        reason = f"It took longer than the {hours:g} hours that a run may take on this machine."
        self._set_phase(follower, record, STOPPED, reason=reason)
        process.kill_group(record.pid, record.pid_started, signal.SIGTERM)

    def _sweep(self) -> None:
        """Drop what is old by rule: first what only the stages need, then the whole run."""
        now = self._clock.now()
        for follower in list(self._scan().values()):
            guarded(follower, partial(self._sweep_one, follower, now))
        try:
            self._clock.keep()
        except OSError as error:
            logger.warning("the time could not be written down: %s", error)

    def _sweep_one(self, follower: Follower, now: float) -> None:
        if follower.is_running():
            return
        due = what_is_due(follower, self.limits, now, self.public)
        if due == DELETE:
            logger.info("run %s is deleted: it ended long ago", follower.folder.name)
            self._remove(follower)
        elif due == CLEAN:
            (follower.folder / CLEANED_FILE).touch()
            child = process.start_cleaning(follower.folder)
            self._children[f"clean {follower.folder.name}"] = child

    def _remove(self, follower: Follower) -> None:
        name = follower.folder.name
        if follower.record is not None and follower.record.is_remote:
            forget(self.root, name)
        trash = self.root / f"{_TRASH}{name}"
        os.replace(follower.folder, trash)  # gone at once, however long removing takes
        self._followers.pop(name, None)
        self._tokens.pop(name, None)
        threading.Thread(target=shutil.rmtree, args=(trash, True), daemon=True).start()

    def _start_worker(self, follower: Follower) -> None:
        record, run_id = record_of(follower), follower.folder.name
        token = self._tokens.pop(run_id, None)
        if record.has_token and token is None:
            self._set_phase(follower, record, STOPPED, reason=_FORGOTTEN)
            return
        try:
            command = record.done_by.command(record.order)
            child = process.start(command, follower.folder, token, self.public)
        except OSError as error:
            reason = f"The worker could not be started: {error.strerror or error}."
            self._set_phase(follower, record, STOPPED, reason=reason)
            return
        self._children[run_id] = child
        started = process.started_at(child.pid)
        try:
            self._set_phase(follower, record, STARTED, pid=child.pid, pid_started=started)
        except OSError:
            child.kill()  # nobody would know it again, and the next look would start another
            raise

    def _is_scheduler(self) -> bool:
        """Whether this process is the one that starts runs: the kernel hands the lock over."""
        if self._scheduler_lock is not None:
            return True
        self.root.mkdir(parents=True, exist_ok=True)
        file = (self.root / ".scheduler").open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return False
        self._scheduler_lock = file
        return True

    def _scan(self) -> dict[str, Follower]:
        """Followers of all run folders by id, with their records as they are now."""
        try:
            with os.scandir(self.root) as entries:
                names = {e.name for e in entries if e.is_dir(follow_symlinks=False)}
        except FileNotFoundError:
            names = set()
        for gone in self._followers.keys() - names:
            del self._followers[gone]
        for name in sorted(names - self._followers.keys()):
            if not name.startswith("."):
                self._followers[name] = Follower(self.root / name)
        for follower in self._followers.values():
            guarded(follower, follower.load)
        return self._followers

    def _set_phase(
        self, follower: Follower, record: RunRecord, phase: str, **fields: object
    ) -> None:
        fields.setdefault("since", time.time())
        changed = dataclasses.replace(record, phase=phase, **fields)  # type: ignore[arg-type]
        save_record(follower.folder, changed)
        follower.load()


def record_of(follower: Follower) -> RunRecord:
    record = follower.record
    assert record is not None
    return record


def guarded(follower: Follower, action: Callable[[], T]) -> T | None:
    """Return what `action` makes of one run; None where something went wrong that nobody foresaw.
    That run is damaged then, and not in the way of the others.
    """
    try:
        return action()
    except Exception:
        if not follower.fault:
            logger.exception("run %s is damaged", follower.folder.name)
        follower.fault = "The files of this run cannot be read."
        return None


def told(follower: Follower, action: Callable[[], T]) -> T | None:
    """Return what `action` tells of a run, also of one that is damaged as nobody foresaw."""
    found = guarded(follower, action)
    return action() if found is None and follower.fault else found
