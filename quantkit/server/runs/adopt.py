"""Adopt runs that only their executor still knows, after this server has lost them."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable
from pathlib import Path

from quantkit.config import RunConfig
from quantkit.errors import QuantkitError
from quantkit.files import write_json
from quantkit.run.folder import RunDir
from quantkit.sandbox.untrusted import build, parse
from quantkit.server.executors.protocol import Executor, FoundRun, Order
from quantkit.server.runs.record import (
    STOPPED,
    RunRecord,
    new_run_folder,
    owner_hash,
    save_record,
)

DELETED_FILE = ".deleted"  # ids of runs that are not to come back, one a line
_MOST_ITEMS = 10_000  # of a config
_REASON = "It was found again by its {}. Resume it to see its progress."


def adopt(root: Path, owner: str, executor: Executor, found: Iterable[FoundRun]) -> tuple[str, ...]:
    """Make a folder for every run that is not here. Returns the ids of those.

    What a run says of itself there is what its owner made it say: one that is here is never
    touched.
    """
    taken, deleted = [], _deleted(root)
    for run in found:
        if run.run_id in deleted:
            continue
        try:
            config = build(RunConfig, parse(run.config.encode("utf-8"), _MOST_ITEMS))
            record = _record(run, owner, executor)
            folder = new_run_folder(root, run.run_id)
            if os.path.lexists(folder):
                continue
            folder.mkdir(parents=True)
        except (ValueError, TypeError, KeyError, OSError, QuantkitError):
            continue
        write_json(RunDir(folder).config_path, config)
        save_record(folder, record)
        taken.append(run.run_id)
    return tuple(taken)


def _record(run: FoundRun, owner: str, executor: Executor) -> RunRecord:
    order = build(Order, parse(run.order.encode("utf-8"), _MOST_ITEMS)) if run.order else Order()
    order = dataclasses.replace(order, executor=executor.name, machine=run.machine)
    return RunRecord(
        owner_hash(owner),
        run.created,
        STOPPED,
        time.time(),
        reason=_REASON.format(executor.noun),
        **dataclasses.asdict(order),
    )


def forget(root: Path, run_id: str) -> None:
    """Forget a deleted run: never adopt it again, though its executor goes on listing it."""
    with (root / DELETED_FILE).open("a", encoding="utf-8") as file:
        file.write(f"{run_id}\n")


def _deleted(root: Path) -> frozenset[str]:
    try:
        return frozenset((root / DELETED_FILE).read_text("utf-8").split())
    except FileNotFoundError:
        return frozenset()
