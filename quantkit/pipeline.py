"""The one runner: nine stages in order, each skipped when its work is already there.

`python -m quantkit run` is the only thing that runs a pipeline; the web app and remote jobs start
that command.
"""

from __future__ import annotations

import importlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from quantkit.config import PROFILES, Profile, RunConfig
from quantkit.errors import QuantkitError, UsageError
from quantkit.rundir import (
    PARTIAL,
    STAGES,
    Event,
    EventLog,
    RunDir,
    StageRecord,
    fingerprint,
    read_json,
    write_json,
)
from quantkit.tensors import to_json


@dataclass(frozen=True)
class Run:
    """What a stage is given: what was asked, where it is written, and who listens."""

    config: RunConfig
    dir: RunDir
    events: EventLog

    @property
    def profile(self) -> Profile:
        return PROFILES[self.config.profile]

    @cached_property
    def records(self) -> dict[str, StageRecord]:
        """Records of the stages finished before this one."""
        return self.dir.records()


def stage_module(stage: str) -> ModuleType:
    return importlib.import_module(f"quantkit.stages.{stage}")


def run(
    config: RunConfig, folder: Path, echo: Callable[[Event], None] | None = None
) -> dict[str, StageRecord]:
    """Run all stages of `config` in `folder`, or what is left of them. Returns the records.

    Raises QuantkitError; whatever was finished by then stays and is taken up by the next call.
    """
    directory = RunDir(folder)
    with directory.lock():
        _settle_config(directory, config)
        events = EventLog(directory.events_path, echo)
        events.emit(None, "started", f"{config.model}, {config.target or 'like Q4_K_M'}")
        stage: str | None = None
        try:
            for stage in _to_do(directory, config, events):
                _execute(stage, config, directory, events)
        except QuantkitError as error:
            events.emit(stage, "failed", error.message, remedy=error.remedy)
            raise
        except KeyboardInterrupt:
            events.emit(
                stage, "failed", "Interrupted.", remedy="Run the same command again to go on."
            )
            raise
        except Exception as error:
            events.emit(
                stage,
                "failed",
                f"{type(error).__name__}: {error}",
                remedy="This is a bug: please report it.",
            )
            raise
        events.emit(None, "finished", "all stages are done")
        return directory.records()


def _settle_config(directory: RunDir, config: RunConfig) -> None:
    """Save the config of a new run; in a folder that has one, refuse another."""
    if directory.config_path.exists():
        saved = RunConfig.from_json(read_json(directory.config_path))
        changed = saved.changed_fields(config)
        if changed:
            name = changed[0]
            raise UsageError(
                f"{directory.path} holds a run with {name} = {_shown(saved, name)}, not {_shown(config, name)}.",
                "Choose another --out, or `quantkit resume` to go on with what is there.",
            )
    elif any(
        path.name not in ("lock", "events.jsonl", "log.txt") for path in directory.path.iterdir()
    ):
        raise UsageError(
            f"{directory.path} is not empty and holds no run.", "Choose another --out."
        )
    write_json(directory.config_path, config)


def _shown(config: RunConfig, name: str) -> str:
    value = getattr(config, name)
    return str(value) if value is not None else "(not given)"


def stage_inputs(stage: str, config: RunConfig, directory: RunDir) -> dict[str, Any]:
    """All that a stage's result depends on: its version, its config fields, files named there, and
    the stage before.
    """
    module = stage_module(stage)
    inputs: dict[str, Any] = {"version": module.VERSION}
    inputs |= {name: to_json(getattr(config, name)) for name in module.FIELDS}
    if hasattr(module, "extra_inputs"):
        inputs |= module.extra_inputs(config)
    position = STAGES.index(stage)
    if position:
        record = directory.records().get(STAGES[position - 1])
        inputs["previous"] = record.fingerprint if record else None
    return inputs


def _to_do(directory: RunDir, config: RunConfig, events: EventLog) -> list[str]:
    """The stages to run: from the first whose record or files are missing, to the last.

    A stage whose files were dropped on purpose counts as done as long as nothing after it has to
    run. Raises QuantkitError when a record was made from other inputs.
    """
    records = directory.records()
    done = 0
    for stage in STAGES:
        record = records.get(stage)
        if record is None:
            break
        inputs = stage_inputs(stage, config, directory)
        if fingerprint(inputs) != record.fingerprint:
            name = next(
                k
                for k in sorted({*inputs, *record.inputs})
                if inputs.get(k) != record.inputs.get(k)
            )
            raise QuantkitError(
                f"The {stage} stage in {directory.path} was made with {name} = {record.inputs.get(name)},"
                f" which is now {inputs.get(name)}.",
                "Start again with another --out.",
            )
        if not record.cleaned and not all(directory.is_whole(output) for output in record.outputs):
            events.emit(stage, "note", "files of this stage are missing or changed: it runs again")
            break
        done += 1
    if done < len(STAGES):
        cleaned = next((i for i, stage in enumerate(STAGES[:done]) if records[stage].cleaned), done)
        done = min(done, cleaned)
    for stage in STAGES[:done]:
        events.emit(stage, "skipped", "done before")
    return list(STAGES[done:])


def _execute(stage: str, config: RunConfig, directory: RunDir, events: EventLog) -> None:
    events.emit(stage, "started")
    begun = time.monotonic()
    folder = directory.stage_dir(stage)
    folder.mkdir(parents=True, exist_ok=True)
    inputs = stage_inputs(stage, config, directory)
    result = stage_module(stage).execute(Run(config, directory, events))
    record = StageRecord(
        stage,
        inputs,
        tuple(directory.describe(path) for path in result.outputs),
        round(time.monotonic() - begun, 1),
        to_json(result.summary),
    )
    directory.save_record(record)
    for left in folder.glob(f"**/*{PARTIAL}"):
        left.unlink()
    events.emit(
        stage, "finished", f"{record.seconds:.0f} s", seconds=record.seconds, **record.summary
    )


def clean(folder: Path) -> int:
    """Drop what only the stages themselves need (levels, Hessians, search state); keep results.
    Returns the bytes freed.
    """
    directory = RunDir(folder)
    with directory.lock():
        freed = 0
        for stage, record in directory.records().items():
            module = stage_module(stage)
            dropped = [
                o
                for o in record.outputs
                if getattr(module, "is_intermediate", lambda _: False)(o.path)
            ]
            for output in dropped:
                path = folder / output.path
                if path.exists():
                    freed += path.stat().st_size
                    path.unlink()
            if dropped:
                directory.save_record(StageRecord(**{**vars(record), "cleaned": True}))
        for left in folder.glob(f"*/**/*{PARTIAL}"):
            freed += left.stat().st_size
            left.unlink()
        for path in sorted(folder.glob("*/**/"), reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                shutil.rmtree(path)
        return freed
