"""Run the nine stages in order, and skip those whose work is already done.

`python -m quantkit run` is the only thing that runs a pipeline; the web app and remote jobs start
that command.
"""

from __future__ import annotations

import dataclasses
import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from quantkit import hub
from quantkit.config import RunConfig
from quantkit.errors import QuantkitError, UsageError
from quantkit.files import PARTIAL, READERS, unlink, write_json
from quantkit.hub import given
from quantkit.machine import faults, room
from quantkit.machine.kind import device_kind
from quantkit.ranks.group import ALONE, Ranks
from quantkit.run import terminal
from quantkit.run.artifacts import NAMES
from quantkit.run.events import Event, EventLog, outcome, read_events
from quantkit.run.folder import (
    Damaged,
    MadeOn,
    OutputFile,
    RunDir,
    StageRecord,
    fingerprint,
    read_json,
)
from quantkit.run.stage import Run, Stage
from quantkit.sandbox import untrusted
from quantkit.stages import STAGES
from quantkit.tensors import to_json

Echo = Callable[[Event], None]
_OF_RESULTS = {"validate", "publish"}  # stages that read the finished files


def run(
    config: RunConfig,
    folder: Path,
    echo: Echo | None = None,
    until: str = STAGES[-1].name,
    ranks: Ranks = ALONE,
) -> dict[str, StageRecord]:
    """Run the stages of `config` in `folder` up to `until`, or what is left of them, as rank 0 of
    `ranks`.

    Returns the records of all finished stages. Raises QuantkitError; whatever was finished by then
    stays and is taken up by the next call.
    """
    directory = RunDir(folder.absolute())  # what runs in the sandbox runs elsewhere
    with directory.lock():
        _settle_config(directory, config)
        events = EventLog(directory.events_path, echo)
        with _failures_told(events, folder, ranks) as at:
            before = last_end(directory)
            events.emit(None, "started", f"{config.model}, {config.sizes}", kills=room.kills())
            if before:
                events.emit(None, "note", f"the previous attempt: {before}")
            if config.publish:
                hub.check_write(config.publish, hub.resolve_token(), config.private)
            if "validate" not in directory.records():
                why = given.check_there((*config.compare, *config.levels_from), hub.resolve_token())
                if why:
                    events.emit(None, "note", f"files to compare with were not looked for: {why}")
            for stage in _to_do(directory, config, events, until):
                at.stage, at.needs = stage.name, _needs(stage, config, directory)
                _execute(stage, Run(config, directory, events, ranks), at.needs)
            at.stage, at.needs = None, 0
            events.emit(None, "finished", "all stages are done")
            return directory.records()


def last_end(directory: RunDir) -> str:
    """Return what is likely to have ended an attempt that left no word; else nothing."""
    events, _ = read_events(directory.events_path)
    if not events or outcome(events[-1:]) is not None:
        return ""
    begun = next((e for e in reversed(events) if e.stage is None and e.kind == "started"), None)
    kills = begun.data.get("kills") if begun else None
    return faults.ended_for_memory(kills) if isinstance(kills, dict) else ""


def _needs(stage: Stage, config: RunConfig, directory: RunDir) -> int:
    """About the bytes of memory that a long stage takes; 0 for the others."""
    if not stage.takes_long:
        return 0
    from quantkit.config.levels import plan_levels
    from quantkit.gguf_file.base import load_base, load_specs
    from quantkit.planning.cost import free_bytes, memory_by_stage

    base, specs = load_base(directory), load_specs(directory)
    levels = plan_levels(specs, config)
    return memory_by_stage(config, base, levels, free_bytes(config.device)).get(stage.name, 0)


@contextmanager
def _failures_told(events: EventLog, folder: Path, ranks: Ranks) -> Iterator[_Progress]:
    """Whatever goes wrong becomes the last event, if there is room for one."""
    at = _Progress()
    before = threading.excepthook

    def died(about: threading.ExceptHookArgs) -> None:
        """End the process when a thread ended for lack of memory: see `terminal`."""
        if isinstance(about.exc_value, MemoryError):
            told = faults.explain(about.exc_value, folder, at.needs, at.stage or "")
            _tell(events, at, told or QuantkitError("There is too little memory."))
        before(about)

    def lost(error: QuantkitError) -> None:
        """Say why this process is ended: another one has, and the main thread waits for it."""
        _tell(events, at, error)
        terminal.failed(error)

    threading.excepthook = died
    try:
        with ranks.ending(lost):
            yield at
    except KeyboardInterrupt:
        _tell(events, at, QuantkitError("Interrupted.", "Run the same command again."))
        raise
    except Exception as error:
        told = faults.explain(error, folder, at.needs, at.stage or "")
        if told is None:
            message = f"{type(error).__name__}: {error}"
            _tell(events, at, QuantkitError(message, "This is a bug: please report it."))
            raise
        _tell(events, at, told)
        if told is error:
            raise
        raise told from error
    finally:
        threading.excepthook = before


@dataclass
class _Progress:
    """The current stage, and about how much memory it takes."""

    stage: str | None = None
    needs: int = 0


def _tell(events: EventLog, at: _Progress, error: QuantkitError) -> None:
    with suppress(OSError):  # the log's own disk may be what is full: the caller says the same
        events.fail(at.stage, error)


def publish(
    folder: Path, repo: str, private: bool, echo: Echo | None = None, public: bool = False
) -> dict[str, object]:
    """Upload a finished run to `repo`, privately when that is asked for or the model is private or
    gated and `public` is not. Returns the summary of its publish stage.

    Raises QuantkitError when the run is not validated or the Hub refuses.
    """
    directory = open_run(folder)
    if "validate" not in directory.records():
        raise QuantkitError(
            f"The run in {folder} is not validated, and only validated files are published.",
            f"Finish it first: quantkit resume {folder}",
        )
    saved = load_config(directory)
    config = dataclasses.replace(saved, publish=repo, private=private, public=public)
    return run(config, folder, echo)["publish"].summary


def open_run(folder: Path) -> RunDir:
    """Return the folder of a run. Raises UsageError for one that holds none."""
    directory = RunDir(folder)
    if not directory.config_path.exists():
        raise UsageError(f"{folder} holds no run.", "Give the --out folder of `quantkit run`.")
    return directory


def load_config(directory: RunDir) -> RunConfig:
    """Return what a run was asked for. Raises Damaged."""
    try:
        return RunConfig.from_json(read_json(directory.config_path))
    except (untrusted.Damaged, UsageError) as error:
        raise Damaged(directory.config_path, f"it is not the config of a run ({error})") from None


# What may lie in a folder before its config does, a config that a kill cut short included.
_BEFORE_CONFIG = ("lock", "events.jsonl", "log.txt", "traceback.txt", f"config.json{PARTIAL}")


def _settle_config(directory: RunDir, config: RunConfig) -> None:
    """Save the config of a new run; in a folder that has one, refuse another."""
    if directory.config_path.exists():
        saved = load_config(directory)
        changed = saved.changed_fields(config)
        if changed:
            name = changed[0]
            raise UsageError(
                f"{directory.path} holds a run with {name} = {_shown(saved, name)},"
                f" not {_shown(config, name)}.",
                "Choose another --out, or use `quantkit resume` to continue that run.",
            )
    elif not directory.records() and any(
        path.name not in _BEFORE_CONFIG for path in directory.path.iterdir()
    ):  # with records, but without a config that was damaged, their inputs say what run it was
        raise UsageError(
            f"{directory.path} is not empty and holds no run.", "Choose another --out."
        )
    write_json(directory.config_path, config)


def _shown(config: RunConfig, name: str) -> str:
    value = getattr(config, name)
    if isinstance(value, tuple):
        value = ", ".join(map(str, value)) or None
    return str(value) if value is not None else "(not given)"


def stage_inputs(stage: Stage, config: RunConfig, directory: RunDir) -> dict[str, object]:
    """Return all that a stage's result depends on: its version, its config fields, files named
    there, and the stage before.
    """
    inputs: dict[str, object] = {"version": stage.version}
    inputs |= {name: to_json(getattr(config, name)) for name in stage.fields}
    inputs |= stage.extra_inputs(config)
    position = STAGES.index(stage)
    if position:
        record = directory.records().get(STAGES[position - 1].name)
        inputs["previous"] = record.fingerprint if record else None
    return inputs


def _to_do(directory: RunDir, config: RunConfig, events: EventLog, until: str) -> list[Stage]:
    """The stages to run, up to `until`: from the first whose record or files are missing.

    A stage whose files were dropped on purpose counts as done as long as nothing after it has to
    run. Raises QuantkitError when a record was made from other inputs; what a file is only measured
    on or beside may differ, and is measured again.
    """
    records = directory.records()
    stages = STAGES[: NAMES.index(until) + 1]
    done = 0
    for stage in stages:
        record = records.get(stage.name)
        if record is None:
            break
        inputs = stage_inputs(stage, config, directory)
        if fingerprint(inputs) != record.fingerprint:
            names = sorted({*inputs, *record.inputs})
            changed = [k for k in names if inputs.get(k) != record.inputs.get(k)]
            if all(k.removesuffix("_sha256").split()[0] in config.MEASURED_ON for k in changed):
                events.emit(stage.name, "note", f"{changed[0]} was changed: this stage runs again")
                break
            name = changed[0]
            raise QuantkitError(
                f"The {stage.name} stage in {directory.path} was made with"
                f" {name} = {record.inputs.get(name)}, which is now {inputs.get(name)}.",
                "Start a new run (with another --out).",
            )
        if not stage.is_current(config, record):
            break
        done += 1
    done = _n_whole([records[s.name] for s in stages[:done]], stages, directory, events)
    records = directory.records()
    # Neither publishing nor measuring needs a dropped file.
    if {stage.name for stage in stages[done:]} - _OF_RESULTS:
        cleaned = (i for i, stage in enumerate(stages[:done]) if records[stage.name].cleaned)
        done = min(done, next(cleaned, done))
    for stage in stages[:done]:
        events.emit(stage.name, "skipped", "done before")
    return list(stages[done:])


def _n_whole(
    done: Sequence[StageRecord], stages: Sequence[Stage], directory: RunDir, events: EventLog
) -> int:
    """How many of the finished stages have all their files. What a stage that is left reads is
    hashed: this process has not seen it being written. Where bytes have changed, nothing that came
    of them is taken up again.
    """
    hashed: dict[str, bool] = {}  # each is read once, though more and more may be left to do

    def is_whole(output: OutputFile) -> bool:
        if output.path not in hashed:
            hashed[output.path] = directory.is_whole(output, hashing=True)
        return hashed[output.path]

    n = len(done)
    while True:
        left = stages[n:]
        bad = (
            i
            for i, record in enumerate(done[:n])
            for output in _kept(record)
            if not (
                is_whole(output) if _is_read(record, output, left) else directory.is_whole(output)
            )
        )
        found = next(bad, None)
        if found is None:
            break
        n = found
    if n < len(done):
        text = "files are missing or changed: this stage runs again"
        events.emit(done[n].stage, "note", text)
    for record in done[n:]:
        there = [o for o in _kept(record) if (directory.path / o.path).is_file()]
        if not all(map(is_whole, there)):
            directory.forget(record.stage)
            break
    return n


def _kept(record: StageRecord) -> list[OutputFile]:
    """The files of a stage that should be there: `clean` drops some."""
    stage = _stage_of(record)
    return [o for o in record.outputs if not (record.cleaned and stage.is_intermediate(o.path))]


def _stage_of(record: StageRecord) -> Stage:
    return STAGES[NAMES.index(record.stage)]


def _is_read(record: StageRecord, output: OutputFile, left: Sequence[Stage]) -> bool:
    """Return whether a stage that is left to do reads a finished file."""
    last = NAMES.index(_stage_of(record).last_reader(output.path))
    return any(NAMES.index(stage.name) <= last for stage in left)


def _check_outputs(directory: RunDir) -> None:
    """Hash the finished files once more. Raises QuantkitError when one is not as it was stitched:
    hours lie between, and what is published is what was measured.
    """
    outputs = directory.records()["stitch"].outputs
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(partial(directory.is_whole, hashing=True), outputs))
    for output, whole in zip(outputs, found, strict=True):
        if not whole:
            raise QuantkitError(
                f"{output.path} is not the file that was stitched: its bytes have changed.",
                "Check the disk, and resume: the file is made again.",
            )


def _execute(stage: Stage, run: Run, needs: int) -> None:
    name, directory, events = stage.name, run.dir, run.events
    events.emit(name, "started")
    begun = time.monotonic()
    little = faults.little_memory(needs, name)
    if little:
        events.emit(name, "note", little)
    if name in _OF_RESULTS:
        _check_outputs(directory)
    folder = directory.stage_dir(name)
    folder.mkdir(parents=True, exist_ok=True)
    inputs = stage_inputs(stage, run.config, directory)
    result = stage.execute(run)
    with ThreadPoolExecutor(READERS) as pool:
        outputs = tuple(pool.map(directory.describe, result.outputs))
    record = StageRecord(
        name,
        inputs,
        outputs,
        round(time.monotonic() - begun, 1),
        to_json(result.summary),
        made_on=MadeOn(run.ranks.size, device_kind(run.config.device)),
    )
    directory.save_record(record)
    for left in folder.glob(f"**/*{PARTIAL}"):
        left.unlink()
    gc.collect()  # a model refers to itself in many places, and may be gigabytes
    events.emit(
        name, "finished", f"{record.seconds:.0f} s", seconds=record.seconds, **record.summary
    )


def clean(folder: Path) -> int:
    """Drop what only the stages themselves need (levels, gradients); keep results.

    Returns the bytes freed.
    """
    directory = open_run(folder)
    with directory.lock():
        freed = 0
        for record in directory.records().values():
            stage = _stage_of(record)
            dropped = [output for output in record.outputs if stage.is_intermediate(output.path)]
            if dropped:
                freed += directory.drop(record.stage, dropped)
        for left in folder.glob(f"*/**/*{PARTIAL}"):
            freed += unlink(left)
        return freed
