"""Runs on disk: ids, owners and `job.json` next to a run's other files.

    <root>/<run id>/{job.json, log.txt, config.json, events.jsonl, ...}

What was asked for is in `config.json`, what happened in `events.jsonl`; `job.json` knows only whose
run it is and what the launcher did with it. A folder without one is a run started from the command
line.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import UsageError
from quantkit.files import write_json
from quantkit.run.artifacts import NAMES
from quantkit.sandbox.untrusted import Damaged, build, moment, read_bytes, read_json
from quantkit.server.executors.protocol import MACHINE_FILE, Executor, Order
from quantkit.server.executors.registry import EXECUTORS, of_record

RECORD_FILE = "job.json"

QUEUED, STARTED, CANCELLED, STOPPED = "queued", "started", "cancelled", "stopped"

PHASES = (QUEUED, STARTED, CANCELLED, STOPPED)
_MOST_BYTES = 100_000
_LARGEST, _LONGEST_TEXT = 1e12, 2000
_OWNER = re.compile(r"[0-9a-f]{64}", re.ASCII)
_OWNER_IN_RUINS = re.compile(rb'"owner"\s*:\s*"([0-9a-f]{64})"')
_SHARE = re.compile(r"[A-Za-z0-9_-]{32}", re.ASCII)
_RUN_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", re.ASCII)


class NoSuchRun(UsageError):
    """There is no such run, or it belongs to somebody else: the two cannot be told apart."""

    def __init__(self) -> None:
        super().__init__(
            "There is no such run, or it belongs to somebody else.",
            "Open it in the browser that started it, or choose one from your list.",
        )


class NoLink(NoSuchRun):
    """Nothing is open under a link, or no longer: who has it may have no runs here."""

    def __init__(self) -> None:
        UsageError.__init__(
            self,
            "This link leads to no result, or no longer.",
            "Ask who gave it to you for another.",
        )


@dataclass(frozen=True)
class RunRecord:
    """The launcher's record of a run, and its owner. Never holds a token."""

    owner: str | None  # hash of the visitor's id; None: a run of this machine, started by hand
    created: float
    phase: str = QUEUED
    since: float = 0.0  # when the phase began
    pid: int | None = None
    pid_started: str | None = None  # tells the process from a later one of the same number
    has_token: bool = False  # a token was given; it is kept in memory only
    reason: str = ""  # why a run was stopped by the launcher
    machine: str | None = None  # of an executor that has several
    hours: int | None = None  # after which a run elsewhere is ended
    usd_per_hour: float | None = None
    estimate_seconds: float | None = None  # how long it was expected to take
    stage_seconds: dict[str, float] | None = None  # the same of each stage
    place: str | None = None  # where its visitor came from: a keyed hash, to count by
    shared: str | None = None  # what its link has in it, where its owner opened it up
    beside: str | None = None  # as `owner`: another visitor, who has shown the owner's key
    executor: str = ""  # its name; records of before they had names know it by the machine

    def __post_init__(self) -> None:
        """Raises Damaged for what no launcher writes."""
        object.__setattr__(self, "executor", of_record(self.executor, self.machine))
        if self.executor not in EXECUTORS:
            raise Damaged("its executor is unknown")
        if not all(_OWNER.fullmatch(who) for who in (self.owner, self.beside) if who is not None):
            raise Damaged("its owner is none")
        if self.phase not in PHASES:
            raise Damaged("its phase is unknown")
        moment(self.created)
        moment(self.since)
        numbers = (self.hours, self.usd_per_hour, self.estimate_seconds, self.pid)
        if not all(number is None or 0 <= number <= _LARGEST for number in numbers):
            raise Damaged("it has a number out of range")
        of_stages = self.stage_seconds or {}
        if not all(n in NAMES and 0 <= s <= _LARGEST for n, s in of_stages.items()):
            raise Damaged("it has a number out of range")
        if self.shared is not None and not _SHARE.fullmatch(self.shared):
            raise Damaged("its link is none")
        texts = (self.reason, self.machine or "", self.pid_started or "", self.place or "")
        if any(len(text) > _LONGEST_TEXT for text in texts):
            raise Damaged("it has a text that is too long")

    @property
    def done_by(self) -> Executor:
        return EXECUTORS[self.executor]

    @property
    def is_remote(self) -> bool:
        """Return whether the work is done elsewhere."""
        return self.done_by.is_remote

    @property
    def order(self) -> Order:
        """Return what its executor is told."""
        return Order(
            self.executor,
            self.machine,
            self.hours,
            self.usd_per_hour,
            self.estimate_seconds,
            self.stage_seconds,
        )


def new_run_id() -> str:
    """Return an id that nobody can guess. It is also the folder's name, so it does not begin with a
    dash.
    """
    while (run_id := secrets.token_urlsafe(16)).startswith(("-", "_")):
        pass
    return run_id


def new_share() -> str:
    """Return what stands in a link that nobody can guess."""
    return secrets.token_urlsafe(24)


def run_folder(root: Path, run_id: object) -> Path:
    """Return the folder of a run directly under `root`. Raises NoSuchRun for anything else."""
    if not isinstance(run_id, str) or not _RUN_ID.fullmatch(run_id):
        raise NoSuchRun
    folder = root / run_id
    if folder.is_symlink() or not folder.is_dir():
        raise NoSuchRun
    return folder


def new_run_folder(root: Path, run_id: object) -> Path:
    """Return where a run of that id would lie. Raises NoSuchRun when it is not an id."""
    if not isinstance(run_id, str) or not _RUN_ID.fullmatch(run_id) or run_id.startswith("."):
        raise NoSuchRun
    return root / run_id


def owner_hash(owner: str) -> str:
    """Return what is stored of a visitor's id: enough to know it again, not enough to use it."""
    return hashlib.sha256(f"quantkit owner {owner}".encode()).hexdigest()


def load_record(folder: Path) -> RunRecord | None:
    """Return the run's record; None for a run that was started from the command line. Raises
    Damaged for one that cannot be read.
    """
    path = folder / RECORD_FILE
    try:
        return build(RunRecord, read_json(path, _MOST_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Damaged(error.strerror or "it cannot be opened") from None


def salvaged_record(folder: Path) -> RunRecord:
    """Return what can be told of a run whose record is damaged: it is stopped, and whose it is
    where the owner's hash still stands in the file, which nobody but the launcher writes.
    """
    try:
        found = _OWNER_IN_RUINS.findall(read_bytes(folder / RECORD_FILE, _MOST_BYTES))
    except (OSError, Damaged):
        found = []
    owner = found[0].decode() if len(set(found)) == 1 else None
    try:
        made = min(time.time(), max(0.0, folder.stat().st_mtime))
    except OSError:
        made = 0.0
    machine = "unknown" if os.path.lexists(folder / MACHINE_FILE) else None
    return RunRecord(owner, made, STOPPED, made, machine=machine)


def save_record(folder: Path, record: RunRecord) -> None:
    write_json(folder / RECORD_FILE, record)
