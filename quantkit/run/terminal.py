"""Print what the command line says while it works and when it ends, even if its streams are
closed.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from quantkit.errors import QuantkitError, UsageError, printable
from quantkit.machine import faults
from quantkit.run.events import Event


def failed(error: QuantkitError) -> int:
    """Say why a command ends. Returns its exit status."""
    with suppress(OSError):  # nobody listens: the exit status says it
        print(f"quantkit: {printable(str(error), '')}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1


def bug(error: Exception, folder: Path | None) -> QuantkitError:
    """Return what to say of an error that nobody foresaw. Its traceback goes into a file."""
    told = f"{type(error).__name__}: {error}".strip().rstrip(".")
    text = "".join(traceback.format_exception(error))
    with suppress(OSError):
        if folder is not None and folder.is_dir():
            path = folder / "traceback.txt"
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)
        else:
            descriptor, name = tempfile.mkstemp(".txt", "quantkit-traceback-")
            path = Path(name)
        with open(descriptor, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        return QuantkitError(told, f"This is a bug: please report it with {path}.")
    print(text, file=sys.stderr)
    return QuantkitError(told, "This is a bug: please report it with the output above.")


@contextmanager
def ending_with_threads(folder: Path | None) -> Iterator[None]:
    """End the process when a thread dies for want of memory: whoever waits for its work would wait
    for good.
    """
    before = threading.excepthook

    def died(about: threading.ExceptHookArgs) -> None:
        if not isinstance(about.exc_value, MemoryError):
            before(about)
            return
        try:
            failed(faults.explain(about.exc_value, folder) or QuantkitError("Too little memory."))
        finally:
            os._exit(1)  # what is done is on the disk, as after a kill

    threading.excepthook = died
    try:
        yield
    finally:
        threading.excepthook = before


def settle_streams() -> None:
    """Open standard streams that are closed: the next opened file would get their numbers, and with
    them whatever a library prints. Escape characters that a terminal lacks.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # It gets the lowest number that is free; children have it, too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def printing() -> Iterator[Callable[[Event], None]]:
    """Yield what shows events on stderr: with a bar on a terminal, else as lines."""
    if not sys.stderr.isatty():
        yield Printer()
        return
    from quantkit.run.live import Live  # needs rich

    with Live() as live:
        yield live


class Printer:
    """Prints events to stderr as they come, a line each; of progress every quarter of a stage."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._is_heard = True
        self._last_percent = -100

    def __call__(self, event: Event) -> None:
        seconds = int(time.monotonic() - self._started)
        head = f"{seconds // 60:3d}:{seconds % 60:02d}  {event.stage or '':<10}"
        if event.kind == "progress":
            percent = 100 * event.data["done"] // max(event.data["total"], 1)
            if percent < self._last_percent + 25 and percent < 100:
                return
            self._last_percent = percent
            self._write(f"{head} {percent:3d} %  {event.message}")
        else:
            self._last_percent = -100
            self._write(f"{head} {event.kind}  {event.message}".rstrip())

    def _write(self, text: str) -> None:
        if self._is_heard:
            try:
                print(printable(text, ""), file=sys.stderr, flush=True)
            except OSError:  # whoever read this has gone, or its disk is full: the work goes on
                self._is_heard = False


def readable(arguments: Sequence[str]) -> list[str]:
    """Return the words of a command. Raise UsageError for a name that is not UTF-8: it cannot stand
    in JSON, in a GGUF or on the Hub.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(argument).decode("utf-8", "backslashreplace")
            raise UsageError(
                f"The name {shown} is not UTF-8.", "Rename it, or give a link to it that is."
            ) from None
    return list(arguments)
