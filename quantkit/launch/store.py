"""The jobs under one root folder: who may do what, the queue, and the thread that starts the next.

Nothing here is remembered that is not on disk, but for the visitors' tokens: a server that comes
back scans the folder and goes on, with the workers that ran meanwhile.
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

from quantkit import hub
from quantkit.config import RunConfig
from quantkit.errors import QuantkitError, UsageError
from quantkit.hub import PublishedFile, jobs
from quantkit.launch import process, view
from quantkit.launch.adopt import forget
from quantkit.launch.clock import Clock
from quantkit.launch.follow import Follower, tail
from quantkit.launch.limits import (
    CLEAN,
    CLEANED_FILE,
    DELETE,
    Limits,
    Order,
    check_disk,
    check_limits,
    is_overdue,
    positions,
    wait_seconds,
    what_is_due,
)
from quantkit.launch.record import (
    CANCELLED,
    JOB_LOG_FILE,
    LOG_FILE,
    QUEUED,
    STARTED,
    STOPPED,
    JobRecord,
    NoSuchJob,
    job_folder,
    new_job_id,
    owner_hash,
    save_record,
)
from quantkit.launch.view import JobSummary, JobView
from quantkit.rundir import RunDir, write_json

logger = logging.getLogger(__name__)
T = TypeVar("T")

_TRASH = ".deleted-"
_SWEEP_SECONDS = 600.0
_GRACE_SECONDS = 10.0  # between asking a worker to end and ending it
_FORGOTTEN = (
    "The server was restarted while this run was waiting, and it keeps sign-ins in memory only:"
    " sign in (or give the token) again and resume it."
)


class JobStore:
    """All jobs of one root folder. Safe to use from several threads."""

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

    # What a visitor sees.

    def jobs(self, owner: str | None) -> tuple[JobSummary, ...]:
        """The visitor's jobs and, on a private page, those of the command line; newest first."""
        with self._lock:
            followers = self._scan()
            places = positions(followers)
            found = [
                summary
                for job_id, follower in followers.items()
                if self._may_see(follower.record, owner)
                and (summary := _summary(follower, places.get(job_id))) is not None
            ]
        return tuple(sorted(found, key=lambda job: -job.created))

    def view(self, job_id: object, owner: str | None) -> JobView:
        """Everything about one job. Raises NoSuchJob also when it is somebody else's."""
        with self._lock:
            follower = self._follower(job_id, owner)
            record = follower.record
            waits = record is not None and record.phase == QUEUED
            followers = self._scan() if waits else {}
            places = positions(followers)
            place = places.get(follower.folder.name)
            found = guarded(follower, lambda: follower.view(place))
            if found is None and follower.fault:
                found = follower.view(place)  # that it is damaged can always be told
            if found is not None and waits:
                seconds = wait_seconds(followers, follower, self.limits.workers)
                found = dataclasses.replace(found, wait_seconds=seconds)
        if found is None:
            raise NoSuchJob
        return found

    def log_tail(self, job_id: object, owner: str | None, n_bytes: int = 20_000) -> str:
        """The end of what the worker printed."""
        with self._lock:
            folder = self._follower(job_id, owner).folder
            of_job = folder / JOB_LOG_FILE
            return tail(of_job if of_job.exists() else folder / LOG_FILE, n_bytes)

    def result_path(self, job_id: object, name: str, owner: str | None) -> Path:
        """Where a result file lies. Raises NoSuchJob for any other file."""
        with self._lock:
            path = self._follower(job_id, owner).file_path(name)
        if path is None or not path.is_file():
            raise NoSuchJob
        return path

    def staged(
        self, job_id: object, owner: str | None
    ) -> tuple[tuple[PublishedFile, ...], dict[str, Path]]:
        """The files that publishing uploads, and where those lie that are on this machine."""
        with self._lock:
            return self._follower(job_id, owner).staged()

    def closed(self, job_id: object, owner: str | None) -> str:
        """What the run's model is, as far as the run has come to know: "private", "gated" or ""."""
        with self._lock:
            record = self._follower(job_id, owner).dir.records().get("fetch")
        said = "" if record is None else record.summary.get("closed")
        return said if said in ("private", "gated") else ""

    def models(self, job_id: object, owner: str | None) -> tuple[Path | None, Path | None]:
        """The finished GGUF and the original, where they lie on this machine."""
        with self._lock:
            follower = self._follower(job_id, owner)
            return follower.model_path(), follower.base_path()

    # What a visitor does.

    def submit(
        self,
        config: RunConfig,
        owner: str,
        token: str | None = None,
        order: Order | None = None,
    ) -> str:
        """Queue a run. Returns its id. Raises UsageError when a limit is reached."""
        order = order or Order()
        with self._lock:
            self._check_limits(owner_hash(owner))
            job_id = new_job_id()
            folder = self.root / job_id
            folder.mkdir(parents=True)
            write_json(RunDir(folder).config_path, config)
            now = time.time()
            record = JobRecord(
                owner_hash(owner),
                now,
                QUEUED,
                now,
                has_token=bool(token),
                **dataclasses.asdict(order),
            )
            self._remember_token(job_id, token)
            save_record(folder, record)
            return job_id

    def cancel(self, job_id: object, owner: str | None, token: str | None = None) -> None:
        """Take a job out of the queue, or end its worker; finished stages stay. A Job that nobody
        here listens to any more is ended with `token`. Raises QuantkitError.
        """
        with self._lock:
            is_lost = self._follower(job_id, owner).has_lost_job()
        if is_lost:
            jobs.cancel_all(str(job_id), jobs.check_token(token or hub.resolve_token()))
        with self._lock:
            follower = self._follower(job_id, owner)
            record = follower.record
            if record is None:
                raise UsageError(
                    "This run was started from the command line.", "Stop it there with Ctrl-C."
                )
            _check_whole(follower)
            state = follower.state()
            if state not in (view.QUEUED, view.RUNNING) and not is_lost:
                raise UsageError("This run is not running.", "There is nothing to cancel.")
            self._set_phase(follower, record, CANCELLED)
            if record.pid is not None:
                process.kill_group(record.pid, record.pid_started, signal.SIGTERM)

    def resume(self, job_id: object, owner: str | None, token: str | None = None) -> None:
        """Queue a job again that failed, was interrupted or cancelled; it goes on where it was."""
        with self._lock:
            follower = self._follower(job_id, owner)
            _check_whole(follower)
            if follower.state() not in (view.FAILED, view.INTERRUPTED, view.CANCELLED):
                raise UsageError("This run has not stopped.", "There is nothing to resume.")
            self._check_limits(follower.owner)
            self._queue_again(follower, token)

    def publish(
        self,
        job_id: object,
        owner: str | None,
        repo: str,
        visibility: str,
        token: str | None,
        collection: str | None = None,
    ) -> None:
        """Queue the upload of a validated run to a repository of the Hub."""
        private, public = visibility == "private", visibility == "public"
        with self._lock:
            follower = self._follower(job_id, owner)
            _check_whole(follower)
            if follower.state() in (view.QUEUED, view.RUNNING):
                raise UsageError("This run is still at work.", "Publish it when it has finished.")
            config = follower.config
            if config is None or "validate" not in follower.dir.records():
                raise QuantkitError(
                    "This run is not validated, and only validated files are published.",
                    "Resume it first.",
                )
            self._check_limits(follower.owner)
            asked = dataclasses.replace(
                config, publish=repo, private=private, public=public, collection=collection
            )
            write_json(follower.dir.config_path, asked)
            self._queue_again(follower, token)

    def delete(self, job_id: object, owner: str | None) -> None:
        """Remove a job and all its files. Raises UsageError while it is at work."""
        with self._lock:
            follower = self._follower(job_id, owner)
            record = follower.record
            of_nobody = record is None or record.owner is None
            if record is None or (of_nobody and not follower.damage):
                raise UsageError(
                    "This run was started from the command line.", "Remove its folder there."
                )
            if follower.is_running() or follower.has_lost_job():
                raise UsageError("This run may still be at work.", "Cancel it first.")
            self._remove(follower)

    # The scheduler.

    def start(self) -> None:
        """Start the thread that starts queued jobs. Does nothing when it runs already."""
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
            for job_id, child in list(self._children.items()):
                if child.poll() is not None:  # takes the exit status, so that no zombie stays
                    del self._children[job_id]
            waiting, n_here, n_away = [], 0, 0
            for follower in list(self._scan().values()):
                record = follower.record
                if record is None:
                    continue
                if record.phase == QUEUED:
                    waiting.append(follower)
                elif process.is_alive(record.pid, record.pid_started):
                    n_here += record.machine is None
                    n_away += record.machine is not None
                    guarded(follower, partial(self._watch, follower))
            waiting.sort(key=lambda follower: _record(follower).since)
            for follower in waiting:
                if _record(follower).machine is not None:
                    if n_away < self.limits.jobs:
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
        record, name = _record(follower), follower.folder.name
        assert record.pid is not None
        if record.phase not in (CANCELLED, STOPPED):
            self._ending.pop(name, None)
            if is_overdue(record, self.limits, self._clock.now()):
                self._stop_overdue(follower, record)
        elif time.monotonic() > self._ending.setdefault(name, time.monotonic()) + _GRACE_SECONDS:
            process.kill_group(record.pid, record.pid_started, signal.SIGKILL)

    def _stop_overdue(self, follower: Follower, record: JobRecord) -> None:
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
        if follower.record is not None and follower.record.machine is not None:
            forget(self.root, name)
        trash = self.root / f"{_TRASH}{name}"
        os.replace(follower.folder, trash)  # gone at once, however long removing takes
        self._followers.pop(name, None)
        self._tokens.pop(name, None)
        threading.Thread(target=shutil.rmtree, args=(trash, True), daemon=True).start()

    def _start_worker(self, follower: Follower) -> None:
        record, job_id = _record(follower), follower.folder.name
        token = self._tokens.pop(job_id, None)
        if record.has_token and token is None:
            self._set_phase(follower, record, STOPPED, reason=_FORGOTTEN)
            return
        remote = record.machine is not None
        try:
            child = process.start(follower.folder, token, self.public, remote)
        except OSError as error:
            reason = f"The worker could not be started: {error.strerror or error}."
            self._set_phase(follower, record, STOPPED, reason=reason)
            return
        self._children[job_id] = child
        started = process.started_at(child.pid)
        try:
            self._set_phase(follower, record, STARTED, pid=child.pid, pid_started=started)
        except OSError:
            child.kill()  # nobody would know it again, and the next look would start another
            raise

    def _is_scheduler(self) -> bool:
        """Whether this process is the one that starts jobs: the kernel hands the lock over."""
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

    # Common parts.

    def _scan(self) -> dict[str, Follower]:
        """Followers of all job folders by id, with their records as they are now."""
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

    def _follower(self, job_id: object, owner: str | None) -> Follower:
        """The follower of a job that `owner` may see. Raises NoSuchJob."""
        folder = job_folder(self.root, job_id)
        if folder.name.startswith("."):
            raise NoSuchJob
        follower = self._followers.get(folder.name)
        if follower is None:
            follower = self._followers[folder.name] = Follower(folder)
        follower.load()
        is_run = follower.record is not None or follower.config is not None or follower.damage
        if not self._may_see(follower.record, owner) or not is_run:
            raise NoSuchJob
        guarded(follower, follower.refresh)
        return follower

    def _may_see(self, record: JobRecord | None, owner: str | None) -> bool:
        if record is None or record.owner is None:
            return not self.public
        return owner is not None and record.owner == owner_hash(owner)

    def _queue_again(self, follower: Follower, token: str | None) -> None:
        record = follower.record
        now = time.time()
        if record is None:
            record = JobRecord(None, follower.created)
        self._remember_token(follower.folder.name, token)
        self._set_phase(follower, record, QUEUED, since=now, has_token=bool(token), reason="")

    def _set_phase(
        self, follower: Follower, record: JobRecord, phase: str, **fields: object
    ) -> None:
        fields.setdefault("since", time.time())
        changed = dataclasses.replace(record, phase=phase, **fields)  # type: ignore[arg-type]
        save_record(follower.folder, changed)
        follower.load()

    def _remember_token(self, job_id: str, token: str | None) -> None:
        self._tokens.pop(job_id, None)
        if token:
            self._tokens[job_id] = token

    def _check_limits(self, owner: str | None) -> None:
        """`owner` is a visitor's hash; runs of the command line have none, and no limits."""
        if owner is None:
            return
        check_disk(self.root, self.limits)
        check_limits(self._scan().values(), owner, self.limits, self.public)


def _record(follower: Follower) -> JobRecord:
    record = follower.record
    assert record is not None
    return record


def guarded(follower: Follower, action: Callable[[], T]) -> T | None:
    """What `action` makes of one run; None where something went wrong that nobody foresaw. That run
    is damaged then, and not in the way of the others.
    """
    try:
        return action()
    except Exception:
        if not follower.fault:
            logger.exception("run %s is damaged", follower.folder.name)
        follower.fault = "The files of this run cannot be read."
        return None


def _summary(follower: Follower, place: int | None) -> JobSummary | None:
    """One line of the list, also where a run is damaged in a way that nobody foresaw."""
    found = guarded(follower, lambda: follower.summary(place))
    if found is None and follower.fault:
        found = follower.summary(place)
    return found


def _check_whole(follower: Follower) -> None:
    if follower.damage:
        raise UsageError(follower.damage, "Delete it, or put the file back from a copy.")
