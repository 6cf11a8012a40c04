"""The limits of a server and its visitors, and who is next."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from quantkit.errors import UsageError
from quantkit.server.executors import process
from quantkit.server.runs.follow import Follower
from quantkit.server.runs.record import QUEUED, RunRecord
from quantkit.sizes import size

CLEAN, DELETE = "clean", "delete"
CLEANED_FILE = ".cleaned"


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of one server and one visitor."""

    workers: int = 1  # runs at once on this machine
    remote: int = 20  # runs elsewhere at once: each is a small process here that listens
    active_per_owner: int = 3  # queued or running, on a public page
    active_per_place: int = 6  # the same of one address: a cookie can be thrown away
    active: int = 100
    min_free_bytes: int = 1_000_000_000
    bytes_per_owner: int | None = None  # of finished and unfinished runs together
    seconds: int | None = None  # a run on this machine is ended after so long
    clean_after_hours: int | None = None  # what only the stages need is dropped after the end
    keep_days: int | None = None  # a run that has ended is deleted after so long


# What strangers may use of a machine that is not theirs.
PUBLIC_LIMITS = Limits(
    bytes_per_owner=30_000_000_000, seconds=6 * 3600, clean_after_hours=24, keep_days=14
)


def what_is_due(follower: Follower, limits: Limits, now: float, public: bool) -> str | None:
    """Return what the rules say of a run that is not at work: DELETE, CLEAN or nothing.

    Runs of the command line are nobody's business; a public page has none, so a damaged run of
    nobody is a visitor's there.
    """
    record = follower.record
    if record is None or record.phase == QUEUED:
        return None
    if record.owner is None and not (follower.damage and public):
        return None
    follower.refresh()
    if follower.is_behind:
        return None
    # A time that is still to come is of a clock that was wrong: the run ended just now.
    ended = min(now, max(record.since, follower.progress.last_time or 0.0))
    if limits.keep_days and now > ended + 86400 * limits.keep_days:
        return DELETE
    is_finished = follower.progress.outcome == "finished"
    if limits.clean_after_hours and is_finished and not record.is_remote and not follower.damage:
        is_late = now > ended + 3600 * limits.clean_after_hours
        if is_late and not (follower.folder / CLEANED_FILE).exists():
            return CLEAN
    return None


def is_overdue(record: RunRecord, limits: Limits, now: float) -> bool:
    """Return whether a visitor's run is at work on this machine for longer than it may. Its process
    tells for how long, where the system knows; else the clock does.
    """
    started_by_us = record.owner is not None and not record.is_remote
    if limits.seconds is None or not started_by_us:
        return False
    age = process.age_seconds(record.pid, record.pid_started)
    return (now - record.since if age is None else age) > limits.seconds


def check_disk(root: Path, limits: Limits) -> None:
    """Raise UsageError when there is no room for another run under `root`."""
    root.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(root).free < limits.min_free_bytes:
        raise UsageError(
            "The disk of this machine is full.", "Delete runs that are no longer needed."
        )


def check_limits(
    followers: Iterable[Follower],
    mine: str,
    place: str | None,
    limits: Limits,
    public: bool,
    n_more: int = 1,
) -> None:
    """Raise UsageError when the server, the owner with the hash `mine`, or the `place` that a
    visitor comes from would have too many runs with `n_more`.
    """
    records = [(follower, follower.record) for follower in followers]
    active = [
        record
        for _, record in records
        if record is not None
        and (record.phase == QUEUED or process.is_alive(record.pid, record.pid_started))
    ]
    if len(active) + n_more > limits.active:
        raise UsageError("Too many runs are waiting.", "Try again later.")
    n_mine = sum(record.owner == mine for record in active)
    if public and n_mine + n_more > limits.active_per_owner:
        raise UsageError(
            f"You have {n_mine} runs waiting or running already; {limits.active_per_owner} are"
            " allowed at once.",
            "Wait for one to finish, or cancel one.",
        )
    n_near = sum(place is not None and record.place == place for record in active)
    if public and n_near + n_more > limits.active_per_place:
        raise UsageError(
            f"{n_near} runs from your address are waiting or running already.",
            "Wait for one to finish, or cancel one.",
        )
    if limits.bytes_per_owner is None:
        return
    owned = (f.folder for f, record in records if record is not None and record.owner == mine)
    used = sum(folder_bytes(folder) for folder in owned)
    if used > limits.bytes_per_owner:
        raise UsageError(
            f"Your runs take {size(used)} of this machine's disk.",
            "Delete one that you no longer need.",
        )


def folder_bytes(folder: Path) -> int:
    """Return what the files under a folder take; what vanishes meanwhile counts nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total


def wait_seconds(followers: dict[str, Follower], waiting: Follower, n_workers: int) -> float | None:
    """Return about how long it takes until a waiting run starts; None if unknown."""
    mine = waiting.record
    assert mine is not None
    if mine.is_remote:
        return 0.0
    left = []
    for follower in followers.values():
        record = follower.record
        if record is None or record.is_remote or record.estimate_seconds is None:
            continue
        if record.phase == QUEUED and record.since < mine.since:
            left.append(record.estimate_seconds)
        elif process.is_alive(record.pid, record.pid_started):
            left.append(max(60.0, record.estimate_seconds - (time.time() - record.since)))
    return sum(left) / n_workers if left else None


def positions(followers: dict[str, Follower]) -> dict[str, int]:
    """Return the place in the queue of every waiting run; 1 is next."""
    waiting = [
        (record.since, run_id)
        for run_id, follower in followers.items()
        if (record := follower.record) is not None
        and record.phase == QUEUED
        and not record.is_remote
    ]
    return {run_id: place for place, (_, run_id) in enumerate(sorted(waiting), 1)}
