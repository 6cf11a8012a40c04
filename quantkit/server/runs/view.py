"""What a page or an API caller sees of a run: frozen, without paths of this machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from quantkit.gguf_file.parts import stem_of
from quantkit.server.executors.protocol import RemoteState
from quantkit.server.runs.overall import Overall
from quantkit.server.runs.progress import KlPoint, LogLine, StageView

QUEUED, RUNNING, FINISHED = "queued", "running", "finished"
FAILED, INTERRUPTED, CANCELLED = "failed", "interrupted", "cancelled"
DAMAGED = "damaged"  # its own files cannot be read: it can only be deleted


@dataclass(frozen=True)
class RunSummary:
    """One line of the run list."""

    id: str
    model: str
    target: str
    profile: str
    state: str
    created: float
    is_local: bool = False  # started from this machine's command line
    position: int | None = None  # in the queue, 1 is next
    current: str | None = None  # the stage at work, or the one that failed
    percent: int | None = None  # of that stage
    overall: Overall | None = None  # of the whole run, while it is at work
    is_published: bool = False


def is_model(name: str) -> bool:
    """Return whether a result file is a finished model: no imatrix, no projector of images."""
    is_part = name.endswith("imatrix.gguf") or name.startswith("mmproj-")
    return name.endswith(".gguf") and not is_part


@dataclass(frozen=True)
class ResultFile:
    """A file that a visitor may download."""

    name: str
    n_bytes: int
    sha256: str
    is_here: bool = True  # on this machine's disk

    @property
    def is_model(self) -> bool:
        """Return whether it is a finished model, not what it was made with."""
        return is_model(self.name)


def models(files: Iterable[ResultFile]) -> tuple[ResultFile, ...]:
    """Return the finished models among files that are in order. One in parts is its first part,
    which opens the others, with the bytes of all; it is here where all are.
    """
    found: dict[str, list[ResultFile]] = {}
    for file in files:
        if file.is_model:
            found.setdefault(stem_of(file.name) or file.name, []).append(file)
    return tuple(
        replace(
            parts[0],
            n_bytes=sum(part.n_bytes for part in parts),
            is_here=all(part.is_here for part in parts),
        )
        for parts in found.values()
    )


@dataclass(frozen=True, kw_only=True)
class RunView(RunSummary):
    """Everything about one run."""

    stages: tuple[StageView, ...]
    revision: str | None = None
    seed: int = 0
    message: str = ""
    eta_seconds: float | None = None  # of the current stage
    wait_seconds: float | None = None  # until a queued run starts
    executor: str = "local"
    is_remote: bool = False  # whether the work is done elsewhere
    machine: str | None = None  # of an executor that has several
    usd_per_hour: float | None = None
    hours: int | None = None
    remote: RemoteState | None = None  # its address there, stage, load and cost
    stopping: bool = False  # a cancelled run whose process has not ended yet
    error: str = ""
    remedy: str = ""
    token_step: str | None = None  # where only a token helps: what to do before it is given
    curve: tuple[KlPoint, ...] = ()
    log: tuple[LogLine, ...] = ()
    report: dict[str, Any] | None = None
    allocation: dict[str, str] | None = None  # the type of every tensor of the best mix so far
    files: tuple[ResultFile, ...] = ()
    card: str = ""  # the model card, Markdown
    had_token: bool = False  # one was given at the start
    shared: str | None = None  # what stands in its link, where it is open to everybody
    publish_to: str | None = None
    published_url: str | None = None
    repo_is_private: bool | None = None  # when it was published; None: not known
    has_base: bool = False  # the original lies here
    n_dropped: int = 0  # lines of the events file that are no events

    @property
    def is_active(self) -> bool:
        return self.state in (QUEUED, RUNNING)

    @property
    def wants_token(self) -> bool:
        """Return whether a token that is given to go on may be of use."""
        lost = self.state in (INTERRUPTED, CANCELLED) and (self.had_token or self.is_remote)
        return self.token_step is not None or lost or bool(self.publish_to)

    @property
    def models(self) -> tuple[ResultFile, ...]:
        """Return the finished models, each once."""
        return models(self.files)

    @property
    def tried(self) -> tuple[str, ...]:
        """Return the names of the finished files that lie here and can be talked to."""
        here = (file.name for file in self.models if file.is_here)
        return () if self.state == RUNNING else tuple(here)

    @property
    def can_try(self) -> bool:
        return bool(self.tried)

    @property
    def can_resume(self) -> bool:
        return self.state in (FAILED, INTERRUPTED, CANCELLED)

    @property
    def is_unattended(self) -> bool:
        """Return whether it may be at work elsewhere, and paid for, with nobody here that
        listens.
        """
        has_ended = self.remote is not None and self.remote.has_ended
        return self.is_remote and self.state in (FAILED, INTERRUPTED) and not has_ended

    @property
    def can_cancel(self) -> bool:
        if self.is_local or self.stopping:
            return False
        return self.is_active or self.is_unattended

    @property
    def can_delete(self) -> bool:
        if self.state == DAMAGED:
            return True
        return not self.is_active and not self.is_local and not self.is_unattended

    @property
    def can_share(self) -> bool:
        """Return whether there is a result that could be opened up."""
        return bool(self.report) and not self.is_active and not self.is_local

    @property
    def can_publish(self) -> bool:
        return bool(self.report) and not self.is_active
