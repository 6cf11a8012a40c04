"""A run's folder: config, manifest, events, lock, and one folder per stage.

    runs/<id>/{config.json, manifest.json, events.jsonl, lock, 1-fetch/ ... 9-publish/}

Every file is written under a `.partial` name and moved into place; the manifest is written last and
is the only truth about what is finished. A stage is skipped when its inputs are those of its record
and its outputs are whole. Inputs that differ fail closed: a run folder holds one run.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from quantkit.errors import QuantkitError
from quantkit.files import sha256_file, unlink, write_json
from quantkit.run.artifacts import NAMES, Artifacts
from quantkit.sandbox import untrusted
from quantkit.tensors import to_json

T = TypeVar("T")

_MOST_MANIFEST_BYTES, _MOST_MANIFEST_ITEMS = 64_000_000, 250_000


class Damaged(QuantkitError, ValueError):
    """A file of a run is damaged: its name, and what to do about it."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged: {reason}.", _mending(path))


def _mending(path: Path) -> str:
    if path.name == "config.json":
        return "Delete it, and give the whole `quantkit run` command again: what is done stays."
    if path.name == "manifest.json":
        return "Delete it and resume: the stages run again."
    if any(re.match(r"\d-", part) for part in path.parts[:-1]):
        return "Delete it and resume: what it held is made again."
    return "Put it back from a copy, or delete it."


def read_json(path: Path) -> Any:
    """Read the value in a JSON file. Raises Damaged if it is not JSON, OSError if it is missing."""
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Damaged(path, f"it is not JSON ({error})") from None


def read_as(kind: type[T], path: Path) -> T:
    """Return the value in a JSON file as a dataclass, or as a table or list of them. Raises Damaged
    for what is no such, OSError where it is missing.
    """
    try:
        return cast(T, untrusted.typed(kind, read_json(path)))
    except untrusted.Damaged as error:
        raise Damaged(path, str(error)) from None


@dataclass(frozen=True)
class OutputFile:
    """A finished file of a stage, relative to the run's folder."""

    path: str
    n_bytes: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class MadeOn:
    """How many processes made something, and the kind of device of each. Sums over another number
    of them, or on another kind, are rounded otherwise.
    """

    n_ranks: int
    device: str

    def __str__(self) -> str:
        return self.device if self.n_ranks == 1 else f"{self.n_ranks} x {self.device}"


@dataclass(frozen=True)
class StageRecord:
    """The manifest's entry of a finished stage."""

    stage: str
    inputs: dict[str, object]
    outputs: tuple[OutputFile, ...]
    seconds: float
    summary: dict[str, object]
    cleaned: bool = False  # files of it were dropped on purpose: nothing needs them
    made_on: MadeOn | None = None

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.inputs)


_SCHEMA = 2  # 1 had a stage `database`, and tuned within the search


def _record(stage: str, value: object) -> StageRecord:
    """A record of the manifest. Raises what a value of another shape raises."""
    record = untrusted.build(StageRecord, value)
    if stage not in NAMES:
        raise ValueError(f"{stage} is no stage")
    for o in record.outputs:
        if Path(o.path).is_absolute() or ".." in Path(o.path).parts:
            raise ValueError(f"{stage} with {o.path}")
    return record


def fingerprint(inputs: Mapping[str, object]) -> str:
    """Return the sha256 of the canonical JSON of a stage's inputs."""
    return hashlib.sha256(json.dumps(to_json(inputs), sort_keys=True).encode()).hexdigest()


def _try_lock(file: IO[str]) -> bool:
    """Take the lock, for up to half a second: whoever asks `is_locked` holds it for an instant."""
    for _ in range(5):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(0.1)
    return False


class RunDir:
    """Names and records inside one run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def stage_dir(self, stage: str) -> Path:
        return self.artifacts.folder(stage)

    @property
    def artifacts(self) -> Artifacts:
        return Artifacts(self.path)

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def _manifest_path(self) -> Path:
        return self.path / "manifest.json"

    def records(self) -> dict[str, StageRecord]:
        """Return the records of the finished stages, by name. Raises Damaged for a damaged
        manifest.
        """
        path = self._manifest_path
        if not os.path.lexists(path):
            return {}
        try:
            value = untrusted.read_json(path, _MOST_MANIFEST_BYTES, _MOST_MANIFEST_ITEMS)
            schema, stages = value["schema"], value["stages"]
            if isinstance(schema, int) and schema > _SCHEMA:
                raise QuantkitError(
                    f"{path} was made by a newer quantkit (schema {schema}).",
                    "Resume with that one, or start a new run (with another --out).",
                )
            if schema != _SCHEMA:
                raise QuantkitError(
                    f"{path} was made by an older quantkit with other stages (schema {schema}).",
                    "Start a new run (with another --out): the files that it published stay valid.",
                )
            if value.get("sha256", fingerprint(stages)) != fingerprint(stages):
                raise Damaged(path, "its sum is another")
            return {stage: _record(stage, record) for stage, record in stages.items()}
        except Damaged:
            raise
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"it is no manifest ({type(error).__name__}: {error})"
            raise Damaged(path, reason) from None

    def save_record(self, record: StageRecord) -> None:
        self._save({**self.records(), record.stage: record})

    def drop(self, stage: str, outputs: Sequence[OutputFile]) -> int:
        """Delete outputs of a stage that nothing needs any more. Return the bytes that are free
        then: none of a file that has another name, too.
        """
        self.save_record(dataclasses.replace(self.records()[stage], cleaned=True))
        return sum(unlink(self.path / output.path) for output in outputs)

    def forget(self, stage: str) -> None:
        """Drop the records of a stage and of all after it, and what they would take up again.
        Finished results stay until better ones take their place.
        """
        begins = NAMES.index(stage)
        self._save({name: r for name, r in self.records().items() if NAMES.index(name) < begins})
        for name in NAMES[begins : NAMES.index("stitch")]:
            if self.stage_dir(name).exists():
                shutil.rmtree(self.stage_dir(name))

    def _save(self, records: dict[str, StageRecord]) -> None:
        ordered = to_json({stage: records[stage] for stage in NAMES if stage in records})
        value = {"schema": _SCHEMA, "sha256": fingerprint(ordered), "stages": ordered}
        write_json(self._manifest_path, value)

    def describe(self, path: Path) -> OutputFile:
        """Return the manifest's entry for a finished file."""
        stat = path.stat()
        return OutputFile(
            str(path.relative_to(self.path)), stat.st_size, stat.st_mtime_ns, sha256_file(path)
        )

    def is_whole(self, output: OutputFile, hashing: bool = False) -> bool:
        """Return whether the file is there with the recorded bytes. Contents are hashed when the
        file was touched since, and always with `hashing`: a bad disk changes bytes and no time.
        """
        path = self.path / output.path
        if not path.is_file():
            return False
        stat = path.stat()
        if stat.st_size != output.n_bytes:
            return False
        is_trusted = stat.st_mtime_ns == output.mtime_ns and not hashing
        return is_trusted or sha256_file(path) == output.sha256

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; the kernel lets go of it however the process ends.

        Raises QuantkitError when another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("a+") as file:
            if not _try_lock(file):
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise QuantkitError(
                    f"Another run (process {holder}) is running in {self.path}.",
                    "Wait for it, follow it with `quantkit status`, or choose another --out.",
                )
            file.seek(0)
            file.truncate()
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def is_locked(self) -> bool:
        """Return whether a process is at work in the folder."""
        lock = self.path / "lock"
        if not lock.exists():
            return False
        with lock.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
        return False
