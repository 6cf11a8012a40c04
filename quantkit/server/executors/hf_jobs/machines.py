"""Find the Hub's machines that a run fits on, and estimate its time and cost there.

The planner says what a run takes on two cores and on one H200, and knows the speeds of GPUs
(`planning.time`). The times are good to a factor of two or so, and are shown as "about".
"""

from __future__ import annotations

from quantkit.hub.jobs import Machine
from quantkit.planning.nouns import Estimates, Plan
from quantkit.planning.time import GPU_SPEEDS, N_CORES
from quantkit.server.executors.protocol import SHARE, Offer

_STARTING_SECONDS = 420  # image, packages, converter, and getting a machine at all
_SCALING = 0.85  # two GPUs do 1.8 times what one does
_SHORTEST_HOURS, _LONGEST_HOURS = 1, 24


def offers(plan: Plan, machines: tuple[Machine, ...], executor: str) -> tuple[Offer, ...]:
    """Return every machine that the run fits on, cheapest run first."""
    needs = plan.estimates
    found = []
    for machine in machines:
        memory = machine.gpu_bytes if machine.gpu else machine.memory_bytes
        # A run has a process for every GPU, with an equal share of the machine's memory.
        of_one = min(memory, machine.memory_bytes or memory) // max(1, machine.n_gpus)
        if needs.memory_bytes > SHARE * of_one:
            continue
        if machine.disk_bytes and needs.disk_bytes > SHARE * machine.disk_bytes:
            continue
        seconds = _STARTING_SECONDS + _seconds(needs, machine)
        hours = min(_LONGEST_HOURS, max(_SHORTEST_HOURS, round(3 * seconds / 3600)))
        if seconds < 3600 * hours:
            title = f"Job: {machine.name}" + (f" ({machine.gpu})" if machine.gpu else "")
            device = "cuda" if machine.gpu else "cpu"
            price = machine.usd_per_hour
            found.append(Offer(executor, machine.name, title, device, seconds, hours, price))
    return tuple(sorted(found, key=lambda offer: (offer.usd, offer.seconds)))


def _seconds(needs: Estimates, machine: Machine) -> float:
    if not machine.gpu:
        return needs.cpu.on(machine.n_cpu / N_CORES)
    known = (speed for name, speed in GPU_SPEEDS.items() if name in machine.gpu.upper())
    return needs.gpu.on(next(known, 1e13) / GPU_SPEEDS["H200"] * machine.n_gpus**_SCALING)
