"""The one runner: nine stages in order, each skipped when its work is already there.

`python -m quantkit run` is the only thing that runs a pipeline; the web app and remote jobs start
that command.
"""

from __future__ import annotations

import dataclasses
import errno
import gc
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from quantkit import hub
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

Echo = Callable[[Event], None]


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
    """The module of a stage: NAME, VERSION, FIELDS, execute(run), and what else it defines of

    extra_inputs(config)       more that its result depends on, such as a file's hash
    is_intermediate(path)      whether `clean` may drop an output
    is_current(config, record) False when the record, though its inputs are the same, is not enough
    """
    return importlib.import_module(f"quantkit.stages.{stage}")


def run(
    config: RunConfig, folder: Path, echo: Echo | None = None, until: str = STAGES[-1]
) -> dict[str, StageRecord]:
    """Run the stages of `config` in `folder` up to `until`, or what is left of them.

    Returns the records of all finished stages. Raises QuantkitError; whatever was finished by then
    stays and is taken up by the next call.
    """
    directory = RunDir(folder)
    with directory.lock():
        _settle_config(directory, config)
        events = EventLog(directory.events_path, echo)
        events.emit(None, "started", f"{config.model}, {config.sizes}")
        with _failures_told(events) as told:
            if config.publish:
                hub.check_write(config.publish, hub.resolve_token(), config.private)
            for stage in _to_do(directory, config, events, until):
                told.append(stage)
                _execute(stage, config, directory, events)
        events.emit(None, "finished", "all stages are done")
        return directory.records()


@contextmanager
def _failures_told(events: EventLog) -> Iterator[list[str | None]]:
    """Whatever goes wrong becomes the last event. Yields the list of stages begun."""
    begun: list[str | None] = [None]
    try:
        yield begun
    except QuantkitError as error:
        events.emit(begun[-1], "failed", error.message, remedy=error.remedy)
        raise
    except KeyboardInterrupt:
        events.emit(begun[-1], "failed", "Interrupted.", remedy="Run the same command again.")
        raise
    except Exception as error:
        told = _want_of_room(error)
        if told is not None:
            events.emit(begun[-1], "failed", told.message, remedy=told.remedy)
            raise told from error
        message = f"{type(error).__name__}: {error}"
        events.emit(begun[-1], "failed", message, remedy="This is a bug: please report it.")
        raise


def _want_of_room(error: Exception) -> QuantkitError | None:
    """What to say of an error that means no more than a full disk or memory."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return QuantkitError("The disk is full.", "Free some, and resume: what is done stays.")
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which not every stage has
        return QuantkitError(
            "The GPU has too little memory free.",
            "End what else uses it, or resume with QUANTKIT_MEMORY set to less than it has.",
        )
    if isinstance(error, MemoryError):
        return QuantkitError("There is too little memory.", "End what else uses it, and resume.")
    return None


def publish(
    folder: Path, repo: str, private: bool, echo: Echo | None = None, public: bool = False
) -> dict[str, Any]:
    """Upload a finished run to `repo`, privately when that is asked for or the model is private or
    gated and `public` is not. Returns the summary of its publish stage.

    Raises QuantkitError when the run is not validated or the Hub refuses.
    """
    directory = RunDir(folder)
    if "validate" not in directory.records():
        raise QuantkitError(
            f"The run in {folder} is not validated, and only validated files are published.",
            f"Finish it first: quantkit resume {folder}",
        )
    saved = RunConfig.from_json(read_json(directory.config_path))
    config = dataclasses.replace(saved, publish=repo, private=private, public=public)
    return run(config, folder, echo)["publish"].summary


# What may lie in a folder before its config does, a config that a kill cut short included.
_BEFORE_CONFIG = ("lock", "events.jsonl", "log.txt", f"config.json{PARTIAL}")


def _settle_config(directory: RunDir, config: RunConfig) -> None:
    """Save the config of a new run; in a folder that has one, refuse another."""
    if directory.config_path.exists():
        saved = RunConfig.from_json(read_json(directory.config_path))
        changed = saved.changed_fields(config)
        if changed:
            name = changed[0]
            raise UsageError(
                f"{directory.path} holds a run with {name} = {_shown(saved, name)},"
                f" not {_shown(config, name)}.",
                "Choose another --out, or `quantkit resume` to go on with what is there.",
            )
    elif any(path.name not in _BEFORE_CONFIG for path in directory.path.iterdir()):
        raise UsageError(
            f"{directory.path} is not empty and holds no run.", "Choose another --out."
        )
    write_json(directory.config_path, config)


def _shown(config: RunConfig, name: str) -> str:
    value = getattr(config, name)
    if isinstance(value, tuple):
        value = ", ".join(map(str, value)) or None
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


def _to_do(directory: RunDir, config: RunConfig, events: EventLog, until: str) -> list[str]:
    """The stages to run, up to `until`: from the first whose record or files are missing.

    A stage whose files were dropped on purpose counts as done as long as nothing after it has to
    run. Raises QuantkitError when a record was made from other inputs.
    """
    records = directory.records()
    stages = STAGES[: STAGES.index(until) + 1]
    done = 0
    for stage in stages:
        record = records.get(stage)
        if record is None:
            break
        inputs = stage_inputs(stage, config, directory)
        if fingerprint(inputs) != record.fingerprint:
            names = sorted({*inputs, *record.inputs})
            name = next(k for k in names if inputs.get(k) != record.inputs.get(k))
            raise QuantkitError(
                f"The {stage} stage in {directory.path} was made with"
                f" {name} = {record.inputs.get(name)}, which is now {inputs.get(name)}.",
                "Start again with another --out.",
            )
        if not getattr(stage_module(stage), "is_current", lambda *_: True)(config, record):
            break
        if not record.cleaned and not all(directory.is_whole(o) for o in record.outputs):
            events.emit(stage, "note", "files are missing or changed: this stage runs again")
            break
        done += 1
    if stages[done:] not in ((), ("publish",)):  # publishing needs no dropped file
        cleaned = (i for i, stage in enumerate(stages[:done]) if records[stage].cleaned)
        done = min(done, next(cleaned, done))
    for stage in stages[:done]:
        events.emit(stage, "skipped", "done before")
    return list(stages[done:])


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
    gc.collect()  # a model refers to itself in many places, and may be gigabytes
    events.emit(
        stage, "finished", f"{record.seconds:.0f} s", seconds=record.seconds, **record.summary
    )


def clean(folder: Path) -> int:
    """Drop what only the stages themselves need (levels, Hessians); keep results.

    Returns the bytes freed.
    """
    directory = RunDir(folder)
    if not directory.config_path.exists():
        raise UsageError(f"{folder} holds no run.", "Give the folder that was --out of a run.")
    with directory.lock():
        freed = 0
        for stage, record in directory.records().items():
            is_intermediate = getattr(stage_module(stage), "is_intermediate", lambda _: False)
            dropped = [output for output in record.outputs if is_intermediate(output.path)]
            for output in dropped:
                freed += _unlink(folder / output.path)
            if dropped:
                directory.save_record(dataclasses.replace(record, cleaned=True))
        for left in folder.glob(f"*/**/*{PARTIAL}"):
            freed += _unlink(left)
        return freed


def _unlink(path: Path) -> int:
    if not path.exists():
        return 0
    n_bytes = path.stat().st_size
    path.unlink()
    return n_bytes
