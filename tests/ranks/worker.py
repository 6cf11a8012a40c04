"""What the tests of `test_group.py` run as several processes: `worker.py SCENARIO FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantkit.errors import QuantkitError
from quantkit.files import write_json
from quantkit.ranks.group import Ranks
from quantkit.ranks.join import joined, serve


def together(ranks: Ranks, folder: str) -> None:
    """Every collective, each rank with values of its own; what came out goes into a file."""
    n = float(ranks.rank + 1)
    big = torch.full((5000, 4000), n)  # more than a bucket
    small = [torch.full((2, 3), n).T, torch.tensor([n, 2 * n]), torch.tensor(n)]
    counts = torch.tensor([ranks.rank, 1])
    ranks.sum([small[0], big, *small[1:], counts])
    sent = {"a": np.full((ranks.rank, 2), n, np.float32), "b": np.arange(3, dtype=np.int64)}
    gathered = ranks.gather_arrays(sent)
    # Every process has another folder of its own here, as on machines of their own.
    names = ["one/x", "two/x", "one/x"]
    files = ranks.local([Path("/proc/self/cwd", name) for name in names])
    again = ranks.local([Path("/proc/self/cwd", names[1]), Path(folder, "shared")])
    own = {
        "share": ranks.share(range(7)),
        "sums": [t.tolist() for t in (*small, counts)],
        "big": [float(big.min()), float(big.max())],
        "broadcast": ranks.broadcast(torch.full((2,), n)).tolist(),
        "told": ranks.tell({"é": [ranks.rank, None]}),
        "gathered": ranks.gather(ranks.rank),
        "arrays": [{k: [str(v.dtype), v.tolist()] for k, v in g.items()} for g in gathered],
        "least": ranks.least(10 - ranks.rank),
        "files": [path.read_text("utf-8") for path in files],
        "paths": [str(path) for path in [*files, *again]],
        "scratch": str(ranks.scratch()),
    }
    write_json(Path(folder, f"{ranks.rank}.json"), own)


def several(ranks: Ranks, folder: str) -> None:
    """Two tasks of one session, which know what it began with."""
    own: list[float] = []

    def add(payload: float) -> None:
        tensor = torch.tensor(payload + ranks.rank)
        ranks.sum([tensor])
        own.append(float(tensor))

    if ranks.rank:
        ranks.follow({"add": add})
    else:
        for payload in (1.0, 2.0):
            with ranks.task("add", payload):
                add(payload)
    write_json(Path(folder, f"{ranks.rank}.json"), own)


def fails(ranks: Ranks, payload: str) -> None:
    if ranks.rank == 1:
        raise QuantkitError("The weights are sour.", "Take others.")
    ranks.sum([torch.zeros(3)])


def dies(ranks: Ranks, payload: str) -> None:
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.sum([torch.zeros(3)])


def dies_unseen(ranks: Ranks, payload: str) -> None:
    """Rank 0's main thread waits where nothing tells it of the death, as in a GPU's library."""
    if ranks.rank == 1:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)


TASKS = {f.__name__: f for f in (together, several, fails, dies, dies_unseen)}


def main(scenario: str, folder: str) -> int:
    place = Path(folder, f"machine{os.environ['RANK']}")
    os.chdir(place)
    if os.environ["RANK"] == "2":  # on the machine of rank 1, but with another folder
        os.environ["GROUP_RANK"] = "1"
    else:
        os.environ["GROUP_RANK"] = os.environ["RANK"]
    with joined("cpu") as ranks:
        if ranks.rank:
            serve(ranks, TASKS, lambda error: QuantkitError(f"bug: {error}"))

        def told(error: QuantkitError) -> None:
            found: dict[str, Any] = {"message": error.message, "remedy": error.remedy}
            write_json(Path(folder, "told.json"), found)

        try:
            enter = ranks.session if scenario == "several" else ranks.task
            with ranks.ending(told), enter(scenario, folder):
                TASKS[scenario](ranks, folder)
        except QuantkitError as error:
            found = {"message": error.message, "remedy": error.remedy}
            write_json(Path(folder, "raised.json"), found)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
