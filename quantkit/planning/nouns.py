"""The data classes of a plan, shared by the planner and everything that shows a plan.

`quantkit.tensors.to_json` makes JSON of it, `quantkit.sandbox.untrusted.build` a `Plan` of that.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

from quantkit.config.budgets import Budget
from quantkit.ggml.types import QuantType
from quantkit.llamacpp.contexts import ContextMemory
from quantkit.planning.coverage import Coverage
from quantkit.planning.disk import Footprint
from quantkit.search.unspent import Unspent
from quantkit.tensors import Fallback


@dataclass(frozen=True)
class PlannedModel:
    """The model that a plan is of."""

    id: str
    sha: str
    architecture: str
    n_parameters: int
    license: str | None
    gated: bool
    download_bytes: int


@dataclass(frozen=True)
class Sizes:
    """Bytes of whole files: the budgets that are met, those that cannot be, and what the levels can
    make; `largest_made_bytes` without tensors that stay as they are. Without budgets every type is
    given.
    """

    budgets: tuple[Budget, ...]
    refused: tuple[Budget, ...]
    smallest_bytes: int
    largest_bytes: int
    largest_made_bytes: int
    levels: dict[str, int]  # uniform file of each asked level

    @property
    def uniform(self) -> dict[QuantType, int]:
        """Return `levels` by type."""
        return {QuantType(name): n_bytes for name, n_bytes in self.levels.items()}

    @property
    def limits(self) -> tuple[int, ...]:
        """Return the most bytes of every file that is made."""
        return tuple(b.limit_bytes for b in self.budgets) or (self.largest_bytes,)


@dataclass(frozen=True)
class Seconds:
    """Time on a kind of machine. `fixed` goes by to start, on disks and where one core works; a
    device that is faster shortens `work`.
    """

    fixed: float
    work: float

    def on(self, speed: float) -> float:
        """Return the seconds on a device of `speed` times that of the one that they are for."""
        return self.fixed + self.work / speed

    def times(self, n: int) -> Seconds:
        """Return `n` times this."""
        return Seconds(n * self.fixed, n * self.work)

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.fixed + other.fixed, self.work + other.work)


@dataclass(frozen=True)
class PerFile:
    """What each further size adds to a run."""

    cpu: Seconds
    gpu: Seconds
    seconds: int


@dataclass(frozen=True, kw_only=True)
class Times:
    """The time that a run is expected to take for `n_files` sizes."""

    cpu: Seconds  # of two cores
    gpu: Seconds  # of one H200
    seconds: int  # on the device that was asked for
    n_files: int
    per_file: PerFile

    def for_files(self, n_files: int) -> Self:
        """Return the same for another number of files, which are searched one by one."""
        more, each = n_files - self.n_files, self.per_file
        return replace(
            self,
            cpu=self.cpu + each.cpu.times(more),
            gpu=self.gpu + each.gpu.times(more),
            seconds=self.seconds + more * each.seconds,
            n_files=n_files,
        )


@dataclass(frozen=True, kw_only=True)
class Estimates(Times):
    """Disk, memory and time that a run is expected to take for `n_files` sizes."""

    disk_bytes: int  # the most that the run's folder holds, and what is downloaded
    disk: dict[str, int]  # stage -> the most bytes that the folder holds
    memory_bytes: int  # what the run needs anywhere
    memory: dict[str, int]  # stage -> peak bytes here, where the model is taken whole if it fits
    machine: str  # that `stage_seconds` and `seconds` are of, in words
    stage_seconds: dict[str, int]  # for one file, on the device that was asked for

    @property
    def by_stage(self) -> dict[str, float]:
        """Return the seconds of every stage, of all files: `seconds` in all."""
        more = (self.n_files - 1) * self.per_file.seconds
        halves = {"search": 2, "tune": 2, "stitch": 2, "validate": 1}  # of a stage
        shares = {name: n * self.stage_seconds.get(name, 0) for name, n in halves.items()}
        whole = sum(shares.values()) or 1
        return {
            name: seconds + more * shares.get(name, 0) / whole
            for name, seconds in self.stage_seconds.items()
        }


@dataclass(frozen=True)
class Alike:
    """Tensors of one shape that can have the same types."""

    tensor: str  # the first of them
    n_tensors: int
    n_weights: int  # of each
    types: dict[str, str]  # level -> type
    kept: str | None  # the type in which they may stay
    n_bytes: dict[str, int]  # type -> bytes in the file


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    schema: int = field(default=1, init=False)
    model: PlannedModel
    sizes: Sizes
    stock: dict[str, int]  # llama.cpp's mix -> bytes of its file of this model
    context: ContextMemory
    levels: tuple[str, ...]  # those that are made
    left_out: tuple[str, ...]  # those that no file of these sizes can want
    footprint: Footprint
    coverage: Coverage
    fallbacks: tuple[Fallback, ...]
    sandbox: str  # what kept the code that reads the model from the rest
    warnings: tuple[str, ...]
    estimates: Estimates
    profiles: dict[str, Times]  # of the same sizes with every profile
    alike: tuple[Alike, ...]  # the tensors that types are chosen for
    unspent: tuple[Unspent, ...]  # budgets of which much is expected to stay unused
