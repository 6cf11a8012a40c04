"""The jobs under one root folder: who may do what with them.

Nothing here is remembered that is not on disk, but for the visitors' tokens: a server that comes
back scans the folder and goes on, with the workers that ran meanwhile.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from pathlib import Path

from quantkit import hub
from quantkit.config import RunConfig
from quantkit.errors import QuantkitError, UsageError
from quantkit.files import write_json
from quantkit.hub import PublishedFile, jobs
from quantkit.run.folder import RunDir
from quantkit.server.executors import process
from quantkit.server.runs import view
from quantkit.server.runs.follow import Follower, tail
from quantkit.server.runs.limits import Order, check_disk, check_limits, positions, wait_seconds
from quantkit.server.runs.record import (
    CANCELLED,
    JOB_LOG_FILE,
    LOG_FILE,
    QUEUED,
    JobRecord,
    NoSuchJob,
    job_folder,
    new_job_id,
    owner_hash,
    save_record,
)
from quantkit.server.runs.scheduler import Scheduler, guarded
from quantkit.server.runs.view import JobSummary, JobView


class JobStore(Scheduler):
    """All jobs of one root folder. Safe to use from several threads."""

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
        place: str | None = None,
    ) -> str:
        """Queue a run of an owner that came from `place`. Returns its id. Raises UsageError when a
        limit is reached.
        """
        order = order or Order()
        with self._lock:
            self._check_limits(owner_hash(owner), place)
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
                place=place,
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
            self._check_limits(follower.owner, follower.place)
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
            self._check_limits(follower.owner, follower.place)
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

    # Common parts.

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

    def _remember_token(self, job_id: str, token: str | None) -> None:
        self._tokens.pop(job_id, None)
        if token:
            self._tokens[job_id] = token

    def _check_limits(self, owner: str | None, place: str | None) -> None:
        """`owner` is a visitor's hash; runs of the command line have none, and no limits."""
        if owner is None:
            return
        check_disk(self.root, self.limits)
        check_limits(self._scan().values(), owner, place, self.limits, self.public)


def _summary(follower: Follower, place: int | None) -> JobSummary | None:
    """One line of the list, also where a run is damaged in a way that nobody foresaw."""
    found = guarded(follower, lambda: follower.summary(place))
    if found is None and follower.fault:
        found = follower.summary(place)
    return found


def _check_whole(follower: Follower) -> None:
    if follower.damage:
        raise UsageError(follower.damage, "Delete it, or put the file back from a copy.")
