"""Show a run on a terminal: a line for what is done, and below it the stage at work with a bar."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from quantkit.errors import printable
from quantkit.run.artifacts import NAMES
from quantkit.run.events import Event

_ROOM = Column(no_wrap=True, overflow="ellipsis", ratio=1)  # what the others leave
_STYLES = {"failed": "bold red", "note": "dim", "finished": "green", "skipped": "dim"}


class Live:
    """Called with every event, within `with`: the bar goes when the context ends."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr, highlight=False)
        self._progress = Progress(
            TextColumn("{task.fields[place]}", markup=False),
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(20),
            TaskProgressColumn(),
            TextColumn("{task.fields[message]}", markup=False, table_column=_ROOM),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
            expand=True,
        )
        self._stage: str | None = None
        self._task = self._progress.add_task("", total=None, visible=False, place="", message="")

    def __enter__(self) -> Live:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if event.stage in NAMES and event.stage != self._stage:
            self._begin(event.stage)
        message = printable(event.message, "")
        if event.kind == "progress":
            done, total = event.data["done"], max(event.data["total"], 1)
            self._progress.update(self._task, completed=done, total=total, message=message)
            return
        if event.kind != "started":
            word = "" if event.kind == "note" else f"{event.kind}  "
            line = f"{event.stage or '':<10} {word}{message}".rstrip()
            self._console.print(Text(line, style=_STYLES.get(event.kind, "")), soft_wrap=True)
        elif event.stage is None and message:
            self._console.print(Text(message, style="bold"), soft_wrap=True)
        if event.kind in ("finished", "skipped", "failed"):
            self._progress.update(self._task, visible=False)
            self._stage = None

    def _begin(self, stage: str) -> None:
        """A bar that moves without an end, until there is progress to show."""
        self._stage = stage
        place = f"{NAMES.index(stage) + 1}/{len(NAMES)}"
        self._progress.reset(
            self._task, total=None, description=stage, visible=True, place=place, message=""
        )
