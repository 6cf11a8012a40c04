"""The interface between the server and the places where runs execute.

Whatever an executor starts looks like a worker: a process of this machine that is given a run's
folder, holds its lock, appends to its events, brings its small results and ends when the run has
ended. So there is one way to start a run (`command`), to know its state (the process, and what the
events say), to follow it (the events) and to cancel it (a signal), wherever the work is done.
"""

from __future__ import annotations

import signal
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quantkit.errors import QuantkitError
from quantkit.hub.jobs import ENDED, MachineLoad
from quantkit.planning.nouns import Plan
from quantkit.run.artifacts import RELATIVE

LOG_FILE = "log.txt"  # what a worker printed
REMOTE_LOG_FILE = "job.txt"  # what the run printed elsewhere, brought by its worker
MACHINE_FILE = "machine.json"  # a RemoteState
# What a page shows of a run beside its events: a worker brings these from elsewhere, nothing more.
RESULTS = (
    "manifest.json",
    str(RELATIVE.best),
    str(RELATIVE.report),
    str(RELATIVE.upload / "README.md"),
)
SHARE = 0.9  # of a machine's memory and disk that a run may take
ON_PLAN = 1.5  # times as long as estimated is still on plan: no limit may end such a run
_PATIENCE_SECONDS = 8 * 3600


@dataclass(frozen=True)
class Order:
    """How to execute a run: by which executor, on which of its machines, for how long."""

    executor: str = "local"
    machine: str | None = None  # None: the executor has only one
    hours: int | None = None  # the run is ended after that
    usd_per_hour: float | None = None
    estimate_seconds: float | None = None  # how long it is expected to take
    stage_seconds: dict[str, float] | None = None  # the same of each stage


@dataclass(frozen=True)
class Offer:
    """A machine that a run fits on, with the time and money that it takes there."""

    executor: str
    machine: str
    title: str  # as the page shows it
    device: str  # cpu or cuda
    seconds: float
    hours: int  # the run is ended after that
    usd_per_hour: float
    stage_seconds: dict[str, float] | None = None  # of the run there, without its start

    @property
    def usd(self) -> float:
        return self.usd_per_hour * self.seconds / 3600

    @property
    def most_usd(self) -> float:
        return self.usd_per_hour * self.hours

    @property
    def order(self) -> Order:
        return Order(
            self.executor,
            self.machine,
            self.hours,
            self.usd_per_hour,
            round(self.seconds),
            self.stage_seconds,
        )


@dataclass(frozen=True)
class RemoteState:
    """A run elsewhere, as its worker noted it last. These names are on disk (`machine.json`)."""

    job: str  # what it is called there
    url: str
    machine: str
    stage: str  # one of ENDED, or another word while it may be at work
    run_seconds: float
    usd: float | None  # None where the price is not known
    metrics: MachineLoad | None = None  # how busy the machine is

    @property
    def has_ended(self) -> bool:
        return self.stage in ENDED


@dataclass(frozen=True)
class FoundRun:
    """A run that an executor knows of; its owner made it say so."""

    run_id: str
    config: str  # a RunConfig as JSON
    machine: str
    created: float
    order: str = ""  # an Order as JSON, where it is known


class Executor(Protocol):
    """A place where runs execute. `registry` has one of each."""

    name: str  # as records and the form have it
    noun: str  # what people call a run there
    title: str  # the choice on the page
    is_remote: bool  # its runs take nothing of this machine but a small process that listens
    results_at: str = ""  # a sentence: where results are that do not lie here
    cancelled_by: signal.Signals = signal.SIGTERM  # what tells a worker to end its run

    @abstractmethod
    def command(self, order: Order) -> tuple[str, ...]:
        """Return the worker's program and arguments; the run's folder is added to them."""

    def lacks(self) -> tuple[str, str] | None:
        """Return what this server lacks to start runs there, and what its owner can do about it;
        None where it can.
        """
        return None

    def check(self, token: str | None) -> None:
        """Raise QuantkitError where nothing can be started there for this visitor."""
        return None

    def offers(self, plan: Plan, token: str | None) -> tuple[Offer, ...]:
        """Return every machine that the planned run fits on, the cheapest run first. Raise
        QuantkitError when that cannot be known.
        """
        return ()

    def why_not(self, plan: Plan, root: Path, most_seconds: int | None) -> str:
        """Return a sentence when the run is too large to be done there at all, else nothing."""
        return ""

    def end(self, run_id: str, token: str | None) -> None:
        """End what is at work for a run whose worker is gone. Raise QuantkitError where that is not
        possible: nobody is told that a run has ended which may go on.
        """
        raise QuantkitError(f"A {self.noun} cannot be stopped from here.", "Stop it where it runs.")

    def found(self, token: str) -> tuple[FoundRun, ...]:
        """Return the runs of this server that it still knows of. Raise QuantkitError."""
        return ()


def choose(offers: Sequence[Offer], name: str = "auto") -> Offer:
    """Return the named machine's offer; for "auto" the cheapest that is not longer than a working
    day, else the quickest. Raise QuantkitError when there is none.
    """
    if not offers:
        raise QuantkitError(
            "None of the offered machines is large enough for this run.",
            "Choose a smaller model or a quicker profile.",
        )
    if name != "auto":
        named = next((offer for offer in offers if offer.machine == name), None)
        if named is None:
            raise QuantkitError(
                f"The run does not fit on {name[:40]!r}.",
                "Use one of " + ", ".join(offer.machine for offer in offers) + ".",
            )
        return named
    quick = [offer for offer in offers if offer.seconds <= _PATIENCE_SECONDS]
    return quick[0] if quick else min(offers, key=lambda offer: offer.seconds)
