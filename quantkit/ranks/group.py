"""The processes of a run and what they can do together.

Rank 0 runs the pipeline: it alone writes to the run's folder. The others wait for tasks, in which
every rank does its share (`quantkit.ranks.join`). So no collective depends on a branch that one
rank takes alone. Shares are fixed: the same number of ranks on one kind of machine gives the same
bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from numpy.typing import NDArray

from quantkit.errors import QuantkitError
from quantkit.ranks.copies import Copies
from quantkit.ranks.watch import LastWord, Watch
from quantkit.ranks.wire import Wire

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_BUCKET_BYTES = 1 << 26  # small tensors are summed together: a call each would cost more


@dataclass(frozen=True)
class Connections:
    """What connects a process to the others."""

    wire: Wire
    watch: Watch
    copies: Copies


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. A process that is alone needs no torch.distributed:
    every method does nothing, or returns what it was given.

    Collectives have to be called by all ranks, in the same order. They raise QuantkitError where
    another process has ended: rank 0's says why.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"  # this process's own: it sees no other GPU, so "cuda" is the one
    _connections: Connections | None = field(default=None, repr=False)

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    def share(self, items: Sequence[T]) -> list[T]:
        """Return the items that are this rank's."""
        return list(items[self.rank :: self.size])

    @contextmanager
    def task(self, name: str, payload: object = None) -> Iterator[None]:
        """Have all others enter the task of this name with `payload`, which is JSON, while rank 0
        does its own share.
        """
        if self.is_alone:
            yield
            return
        self.tell({"task": name, "payload": payload})
        yield
        self.gather(None)  # what another has failed in since its last collective is raised here

    @contextmanager
    def session(self, name: str, payload: object = None) -> Iterator[None]:
        """Have all others enter the task of this name and `follow` in it, until the context ends:
        for several tasks with one model, say.
        """
        with self.task(name, payload):
            yield
            self.tell(None)

    def follow(self, tasks: Mapping[str, Callable[[Any], None]]) -> None:
        """Do rank 0's tasks by their names, with their payloads, until its session ends."""
        while (order := self.tell(None)) is not None:
            tasks[order["task"]](order["payload"])
            self.gather(None)

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Put the sum over all ranks into each tensor, in place. All ranks give tensors of the same
        shapes and types in the same order; any device.
        """
        if self.is_alone:
            return
        with self._connected():
            for bucket in _buckets(tensors):
                _sum(bucket)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Return rank 0's tensor; the others give one of its shape and type, which is filled."""
        if not self.is_alone:
            from torch import distributed

            with self._connected():
                distributed.broadcast(tensor, 0)
        return tensor

    def tell(self, value: Any) -> Any:
        """Return rank 0's value, which is JSON; what the others give is not looked at."""
        if self.is_alone:
            return value
        with self._connected() as connections:
            return connections.wire.broadcast_json(value)

    def gather(self, value: T) -> list[T]:
        """Return all ranks' values, which are JSON, to rank 0; an empty list to the others."""
        if self.is_alone:
            return [value]
        with self._connected() as connections:
            if self.rank:
                connections.wire.send_json(value, 0)
                return []
            others = [connections.wire.receive_json(r) for r in range(1, self.size)]
            return [value, *others]

    def gather_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> list[dict[str, NDArray[Any]]]:
        """Return all ranks' arrays to rank 0; an empty list to the others."""
        if self.is_alone:
            return [dict(arrays)]
        with self._connected() as connections:
            if self.rank:
                connections.wire.send_arrays(arrays, 0)
                return []
            others = [connections.wire.receive_arrays(r) for r in range(1, self.size)]
            return [dict(arrays), *others]

    def least(self, value: int) -> int:
        """Return the least of all ranks' values, to all."""
        found = self.gather(value)
        return int(self.tell(min(found, default=None)))

    def union(self, table: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries of all ranks' tables, which are JSON, to all: in the order of the
        lowest ranks that have them, and as those have them.
        """
        found: dict[str, Any] = {}
        for own in self.gather(dict(table)):
            found = {**found, **{key: own[key] for key in own if key not in found}}
        return dict(self.tell(found))

    def local(self, paths: Sequence[Path]) -> list[Path]:
        """Return files of rank 0 as this rank can open them; only rank 0's `paths` are looked at.

        A rank on a machine that has the very files opens them where they are. To other machines
        they are sent once, into a folder that is deleted at the end of the run.
        """
        if self.is_alone:
            return list(paths)
        with self._connected() as connections:
            return connections.copies.local(paths, self)

    def scratch(self) -> Path | None:
        """Return a folder for temporary files of this rank, which is deleted at the end of the run;
        None for rank 0, which has the run's.
        """
        return self._connections.copies.folder() if self._connections and self.rank else None

    def fail(self, error: QuantkitError) -> None:
        """Tell rank 0 why this process fails, and end it: what rank 0 waits for fails, too."""
        if self._connections is not None:
            self._connections.watch.say(LastWord(error.message, error.remedy))
            self._connections.watch.leave(1)

    def ending(self, told: Callable[[QuantkitError], None]) -> AbstractContextManager[None]:
        """For a while, have `told` called with the reason where this process must be ended because
        another has, and cannot raise it itself.
        """
        if self._connections is None:
            return nullcontext()
        return self._connections.watch.ending(told)

    @contextmanager
    def _connected(self) -> Iterator[Connections]:
        """Turn errors of connections into the reason why they broke."""
        assert self._connections is not None
        try:
            yield self._connections
        except RuntimeError as error:  # that of gloo and NCCL
            raise self._connections.watch.reason() from error


ALONE = Ranks()


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors that are summed by one call: of one type and device, in their order."""
    waiting: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        if not tensor.numel():
            continue
        key = tensor.device.type, tensor.dtype
        waiting.setdefault(key, []).append(tensor)
        if sum(t.nbytes for t in waiting[key]) >= _BUCKET_BYTES:
            yield waiting.pop(key)
    yield from waiting.values()


def _sum(bucket: Sequence[Tensor]) -> None:
    import torch
    from torch import distributed

    if len(bucket) == 1 and bucket[0].is_contiguous():
        distributed.all_reduce(bucket[0])
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    distributed.all_reduce(flat)
    for tensor, summed in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.copy_(summed.view(tensor.shape))
