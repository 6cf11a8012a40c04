"""The code that runs inside a Job: the same `quantkit resume` as anywhere, reported line by line.

    python -m quantkit.server.executors.hf_jobs.in_job

What is to be done comes from the environment: QUANTKIT_CONFIG (a RunConfig as JSON) and
QUANTKIT_STATE, a folder that outlives the machine when a bucket is mounted. The work is done on the
machine's own disk: a mounted bucket need not know locks, links or writing in the middle. Finished
stages are copied to the state whole, and from it when the run is started again elsewhere.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import IO

from quantkit.config import RunConfig
from quantkit.files import copy_whole, write_json
from quantkit.run.artifacts import RELATIVE
from quantkit.run.events import Event, read_events
from quantkit.run.folder import OutputFile, RunDir, StageRecord
from quantkit.sandbox import secrets
from quantkit.server.executors import local, process
from quantkit.server.executors.hf_jobs.wire import event_line, file_lines
from quantkit.server.executors.protocol import RESULTS

logger = logging.getLogger(__name__)

SET_UP: tuple[str, ...] = (sys.executable, "-m", "quantkit.llamacpp.converter.install")
_POLL_SECONDS = 1.0
_MOST_LINE = 65_536  # bytes
# Written by stages that can go on in the middle.
_HALVES = RELATIVE.search_states


def main(environment: Mapping[str, str] | None = None) -> int:
    """Run to the end. Returns the worker's exit status."""
    environment = os.environ if environment is None else environment
    folder = Path(environment.get("QUANTKIT_RUN_FOLDER") or "run").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    state = Path(environment["QUANTKIT_STATE"]) if environment.get("QUANTKIT_STATE") else None
    if state is not None:
        restore(state, folder)
    config = RunConfig.from_json(json.loads(environment["QUANTKIT_CONFIG"]))
    write_json(RunDir(folder).config_path, config)
    if SET_UP:
        subprocess.run(SET_UP, check=False)  # what fails here is said by the convert stage
    out = _WholeLines()
    teller = _Teller(folder, out)
    with secrets.handed_on(process.worker_secrets(None, False)) as (more, descriptors):
        child = subprocess.Popen(
            [*local.COMMAND, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**secrets.without(os.environ), **more},
            pass_fds=descriptors,
        )

    def end(number: int, frame: FrameType | None) -> None:
        child.send_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    passing = threading.Thread(target=out.pass_on, args=(child.stdout,), daemon=True)
    passing.start()
    keeper = threading.Thread(target=_keep_until, args=(state, folder, child), daemon=True)
    if state is not None:
        keeper.start()
    while child.poll() is None:
        teller.tell()
        try:
            child.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            pass
    if state is not None:
        keeper.join()
    passing.join(_POLL_SECONDS)  # a process that the worker left behind may hold its end open
    teller.tell()
    return child.returncode


class _WholeLines:
    """The Job's log, which two write: whoever listens looks for whole lines in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def write(self, lines: bytes) -> None:
        with self._lock:
            sys.stdout.buffer.write(lines)
            sys.stdout.buffer.flush()

    def pass_on(self, stream: IO[bytes]) -> None:
        """Copy a program's output line by line, to its end."""
        for line in iter(lambda: stream.readline(_MOST_LINE), b""):
            self.write(line if line.endswith(b"\n") else line + b"\n")


class _Teller:
    """Prints what is new in a run's folder."""

    def __init__(self, folder: Path, out: _WholeLines) -> None:
        self._folder, self._out = folder, out
        self._events = folder / "events.jsonl"
        self._offset = self._events.stat().st_size if self._events.exists() else 0
        self._n_told = 0
        self._stamps: dict[str, tuple[int, int]] = {}

    def tell(self) -> None:
        lines = [line for path in RESULTS for line in self._file(path)]
        # Files first: when the end is told, everything that it speaks of has arrived.
        for event in self._new_events():
            lines.append(event_line(self._n_told, event))
            self._n_told += 1
        if lines:
            self._out.write("".join(f"{line}\n" for line in lines).encode())

    def _file(self, path: str) -> list[str]:
        try:
            stat = (self._folder / path).stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            if self._stamps.get(path) == stamp:
                return []
            data = (self._folder / path).read_bytes()
        except OSError:
            return []
        self._stamps[path] = stamp
        return list(file_lines(path, data))

    def _new_events(self) -> list[Event]:
        found, self._offset = read_events(self._events, self._offset)
        return found


def restore(state: Path, folder: Path) -> None:
    """Bring back what `keep` has put away: finished stages whose files are all there."""
    kept = RunDir(state)
    try:
        records = kept.records()
    except (OSError, ValueError, KeyError, TypeError):
        logger.warning("the state in %s cannot be read: starting from the beginning", state)
        return
    if not records:
        return
    target = RunDir(folder)
    for record in records.values():
        if not all(_copy_output(state, folder, output) for output in record.outputs):
            if not record.cleaned:
                break
        target.save_record(record)
    for half in state.glob(_HALVES):
        copy_whole(half, folder / half.relative_to(state))


def _copy_output(source: Path, target: Path, output: OutputFile) -> bool:
    """Copy one file with the time that its record has. False when it is not there whole."""
    path = source / output.path
    if not path.is_file() or path.stat().st_size != output.n_bytes:
        return False
    copy_whole(path, target / output.path)
    os.utime(target / output.path, ns=(output.mtime_ns, output.mtime_ns))
    return True


def keep(folder: Path, state: Path) -> None:
    """Copy what is finished and not there yet; the manifest last, naming only what is there."""
    done: dict[str, StageRecord] = RunDir(folder).records()
    there = RunDir(state).records()
    for stage, record in done.items():
        if stage in there and there[stage] == record:
            continue
        for output in record.outputs:
            if (folder / output.path).is_file():
                copy_whole(folder / output.path, state / output.path)
        RunDir(state).save_record(record)
    for source in folder.glob(_HALVES):
        half = state / source.relative_to(folder)
        if _is_newer(source, half):
            copy_whole(source, half)


def _is_newer(source: Path, target: Path) -> bool:
    return not target.exists() or source.stat().st_mtime > target.stat().st_mtime


def _keep_until(state: Path, folder: Path, child: subprocess.Popen[bytes]) -> None:
    """Keep what is finished, again and again until the worker has ended."""
    state.mkdir(parents=True, exist_ok=True)
    while True:
        is_last = child.poll() is not None
        try:
            keep(folder, state)
        except OSError as error:
            logger.warning("the state could not be kept: %s", error)
        if is_last:
            return
        try:
            child.wait(10 * _POLL_SECONDS)
        except subprocess.TimeoutExpired:
            pass


if __name__ == "__main__":
    secrets.hide()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
