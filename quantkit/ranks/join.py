"""Join the other processes of a run, and serve rank 0."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

from evaluators import sandbox
from quantkit.errors import QuantkitError
from quantkit.ranks.copies import Copies
from quantkit.ranks.group import ALONE, Connections, Ranks
from quantkit.ranks.watch import Watch
from quantkit.ranks.wire import Wire

# Rank 0 converts, stitches and validates alone, for hours, while the others wait in a collective
# for their next task. Who has died is noticed by its connections, not by time.
_NO_TIMEOUT = timedelta(days=365)

Task = Callable[[Ranks, Any], None]


def is_launched() -> bool:
    """Return whether this process is one of several that torchrun, or what acts like it, has
    started.
    """
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Yield this process's place among those that were launched together, or ALONE. `device` is
    "cpu" or "cuda": then every process has a GPU of its own. At the end rank 0 ends the others.

    Raises QuantkitError when there is no GPU for this process.
    """
    if not is_launched():
        yield ALONE
        return
    connections, own = _connect(device)
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), own, connections)
    try:
        yield ranks
    finally:
        if ranks.rank == 0:
            connections.watch.end()
        connections.copies.clear()


def serve(
    ranks: Ranks, tasks: Mapping[str, Task], explain: Callable[[Exception], QuantkitError]
) -> None:
    """Do rank 0's tasks by their names. It does not return: rank 0 ends this process, or a task has
    failed, which rank 0 is told as `explain` puts it.
    """

    def clean(task: Task, payload: Any) -> None:
        task(ranks, payload)
        gc.collect()  # a model refers to itself in many places
        if ranks.device != "cpu":
            import torch

            torch.cuda.empty_cache()

    try:
        ranks.follow({name: partial(clean, task) for name, task in tasks.items()})
    except Exception as error:
        ranks.fail(error if isinstance(error, QuantkitError) else explain(error))


def _connect(device: str) -> tuple[Connections, str]:
    """Join the process groups: one for tensors on the device and on the CPU, and two of gloo, for
    values and for last words.
    """
    import torch
    from torch import distributed

    sandbox.die_with_parent(os.getppid())  # torchrun may be killed
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    own = "cpu"
    if device == "cuda":
        # The only one that it sees: a thread's own device would be the first of all.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = [str(local_rank)] if visible is None else visible.split(",")[local_rank:]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[0] if names else ""
        if torch.cuda.device_count() != 1:
            raise QuantkitError(
                f"There is no GPU for process {local_rank + 1} of this machine.",
                "Give torchrun --nproc-per-node the number of its GPUs.",
            )
        own = device
        # Else a thread of NCCL's ends this process before it has said why.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # One machine: nobody else can connect, and its name need not have an address.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "gloo" if own == "cpu" else "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=_NO_TIMEOUT)
    groups = [distributed.new_group(backend="gloo", timeout=_NO_TIMEOUT) for _ in range(2)]
    values, words = map(Wire, groups)
    if rank:
        _mute()
    copies = Copies(values, int(os.environ.get("GROUP_RANK", "0")))
    watch = Watch(words, rank, distributed.get_world_size(), copies.clear)
    return Connections(values, watch, copies), own


def _mute() -> None:
    """Only rank 0 says something."""
    sys.stdout.flush()
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
