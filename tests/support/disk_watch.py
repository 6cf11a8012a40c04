"""Watch how much of a disk a folder takes, by the stage of the run that is at work in it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quantkit.run.events import read_events
from quantkit.run.folder import RunDir


def on_disk(folder: Path) -> int:
    """Bytes of the blocks of all files below a folder; a file with two names counts once."""
    found: dict[tuple[int, int], int] = {}
    left = [folder]
    while left:
        with suppress(FileNotFoundError), os.scandir(left.pop()) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.is_dir(follow_symlinks=False):
                        left.append(Path(entry.path))
                        continue
                    stat = entry.stat(follow_symlinks=False)
                    found[stat.st_dev, stat.st_ino] = 512 * stat.st_blocks
    return sum(found.values())


@contextmanager
def watched(folder: Path, every: float = 0.005) -> Iterator[dict[str, int]]:
    """Yield the peaks by stage of a run in `folder`, which are complete on leaving."""
    peaks: dict[str, int] = {}
    done = threading.Event()
    look = _looking(folder, peaks)

    def watch() -> None:
        while not done.wait(every):
            look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def _looking(folder: Path, peaks: dict[str, int]) -> Callable[[], None]:
    path, at, stage = RunDir(folder).events_path, 0, ""

    def look() -> None:
        nonlocal at, stage
        if path.exists():
            events, at = read_events(path, at)
            stage = next((e.stage for e in reversed(events) if e.stage), stage)
        if stage:
            peaks[stage] = max(peaks.get(stage, 0), on_disk(folder))

    return look
