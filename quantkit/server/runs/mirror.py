"""Copy what has to outlive this machine to a persistent folder: a bucket mounted on a Space.

Runs are done on the machine's own disk, because a mounted bucket need not know locks, links or
appending. Their records, events, results and finished files are copied there whole whenever they
change, and brought back when a new machine starts.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from stat import S_ISREG

from quantkit.files import PARTIAL, copy_whole
from quantkit.run.artifacts import RELATIVE
from quantkit.sandbox.untrusted import Damaged
from quantkit.server.executors.protocol import (
    LOG_FILE,
    MACHINE_FILE,
    REMOTE_LOG_FILE,
    RESULTS,
)
from quantkit.server.runs.adopt import DELETED_FILE
from quantkit.server.runs.clock import FILE as CLOCK_FILE
from quantkit.server.runs.record import RECORD_FILE, load_record
from quantkit.server.runs.texts import FILE as OWN_TEXT

logger = logging.getLogger(__name__)

_KEPT = (
    *(RECORD_FILE, "config.json", "events.jsonl", LOG_FILE, REMOTE_LOG_FILE, MACHINE_FILE),
    OWN_TEXT,
    *RESULTS,
)
_UPLOAD = str(RELATIVE.upload)
_SECRET = ".secret"
_ALWAYS = (_SECRET, DELETED_FILE, CLOCK_FILE)
_SECONDS = 20.0
_MAX_BYTES = 20_000_000_000  # of one result file


def state_folder(environment: Mapping[str, str]) -> Path | None:
    """Return where to keep the state: QUANTKIT_DATA, on a Space a bucket mounted at /data; else
    None.
    """
    named = environment.get("QUANTKIT_DATA")
    if named:
        return Path(named)
    mounted = Path("/data")
    if environment.get("SYSTEM") == "spaces" and os.path.ismount(mounted):
        return mounted if os.access(mounted, os.W_OK) else None
    return None


class Mirror:
    """Keeps `state` like `root`, as far as it has to be kept."""

    def __init__(self, root: Path, state: Path) -> None:
        self.root = root
        self.state = state / "runs"
        self._stamps: dict[Path, tuple[int, int]] = {}
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def restore(self) -> int:
        """Bring back the runs that are not on this machine. Returns how many."""
        self.root.mkdir(parents=True, exist_ok=True)
        if not self.state.is_dir():
            return 0
        n = 0
        for name in _ALWAYS:
            if (self.state / name).is_file() and not (self.root / name).exists():
                copy_whole(self.state / name, self.root / name)
                (self.root / name).chmod(0o600)
        for folder in sorted(self.state.iterdir()):
            target = self.root / folder.name
            if (
                folder.name.startswith(".")
                or target.exists()
                or not (folder / RECORD_FILE).is_file()
            ):
                continue
            arriving = self.root / f".arriving-{folder.name}"
            shutil.rmtree(arriving, ignore_errors=True)
            try:
                shutil.copytree(folder, arriving)
                os.replace(arriving, target)
            except (OSError, shutil.Error) as error:
                logger.warning("run %s could not be brought back: %s", folder.name, error)
                continue
            n += 1
        return n

    def keep(self) -> None:
        """Copy what has changed since the last call; drop what was deleted here."""
        self.state.mkdir(parents=True, exist_ok=True)
        for name in _ALWAYS:
            self._keep_file(self.root / name, self.state / name)
        here = set()
        for folder in sorted(self.root.iterdir()):
            if folder.name.startswith(".") or not (folder / RECORD_FILE).is_file():
                continue
            here.add(folder.name)
            try:
                self._keep_run(folder)
            except (OSError, Damaged) as error:  # the state keeps what it had of this one
                logger.warning("run %s could not be kept: %s", folder.name, error)
        for folder in self.state.iterdir():
            if folder.name not in here and not folder.name.startswith("."):
                shutil.rmtree(folder, ignore_errors=True)

    def _keep_run(self, folder: Path) -> None:
        record = load_record(folder)
        if record is None or record.owner is None:
            return
        target = self.state / folder.name
        results = sorted((folder / _UPLOAD).glob("*"))
        names = [*_KEPT[1:], *(str(path.relative_to(folder)) for path in results), RECORD_FILE]
        for name in names:  # the record last: without it the rest is not brought back
            self._keep_file(folder / name, target / name)

    def _keep_file(self, source: Path, target: Path) -> None:
        try:
            stat = source.stat()
        except OSError:
            return
        if not S_ISREG(stat.st_mode):
            return
        stamp = (stat.st_mtime_ns, stat.st_size)
        if self._stamps.get(source) == stamp or stat.st_size > _MAX_BYTES:
            return
        if source.name.endswith(PARTIAL):
            return
        copy_whole(source, target)
        self._stamps[source] = stamp

    def start(self) -> None:
        """Keep again and again, in a thread."""
        self._thread = threading.Thread(target=self._loop, name="mirror", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Keep a last time."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(30)

    def _loop(self) -> None:
        while True:
            is_last = self._closing.wait(_SECONDS)
            try:
                self.keep()
            except OSError as error:
                logger.warning("the state could not be kept: %s", error)
            if is_last:
                return
