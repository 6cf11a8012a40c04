"""Where a run fits, how long it takes there and what that costs: this machine, or a Job's.

A run's work is counted in multiply-adds by the planner. What a machine does of them in a second is
measured for two cores of a server CPU and for one H200; other GPUs are scaled by what their makers
state for dense bf16. So the times are good to a factor of two or so, and are shown as "about".
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.hub.jobs import Machine

_CPU_SPEED = 6e10  # multiply-adds a second of one virtual core
_GPU_SPEEDS = {
    **{"T4": 1.3e13, "L4": 2.4e13, "A10G": 1.4e13, "A10": 2.5e13, "L40S": 7e13, "A100": 6e13},
    **{"RTX PRO 6000": 1e14, "H200": 2e14, "H100": 2e14},
}
_STARTING_SECONDS = 420  # image, packages, converter, and getting a machine at all
_PATIENCE_SECONDS = 8 * 3600
_SHARE = 0.9  # of memory and disk that a run may take
_SHORTEST_HOURS, _LONGEST_HOURS = 1, 24


@dataclass(frozen=True)
class Choice:
    """A machine with the time and money that a run takes on it."""

    machine: Machine
    seconds: float
    hours_limit: int  # the Job is ended after that

    @property
    def usd(self) -> float:
        return self.machine.usd_per_hour * self.seconds / 3600

    @property
    def most_usd(self) -> float:
        return self.machine.usd_per_hour * self.hours_limit

    @property
    def device(self) -> str:
        return "cuda" if self.machine.gpu else "cpu"


def choices(plan: dict[str, Any], machines: tuple[Machine, ...]) -> tuple[Choice, ...]:
    """Every machine that the run fits on, cheapest run first."""
    needs = plan["estimates"]
    found = []
    for machine in machines:
        if machine.gpu and not machine.gpu.startswith("1x"):
            continue  # a run uses one GPU
        memory = machine.gpu_bytes if machine.gpu else machine.memory_bytes
        if needs["memory_bytes"] > _SHARE * min(memory, machine.memory_bytes or memory):
            continue
        if machine.disk_bytes and needs["disk_bytes"] > _SHARE * machine.disk_bytes:
            continue
        seconds = _STARTING_SECONDS + needs["multiply_adds"] / _speed(machine)
        hours = min(_LONGEST_HOURS, max(_SHORTEST_HOURS, round(3 * seconds / 3600)))
        if seconds < 3600 * hours:
            found.append(Choice(machine, seconds, hours))
    return tuple(sorted(found, key=lambda choice: (choice.usd, choice.seconds)))


def choose(plan: dict[str, Any], machines: tuple[Machine, ...], name: str = "auto") -> Choice:
    """The named machine; for "auto" the cheapest run that is not longer than a working day, else
    the quickest. Raises QuantkitError when the run fits on none.
    """
    found = choices(plan, machines)
    if not found:
        raise QuantkitError(
            "No machine of Hugging Face Jobs is large enough for this run.",
            "Choose a smaller model or a quicker profile.",
        )
    if name != "auto":
        named = next((choice for choice in found if choice.machine.name == name), None)
        if named is None:
            raise QuantkitError(
                f"The run does not fit on {name[:40]!r}.",
                "Use one of " + ", ".join(choice.machine.name for choice in found) + ".",
            )
        return named
    quick = [choice for choice in found if choice.seconds <= _PATIENCE_SECONDS]
    return quick[0] if quick else min(found, key=lambda choice: choice.seconds)


def _speed(machine: Machine) -> float:
    if machine.gpu:
        known = (speed for name, speed in _GPU_SPEEDS.items() if name in machine.gpu.upper())
        return next(known, 1e13)
    return _CPU_SPEED * machine.n_cpu


def why_not_here(plan: dict[str, Any], folder: Path, most_seconds: int | None) -> str:
    """A sentence when the run is too large for this machine; empty when it fits."""
    needs = plan["estimates"]
    memory = memory_here(os.environ)
    if memory and needs["memory_bytes"] > _SHARE * memory:
        return (
            f"It needs about {needs['memory_bytes'] / 1e9:.1f} GB of memory and this machine has"
            f" {memory / 1e9:.1f} GB."
        )
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needs["disk_bytes"] > _SHARE * free:
        return (
            f"It needs about {needs['disk_bytes'] / 1e9:.1f} GB of disk and this machine has"
            f" {free / 1e9:.1f} GB free."
        )
    if most_seconds is not None and needs["seconds"] > most_seconds:
        return (
            f"It would take about {needs['seconds'] / 3600:.1f} hours here, and a run may take"
            f" {most_seconds / 3600:.0f}."
        )
    return ""


def memory_here(environment: Mapping[str, str]) -> int:
    """Bytes of memory: what a Space says it has, else what the system says; 0 when unknown."""
    said = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(Gi|G|Mi)?B?", environment.get("MEMORY", ""))
    if said:
        unit = {"Gi": 2**30, "G": 10**9, "Mi": 2**20, None: 1}[said[2]]
        return int(float(said[1]) * unit)
    try:
        text = Path("/proc/meminfo").read_text("utf-8")
    except OSError:
        return 0
    found = re.search(r"MemTotal:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0
