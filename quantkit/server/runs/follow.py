"""Read a run's folder as it grows: only what is new, and only when something is new."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.config import RunConfig
from quantkit.errors import QuantkitError
from quantkit.hub import PublishedFile
from quantkit.run.artifacts import NAMES, RELATIVE, Artifacts
from quantkit.run.events import MOST_EVENT_BYTES, read_some_events
from quantkit.run.folder import RunDir
from quantkit.sandbox.untrusted import (
    Damaged,
    build,
    open_plain,
    read_bytes,
    read_json,
    shortened,
)
from quantkit.server.executors.process import is_alive, started_at
from quantkit.server.executors.protocol import LOG_FILE, MACHINE_FILE, RemoteState
from quantkit.server.runs import view as views
from quantkit.server.runs.progress import Progress
from quantkit.server.runs.record import (
    CANCELLED,
    QUEUED,
    RECORD_FILE,
    STOPPED,
    RunRecord,
    load_record,
    salvaged_record,
)
from quantkit.server.runs.view import ResultFile, RunSummary, RunView

_MAX_CARD_BYTES = 200_000
_MAX_REPORT_BYTES = 20_000_000
_MAX_REPORT_ITEMS = 250_000  # a family of seven files of a thousand tensors has a quarter of that
_MAX_CONFIG_BYTES = 1_000_000
_MAX_NAME = 300  # characters of a model or target
_MAX_FILES = 1000
_LOOK_SECONDS = 0.03  # at an events file at once: the store waits meanwhile
_REST = 20.0  # while a run works: times as long as reading a file took, it is not read again


@dataclass
class _Cached:
    """A parsed file, the stamp it was read at, and until when it is not read again."""

    stamp: tuple[int, int, int] | None = None
    value: Any = None
    until: float = 0.0


@dataclass(frozen=True)
class _Loaded:
    """A record, and what is wrong with its file."""

    record: RunRecord | None
    damage: str = ""


class Follower:
    """One run's folder. Not thread-safe: the store holds a lock around it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dir = RunDir(folder)
        self.progress = Progress()
        self._offset = 0
        self._files: dict[str, _Cached] = {}
        self.is_behind = False  # whether more events wait than one look takes in
        self.n_dropped = 0  # lines of the events file that are no events
        self.fault = ""  # what nobody foresaw: told by whoever met it
        self._loaded = _Loaded(None)
        self._settled: tuple[RunRecord, RunSummary] | None = None

    @property
    def record(self) -> RunRecord | None:
        """The run's record as of the last `load`."""
        return self._loaded.record

    @property
    def damage(self) -> str:
        """A sentence where the run's own files cannot be read; empty for a whole run, and for a
        folder that holds none.
        """
        if self.fault or self._loaded.damage:
            return self.fault or self._loaded.damage
        if self.config is not None:
            return ""
        path = self.dir.config_path
        is_run = self.record is not None or os.path.lexists(path)
        return "The config.json of this run cannot be read." if is_run else ""

    def load(self) -> None:
        """Take in the run's record, if it was written since the last call."""
        loaded = self._read(RECORD_FILE, lambda path: self._load())
        if loaded is None:
            loaded = self._load() if os.path.lexists(self.folder / RECORD_FILE) else _Loaded(None)
        self._loaded = loaded

    def _load(self) -> _Loaded:
        try:
            return _Loaded(load_record(self.folder))
        except Damaged:
            damage = "The job.json of this run cannot be read."
            return _Loaded(salvaged_record(self.folder), damage)

    @property
    def config(self) -> RunConfig | None:
        """Return what was asked for; None for a folder whose config cannot be read."""
        return self._read(
            "config.json", lambda path: build(RunConfig, read_json(path, _MAX_CONFIG_BYTES))
        )

    def refresh(self) -> None:
        """Take in the events written since the last call."""
        path = self.dir.events_path
        try:
            n_bytes = path.stat().st_size
        except OSError:
            return
        if n_bytes < self._offset:  # another file than the one followed so far
            self._offset, self.progress = 0, Progress()
        began = time.monotonic()
        while time.monotonic() < began + _LOOK_SECONDS:
            if n_bytes <= self._offset or self._offset >= MOST_EVENT_BYTES:
                self.is_behind = False
                return
            found = read_some_events(path, self._offset)
            for event in found.events:
                self.progress.feed(event)
            self.n_dropped += found.n_dropped
            if found.end == self._offset:  # half a line
                self.is_behind = False
                return
            self._offset = found.end
        self.is_behind = n_bytes > self._offset

    def is_running(self) -> bool:
        """Return whether a worker is at work in the folder."""
        record = self.record
        if record is not None and is_alive(record.pid, record.pid_started):
            return True
        # A run started by hand. Trying the lock takes it for a moment, which would turn away a
        # worker that starts just then; so it is only tried while its holder is alive.
        try:
            holder = int(read_bytes(self.folder / "lock", 20).strip() or 0)
            return started_at(holder) is not None and self.dir.is_locked()
        except (OSError, ValueError):
            return False

    def state(self) -> str:
        record = self.record
        if record is not None and record.phase == QUEUED:
            return views.QUEUED
        if self.is_running():
            return views.RUNNING
        if self.damage:
            return views.DAMAGED
        if record is not None and record.phase == CANCELLED:
            return views.CANCELLED
        if record is not None and record.phase == STOPPED:
            return views.INTERRUPTED
        return self.progress.outcome or (views.FAILED if self._last_words() else views.INTERRUPTED)

    def summary(self, position: int | None) -> RunSummary | None:
        """Return a line about the run; None for a folder that holds no run."""
        record = self.record
        # Nothing happens to a run that has ended before its record changes; most of a list has.
        if self._settled is not None and self._settled[0] is record and not self.fault:
            return self._settled[1]
        damage = self.damage
        if damage:
            return self._damaged_summary()
        self.refresh()
        config = self.config
        if config is None:
            return None
        current, state = self.progress.current, self.state()
        planned = record.stage_seconds if record and state == views.RUNNING else None
        summary = RunSummary(
            self.folder.name,
            shortened(config.model, _MAX_NAME),
            shortened(config.sizes, _MAX_NAME),
            config.profile,
            state,
            self.created,
            record is None or record.owner is None,
            position,
            current.name if current else None,
            current.percent if current else None,
            self.progress.overall(planned, time.time()),
            self.progress.published_url is not None,
        )
        is_settled = summary.state not in (views.QUEUED, views.RUNNING) and not self.is_behind
        if record is not None and is_settled:
            self._settled = (record, summary)
        return summary

    def _damaged_summary(self) -> RunSummary:
        """Of a run whose own files cannot be read: there, and to be deleted."""
        state = views.RUNNING if self.is_running() else views.DAMAGED
        name = self.folder.name
        return RunSummary(name, name, "damaged", "", state, self.created)

    @property
    def owner(self) -> str | None:
        """The hash of the visitor it belongs to; None for a run of the command line."""
        return self.record.owner if self.record is not None else None

    @property
    def place(self) -> str | None:
        """Return where that visitor came from."""
        return self.record.place if self.record is not None else None

    def is_unattended(self) -> bool:
        """Return whether it may be at work elsewhere, and paid for, with nobody here that
        listens.
        """
        found = self.view(None)
        return found is not None and found.is_unattended

    @property
    def created(self) -> float:
        record = self.record
        if record is not None:
            return record.created
        if self.progress.log:
            return self.progress.log[0].time
        try:
            return max(0.0, self.folder.stat().st_mtime)
        except OSError:  # deleted meanwhile
            return 0.0

    def view(self, position: int | None) -> RunView | None:
        """Return everything about the run; None for a folder that holds no run."""
        summary = self.summary(position)
        if summary is None:
            return None
        config, progress = self.config, self.progress
        if self.damage or config is None:
            return self._damaged_view(summary)
        record = self.record or RunRecord(None, self.created)
        running = summary.state == views.RUNNING
        rest = _REST if running else 0.0
        current = progress.current
        error, remedy = self._error(summary.state)
        return RunView(
            **vars(summary),
            revision=config.revision,
            seed=config.seed,
            stages=tuple(progress.stages.values()),
            message=current.message if current else "",
            eta_seconds=progress.eta_seconds(time.time()) if running else None,
            machine=record.machine,
            usd_per_hour=record.usd_per_hour,
            hours=record.hours,
            executor=record.executor,
            is_remote=record.is_remote,
            remote=self._read(MACHINE_FILE, _read_machine),
            stopping=running and record.phase == CANCELLED,
            error=error,
            remedy=remedy,
            token_step=progress.token_step if summary.state == views.FAILED else None,
            curve=tuple(progress.curve),
            log=tuple(progress.log),
            report=self._read(str(RELATIVE.report), _read_report, rest),
            allocation=self._read(str(RELATIVE.best), _read_allocation, rest),
            files=self.files(),
            card=self._read(str(RELATIVE.upload / "README.md"), _read_card) or "",
            had_token=record.has_token,
            shared=record.shared,
            publish_to=config.publish,
            published_url=progress.published_url,
            repo_is_private=progress.repo_is_private,
            has_base=self.base_path() is not None,
            n_dropped=self.n_dropped,
        )

    def _damaged_view(self, summary: RunSummary) -> RunView:
        return RunView(
            **vars(summary),
            stages=tuple(Progress().stages.values()),
            error=self.damage or "The config.json of this run cannot be read.",
            remedy="Delete it, or restore the file from a copy.",
        )

    def files(self) -> tuple[ResultFile, ...]:
        """Return the finished files that a person wants: the GGUF first, never a stage's own
        working files.
        """
        found = self._results()
        return tuple(file for file, _ in found.values())

    def file_path(self, name: str) -> Path | None:
        """Return where a result file lies; None for a name that is not in `files()`."""
        found = self._results()
        return self.folder / found[name][1] if name in found else None

    def staged(self) -> tuple[tuple[PublishedFile, ...], dict[str, Path]]:
        """Return the files of the upload, and the paths of those that are on this machine."""
        record = self.dir.records().get("publish")
        outputs = record.outputs if record is not None else ()
        folder = f"{RELATIVE.upload}/"
        files = [
            PublishedFile(output.path.removeprefix(folder), output.n_bytes, output.sha256)
            for output in outputs
            if output.path.startswith(folder) and ".." not in Path(output.path).parts
        ]
        places = {file.path: self.folder / folder / file.path for file in files}
        return tuple(files), {name: path for name, path in places.items() if path.is_file()}

    def model_path(self, name: str = "") -> Path | None:
        """Return the path of a finished GGUF, the first without a name, if it is on this
        machine.
        """
        names = [f.name for f in views.models(self.files()) if name in ("", f.name)]
        path = self.file_path(names[0]) if names else None
        return path if path is not None and path.is_file() else None

    def base_path(self) -> Path | None:
        """Return the path of the full-precision original, until it is cleaned up."""
        path = Artifacts(self.folder).base
        return path if path.is_file() else None

    def _results(self) -> dict[str, tuple[ResultFile, str]]:
        rest = _REST if self.is_running() else 0.0
        return self._read("manifest.json", lambda path: self._result_paths(), rest) or {}

    def _result_paths(self) -> dict[str, tuple[ResultFile, str]]:
        records = self.dir.records()
        stage = "publish" if "publish" in records else "stitch"
        outputs = records[stage].outputs if stage in records else ()
        files = {
            path.name: (
                ResultFile(
                    path.name,
                    output.n_bytes,
                    output.sha256,
                    (self.folder / output.path).is_file(),
                ),
                output.path,
            )
            for output in outputs[:_MAX_FILES]
            if _is_result(path := Path(output.path))
        }
        return dict(sorted(files.items(), key=lambda item: _file_order(item[0])))

    def _error(self, state: str) -> tuple[str, str]:
        record = self.record
        if state == views.FAILED:
            if self.progress.outcome == "failed":
                return self.progress.error, self.progress.remedy
            return self._last_words(), ""
        if state == views.INTERRUPTED:
            if record is not None and record.phase == STOPPED:
                return record.reason, ""
            remote = self._read(MACHINE_FILE, _read_machine)
            if record is not None and record.is_remote and not (remote and remote.has_ended):
                return (
                    f"Nobody listens to its {record.done_by.noun} any more, which may still be"
                    " running and is billed.",
                    "Resume listens to it again, Cancel ends it.",
                )
            return (
                "The run was cut off: its process ended without a message.",
                "Resume it; finished stages are kept.",
            )
        return "", ""

    def _last_words(self) -> str:
        """The sentence on stderr of a worker that ended before it could write an event."""
        text = tail(self.folder / LOG_FILE, 4000).strip()
        last = text.splitlines()[-1] if text else ""
        return last.removeprefix("quantkit: ") if last.startswith("quantkit: ") else ""

    def _read(self, name: str, read: Any, rest: float = 0.0) -> Any:
        """`read(path)`, again only when the file was replaced; None when it cannot be read. One
        that a Job may replace all the time gets a `rest`: others wait for the lock meanwhile.
        """
        cached = self._files.setdefault(name, _Cached())
        path = self.folder / name
        try:
            stat = path.stat()
        except OSError:
            self._files[name] = _Cached()
            return None
        stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        began = time.monotonic()
        if cached.stamp != stamp and (not rest or began >= cached.until):
            try:
                value = read(path)
            except (OSError, ValueError, TypeError, KeyError, QuantkitError, RecursionError):
                value = None
            now = time.monotonic()
            self._files[name] = cached = _Cached(stamp, value, now + rest * (now - began))
        return cached.value


def tail(path: Path, n_bytes: int) -> str:
    """Return the end of a text file, from the first whole line on."""
    try:
        with open_plain(path) as file:
            size = file.seek(0, 2)
            start = max(0, size - n_bytes)
            file.seek(start)
            data = file.read(n_bytes)
    except (OSError, Damaged):
        return ""
    if start:
        data = data.partition(b"\n")[2]
    return data.decode("utf-8", "replace")


def _file_order(name: str) -> tuple[int, str]:
    return (0 if views.is_model(name) else 1 if name.endswith(".gguf") else 2, name)


def _is_result(path: Path) -> bool:
    """Whether a path of the manifest lies in the folder of a stage."""
    folders = map(RELATIVE.folder, NAMES)
    return any(f in path.parents for f in folders) and ".." not in path.parts


def _read_report(path: Path) -> dict[str, Any] | None:
    value = read_json(path, _MAX_REPORT_BYTES, _MAX_REPORT_ITEMS)
    return value if isinstance(value, dict) else None


def _read_allocation(path: Path) -> dict[str, str]:
    return {
        tensor: choice["qtype"]
        for tensor, choice in (_read_report(path) or {}).items()
        if isinstance(choice, dict) and isinstance(choice.get("qtype"), str)
    }


def _read_machine(path: Path) -> RemoteState:
    return build(RemoteState, read_json(path, _MAX_CONFIG_BYTES))


def _read_card(path: Path) -> str:
    with open_plain(path) as file:
        return file.read(_MAX_CARD_BYTES).decode("utf-8", "replace")
