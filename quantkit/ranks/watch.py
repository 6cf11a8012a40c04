"""Notice that another process of the run has ended, whatever this one is doing.

A process that ends closes its connections, however it ends: a thread of rank 0 for each of the
others waits for their last word or for that. Timeouts could not tell a process that has died from
one that works alone for an hour. Where the main thread waits in a collective of gloo, that fails,
too, and it raises the reason. A GPU's collectives wait for good: then the thread ends the process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from quantkit.errors import QuantkitError, printable
from quantkit.ranks.wire import Wire

_AGAIN = "Run the same command again, with any number of processes: finished work is kept."
_RAISING_SECONDS = 3.0  # in which the main thread may raise the reason itself
_SIGNAL_SECONDS = 5.0  # between a signal to one process of a run and that to another
_ENDING_SECONDS = 60.0  # for rank 0 to end the others

Ending = Callable[[QuantkitError], None]


@dataclass(frozen=True)
class LastWord:
    """What a process says before it ends: why it failed, or the signal that it was sent."""

    message: str = ""
    remedy: str = ""
    signal: int = 0


class Watch:
    """The threads of one process that listen, and what they heard."""

    def __init__(self, wire: Wire, rank: int, size: int, clear: Callable[[], None]) -> None:
        """`clear` deletes what this process leaves on its machine."""
        self._wire, self._rank, self._size, self._clear = wire, rank, size, clear
        self._lock = threading.Lock()
        self._is_over = False
        self._reason: QuantkitError | None = None
        self._known, self._raised = threading.Event(), threading.Event()
        self._ending: Ending = _print
        peers = range(1, size) if rank == 0 else [0]
        listen = self._listen if rank == 0 else self._follow
        self._threads = [threading.Thread(target=listen, args=(p,), daemon=True) for p in peers]
        for thread in self._threads:
            thread.start()
        self._hear_signals()

    def reason(self) -> QuantkitError:
        """Return why a collective failed, to be raised by the main thread of rank 0; the others'
        wait to be ended.
        """
        if self._rank:
            time.sleep(_ENDING_SECONDS)
        elif self._known.wait(_ENDING_SECONDS) and self._reason is not None:
            self._raised.set()
            return self._reason
        return QuantkitError("The connection to the other processes of the run was lost.", _AGAIN)

    @contextmanager
    def ending(self, told: Ending) -> Iterator[None]:
        """For a while, have `told` called with the reason before the process is ended."""
        before, self._ending = self._ending, told
        try:
            yield
        finally:
            self._ending = before

    def say(self, word: LastWord) -> None:
        """Tell rank 0 why this process is going to end."""
        with suppress(RuntimeError), self._lock:
            self._wire.send_json(vars(word), 0)

    def end(self) -> None:
        """End all other processes, from rank 0."""
        self._is_over = True
        for peer in range(1, self._size):
            with suppress(RuntimeError):
                self._wire.send(b"end", peer)
        for thread in self._threads:
            thread.join(_ENDING_SECONDS)

    def _listen(self, peer: int) -> None:
        """Wait for another process to end."""
        try:
            word = LastWord(**json.loads(self._wire.receive(peer)))
        except RuntimeError:
            word = None
        if self._is_over:
            return
        if word is not None and word.signal:
            time.sleep(_SIGNAL_SECONDS)  # this one is about to get it as well
        with self._lock:
            if self._reason is not None:
                return
            self._reason = self._told(peer, word)
            self._known.set()
        if not self._raised.wait(_RAISING_SECONDS) and not self._is_over:
            self._ending(self._reason)
            self.leave(1)

    def _told(self, peer: int, word: LastWord | None) -> QuantkitError:
        who = f"process {peer + 1} of {self._size}"
        if word is None:
            return QuantkitError(
                f"The run's {who} (rank {peer}) was killed or died without a word.",
                f"Its machine may lack memory. {_AGAIN}",
            )
        if word.signal:
            name = signal.Signals(word.signal).name
            return QuantkitError(f"The run's {who} (rank {peer}) was ended by {name}.", _AGAIN)
        return QuantkitError(f"{word.message} (This is the run's {who}.)", word.remedy)

    def _follow(self, rank: int) -> None:
        """Wait for rank 0 to end, or to say that this process shall."""
        try:
            self._wire.receive(rank)
        except RuntimeError:
            self.leave(1)
        self.leave(0)

    def leave(self, status: int) -> None:
        """End this process."""
        self._clear()
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(status)  # the main thread may wait in a library for good

    def _hear_signals(self) -> None:
        """Have a thread act on SIGTERM. torchrun sends it to all processes when one has ended, and
        while the main thread waits in a library no handler of Python's would run.
        """
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        threading.Thread(target=self._on_signals, args=(reading,), daemon=True).start()

    def _on_signals(self, reading: int) -> None:
        while signal.SIGTERM not in os.read(reading, 64):
            pass
        if self._rank:
            self.say(LastWord(signal=signal.SIGTERM))
        elif self._known.wait(1.0):  # it is not this one that is to be ended
            return
        self.leave(128 + signal.SIGTERM)


def _print(error: QuantkitError) -> None:
    with suppress(OSError):
        sys.stderr.write(f"quantkit: {printable(str(error), '')}\n")
