"""This machine: a run is `quantkit resume` in a process of its own."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from quantkit.machine.kind import memory_here
from quantkit.planning.nouns import Plan
from quantkit.server.executors.protocol import ON_PLAN, SHARE, Executor, Order
from quantkit.sizes import size

COMMAND: tuple[str, ...] = (sys.executable, "-m", "quantkit", "resume")


class Local(Executor):
    """Runs here, one after the other."""

    name, noun, title = "local", "run", "On this machine"
    is_remote = False

    def command(self, order: Order) -> tuple[str, ...]:
        return COMMAND

    def why_not(self, plan: Plan, root: Path, most_seconds: int | None) -> str:
        """Return a sentence when memory, disk under `root` or `most_seconds` are too little."""
        needs = plan.estimates
        memory = memory_here(os.environ)
        if memory and needs.memory_bytes > SHARE * memory:
            return (
                f"It needs about {size(needs.memory_bytes)} of memory and this machine"
                f" has {size(memory)}."
            )
        place = root.absolute()
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if needs.disk_bytes > SHARE * free:
            return (
                f"It needs about {size(needs.disk_bytes)} of disk and this machine has"
                f" {size(free)} free."
            )
        if most_seconds is not None and ON_PLAN * needs.seconds > most_seconds:
            return (
                f"It would take about {needs.seconds / 3600:.1f} hours here, and a run is stopped"
                f" after {most_seconds / 3600:.0f}; it may need half as long again."
            )
        return ""
