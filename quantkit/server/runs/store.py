"""The runs under one root folder, and who can do what with them.

Nothing here is remembered that is not on disk, but for the visitors' tokens: a server that comes
back scans the folder and goes on, with the workers that ran meanwhile.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import partial
from hmac import compare_digest
from pathlib import Path

from quantkit.config import RunConfig
from quantkit.config.calibration import AUTO
from quantkit.errors import QuantkitError, UsageError
from quantkit.files import write_json
from quantkit.hub import PublishedFile
from quantkit.run.folder import RunDir
from quantkit.server.executors import process
from quantkit.server.executors.protocol import LOG_FILE, REMOTE_LOG_FILE, Order
from quantkit.server.runs import texts, view
from quantkit.server.runs.follow import Follower, tail
from quantkit.server.runs.limits import (
    PUBLIC_LIMITS,
    Limits,
    check_disk,
    check_limits,
    positions,
    wait_seconds,
)
from quantkit.server.runs.record import (
    CANCELLED,
    QUEUED,
    NoLink,
    NoSuchRun,
    RunRecord,
    new_run_id,
    new_share,
    owner_hash,
    run_folder,
    save_record,
)
from quantkit.server.runs.scheduler import Scheduler, guarded, told
from quantkit.server.runs.view import RunSummary, RunView


class RunStore(Scheduler):
    """All runs of one root folder. Safe to use from several threads."""

    # What a visitor sees.

    def runs(self, owner: str | None) -> tuple[RunSummary, ...]:
        """Return the visitor's runs and, on a private page, those of the command line; newest
        first.
        """
        with self._lock:
            followers = self._scan()
            places = positions(followers)
            found = [
                summary
                for run_id, follower in followers.items()
                if self._may_see(follower.record, owner)
                and (summary := told(follower, partial(follower.summary, places.get(run_id))))
            ]
        return tuple(sorted(found, key=lambda run: -run.created))

    def view(self, run_id: object, owner: str | None) -> RunView:
        """Return everything about one run. Raises NoSuchRun also when it is somebody else's."""
        with self._lock:
            follower = self._follower(run_id, owner)
            record = follower.record
            waits = record is not None and record.phase == QUEUED
            followers = self._scan() if waits else {}
            places = positions(followers)
            place = places.get(follower.folder.name)
            found = told(follower, lambda: follower.view(place))
            if found is not None and waits:
                seconds = wait_seconds(followers, follower, self.limits.workers)
                found = dataclasses.replace(found, wait_seconds=seconds)
        if found is None:
            raise NoSuchRun
        return found

    def asked(self, run_id: object, owner: str | None) -> tuple[RunConfig, Order]:
        """Return what a run was asked for, and how it was to be done. Raises QuantkitError."""
        with self._lock:
            follower = self._follower(run_id, owner)
            _check_whole(follower)
            config, record = follower.config, follower.record
        if config is None:
            raise NoSuchRun
        return config, Order() if record is None else record.order

    def log_tail(self, run_id: object, owner: str | None, n_bytes: int = 20_000) -> str:
        """Return the end of what the worker printed."""
        with self._lock:
            folder = self._follower(run_id, owner).folder
            remote = folder / REMOTE_LOG_FILE
            return tail(remote if remote.exists() else folder / LOG_FILE, n_bytes)

    def result_path(self, run_id: object, name: str, owner: str | None) -> Path:
        """Return where a result file lies. Raises NoSuchRun for any other file."""
        with self._lock:
            path = self._follower(run_id, owner).file_path(name)
        if path is None or not path.is_file():
            raise NoSuchRun
        return path

    def result_paths(self, run_id: object, owner: str | None) -> dict[str, Path]:
        """Return where all result files lie that are on this machine, by name."""
        with self._lock:
            return _paths(self._follower(run_id, owner))

    def open_beside(self, owner: str, other: str) -> int:
        """Let `other` see the runs of `owner` and do with them what their owner may; return how
        many there are.
        """
        ours, theirs = owner_hash(owner), owner_hash(other)
        with self._lock:
            found = [f for f in self._scan().values() if f.record and f.record.owner == ours]
            for follower in found:
                if follower.record and follower.record.beside != theirs and not follower.damage:
                    record = dataclasses.replace(follower.record, beside=theirs)
                    save_record(follower.folder, record)
                    follower.load()
        return len(found)

    # What its owner opened up.

    def share(self, run_id: object, owner: str | None, is_open: bool) -> None:
        """Open a finished run up to everybody who has its link, or close it again: a link that was
        closed never leads there again. Raises QuantkitError.
        """
        with self._lock:
            follower = self._follower(run_id, owner)
            found, record = follower.view(None), follower.record
            if record is None or found is None or (is_open and not found.can_share):
                raise UsageError("There is no result to share.", "Wait until the run has finished.")
            if is_open != (record.shared is not None):
                shared = new_share() if is_open else None
                save_record(follower.folder, dataclasses.replace(record, shared=shared))
                follower.load()

    def shared(self, share: str) -> RunView:
        """Return a run by its link: what it made, nothing of how or by whom, but for the name of a
        public repository. Raises NoSuchRun.
        """
        with self._lock:
            follower = self._opened(share)
            found = told(follower, lambda: follower.view(None))
        if found is None or not found.report or found.is_active:
            raise NoLink
        url = found.published_url if found.repo_is_private is False else None
        shown = dataclasses.replace(found, id="", log=(), card="", publish_to=None, remote=None)
        return dataclasses.replace(shown, published_url=url)

    def shared_path(self, share: str, name: str) -> Path:
        """Return where a file of an opened run lies. Raises NoSuchRun."""
        with self._lock:
            paths = _paths(self._opened(share))
        if name not in paths:
            raise NoLink
        return paths[name]

    def _opened(self, share: str) -> Follower:
        for follower in self._scan().values():
            record = follower.record
            if record is not None and record.shared and compare_digest(record.shared, share):
                guarded(follower, follower.refresh)
                return follower
        raise NoLink

    def staged(
        self, run_id: object, owner: str | None
    ) -> tuple[tuple[PublishedFile, ...], dict[str, Path]]:
        """Return the files that publishing uploads, and the paths of those that are on this
        machine.
        """
        with self._lock:
            return self._follower(run_id, owner).staged()

    def closed(self, run_id: object, owner: str | None) -> str:
        """Return what the run's model is, as far as the run has come to know: "private", "gated" or
        "".
        """
        with self._lock:
            record = self._follower(run_id, owner).dir.records().get("fetch")
        said = "" if record is None else record.summary.get("closed")
        return said if said in ("private", "gated") else ""

    def models(
        self, run_id: object, owner: str | None, name: str = ""
    ) -> tuple[Path | None, Path | None]:
        """Return the paths of a finished GGUF, the first without a name, and of the original, if
        they are on this machine.
        """
        with self._lock:
            follower = self._follower(run_id, owner)
            return follower.model_path(name), follower.base_path()

    # What a visitor does.

    def submit(
        self,
        config: RunConfig,
        owner: str,
        token: str | None = None,
        order: Order | None = None,
        place: str | None = None,
        text: Path | None = None,
    ) -> str:
        """Queue a run of an owner that came from `place`, with `text` to calibrate on. Returns its
        id. Raises UsageError when a limit is reached.
        """
        order = order or Order()
        with self._lock:
            self._check_limits(owner_hash(owner), place)
            run_id = new_run_id()
            folder = self.root / run_id
            folder.mkdir(parents=True)
            if text is not None:
                shutil.copyfile(text, folder / texts.FILE)
                own = str((folder / texts.FILE).absolute()).replace(",", "\\,")
                beside = "" if config.calibration == AUTO else f",{config.calibration}"
                config = dataclasses.replace(config, calibration=own + beside)
            write_json(RunDir(folder).config_path, config)
            now = time.time()
            record = RunRecord(
                owner_hash(owner),
                now,
                QUEUED,
                now,
                has_token=bool(token),
                place=place,
                **dataclasses.asdict(order),
            )
            self._remember_token(run_id, token)
            save_record(folder, record)
            return run_id

    def submit_all(
        self,
        runs: Sequence[tuple[RunConfig, Order]],
        owner: str,
        token: str | None = None,
        place: str | None = None,
        text: Path | None = None,
    ) -> tuple[str, ...]:
        """Queue several runs of an owner, or none of them. Each gets a copy of `text` to calibrate
        on. Returns their ids. Raises UsageError when a limit would be reached.
        """
        with self._lock:
            self._check_limits(owner_hash(owner), place, len(runs))
            return tuple(
                self.submit(config, owner, token, order, place, text) for config, order in runs
            )

    def cancel(self, run_id: object, owner: str | None, token: str | None = None) -> None:
        """Take a run out of the queue, or end its worker; finished stages stay. A Job that nobody
        here listens to any more is ended with `token`. Raises QuantkitError.
        """
        with self._lock:
            follower = self._follower(run_id, owner)
            is_lost, known = follower.is_unattended(), follower.record
        if is_lost and known is not None:
            known.done_by.end(str(run_id), token)
        with self._lock:
            follower = self._follower(run_id, owner)
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
                process.kill_group(record.pid, record.pid_started, record.done_by.cancelled_by)

    def resume(self, run_id: object, owner: str | None, token: str | None = None) -> None:
        """Queue a run again that failed, was interrupted or cancelled; it goes on where it was."""
        with self._lock:
            follower = self._follower(run_id, owner)
            _check_whole(follower)
            if follower.state() not in (view.FAILED, view.INTERRUPTED, view.CANCELLED):
                raise UsageError("This run has not stopped.", "There is nothing to resume.")
            self._check_limits(follower.owner, follower.place)
            self._queue_again(follower, token)

    def publish(
        self,
        run_id: object,
        owner: str | None,
        repo: str,
        visibility: str,
        token: str | None,
        collection: str | None = None,
    ) -> None:
        """Queue the upload of a validated run to a repository of the Hub."""
        private, public = visibility == "private", visibility == "public"
        with self._lock:
            follower = self._follower(run_id, owner)
            _check_whole(follower)
            if follower.state() in (view.QUEUED, view.RUNNING):
                raise UsageError("This run is still running.", "Publish it when it has finished.")
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

    def compare(
        self, run_id: object, owner: str | None, files: Sequence[str], token: str | None
    ) -> None:
        """Queue the measurement of other files beside those of a finished run. Raises
        QuantkitError.
        """
        with self._lock:
            follower = self._follower(run_id, owner)
            _check_whole(follower)
            if follower.state() in (view.QUEUED, view.RUNNING):
                raise UsageError("This run is still running.", "Compare when it has finished.")
            config, record = follower.config, follower.record
            if config is None or (record is not None and record.is_remote):
                raise UsageError("Its files are not here.", "Compare them from the command line.")
            if follower.base_path() is None:
                raise UsageError(
                    "The original is no longer on this machine.", "Start the run again with them."
                )
            self._check_limits(follower.owner, follower.place)
            named = tuple(dict.fromkeys([*config.compare, *files]))
            write_json(follower.dir.config_path, dataclasses.replace(config, compare=named))
            self._queue_again(follower, token)

    def delete(self, run_id: object, owner: str | None) -> None:
        """Remove a run and all its files. Raises UsageError while it is at work."""
        with self._lock:
            follower = self._follower(run_id, owner)
            record = follower.record
            of_nobody = record is None or record.owner is None
            if record is None or (of_nobody and not follower.damage):
                raise UsageError(
                    "This run was started from the command line.", "Remove its folder there."
                )
            if follower.is_running() or follower.is_unattended():
                raise UsageError("This run may still be running.", "Cancel it first.")
            self._remove(follower)

    # Common parts.

    def _follower(self, run_id: object, owner: str | None) -> Follower:
        """The follower of a run that `owner` may see. Raises NoSuchRun."""
        folder = run_folder(self.root, run_id)
        if folder.name.startswith("."):
            raise NoSuchRun
        follower = self._followers.get(folder.name)
        if follower is None:
            follower = self._followers[folder.name] = Follower(folder)
        follower.load()
        is_run = follower.record is not None or follower.config is not None or follower.damage
        if not self._may_see(follower.record, owner) or not is_run:
            raise NoSuchRun
        guarded(follower, follower.refresh)
        return follower

    def _may_see(self, record: RunRecord | None, owner: str | None) -> bool:
        if record is None or record.owner is None:
            return not self.public
        return owner is not None and owner_hash(owner) in (record.owner, record.beside)

    def _queue_again(self, follower: Follower, token: str | None) -> None:
        record = follower.record
        now = time.time()
        if record is None:
            record = RunRecord(None, follower.created)
        self._remember_token(follower.folder.name, token)
        self._set_phase(follower, record, QUEUED, since=now, has_token=bool(token), reason="")

    def _remember_token(self, run_id: str, token: str | None) -> None:
        self._tokens.pop(run_id, None)
        if token:
            self._tokens[run_id] = token

    def _check_limits(self, owner: str | None, place: str | None, n_more: int = 1) -> None:
        """`owner` is a visitor's hash; runs of the command line have none, and no limits."""
        if owner is None:
            return
        check_disk(self.root, self.limits)
        check_limits(self._scan().values(), owner, place, self.limits, self.public, n_more)


def is_public(environment: Mapping[str, str] | None = None) -> bool:
    """Return whether strangers use this page: on a Space, or when QUANTKIT_PUBLIC=1 says so."""
    environment = os.environ if environment is None else environment
    return environment.get("SYSTEM") == "spaces" or environment.get("QUANTKIT_PUBLIC", "") == "1"


def open_store(environment: Mapping[str, str] | None = None) -> RunStore:
    """Return the store that the environment describes: QUANTKIT_RUNS, QUANTKIT_WORKERS.

    Raises UsageError for a number that is none.
    """
    environment = os.environ if environment is None else environment
    text = environment.get("QUANTKIT_WORKERS", "1")
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise UsageError(f"QUANTKIT_WORKERS={text} is not a number of runs.", "Use 1 to 64.")
    root = Path(environment.get("QUANTKIT_RUNS") or "runs").absolute()
    public = is_public(environment)
    limits = PUBLIC_LIMITS if public else Limits()
    return RunStore(root, dataclasses.replace(limits, workers=int(text)), public)


def _paths(follower: Follower) -> dict[str, Path]:
    found = {file.name: follower.file_path(file.name) for file in follower.files()}
    return {name: path for name, path in found.items() if path is not None and path.is_file()}


def _check_whole(follower: Follower) -> None:
    if follower.damage:
        raise UsageError(follower.damage, "Delete it, or restore the file from a copy.")
