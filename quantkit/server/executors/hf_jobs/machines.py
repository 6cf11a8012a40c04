"""Find the Hub's machines that a run fits on, and estimate its time and cost there.

The planner says what a run takes on two cores and on one H200, and knows the speeds of GPUs
(`planning.time`). The times are good to a factor of two or so, and are shown as "about".
"""

from __future__ import annotations

from math import ceil

from quantkit.hub.jobs import Machine
from quantkit.planning.nouns import Estimates, Plan
from quantkit.planning.time import cpu_speed, gpu_speed
from quantkit.server.executors.protocol import ON_PLAN, SHARE, Offer

_STARTING_SECONDS = 420  # image, packages, converter, and getting a machine at all
_PATIENCE = 3  # times the estimate, after which a Job is ended
_LONGEST_HOURS = 72


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
        at_work = _seconds(needs, machine)
        seconds = _STARTING_SECONDS + at_work
        hours = min(_LONGEST_HOURS, ceil(_PATIENCE * seconds / 3600))
        if ON_PLAN * seconds < 3600 * hours:
            part = at_work / max(needs.seconds, 1)
            stages = {name: part * planned for name, planned in needs.by_stage.items()}
            title = f"Job: {machine.name}" + (f" ({machine.gpu})" if machine.gpu else "")
            device = "cuda" if machine.gpu else "cpu"
            price = machine.usd_per_hour
            found.append(
                Offer(executor, machine.name, title, device, seconds, hours, price, stages)
            )
    return tuple(sorted(found, key=lambda offer: (offer.usd, offer.seconds)))


def _seconds(needs: Estimates, machine: Machine) -> float:
    if not machine.gpu:
        return needs.cpu.on(cpu_speed(machine.n_cpu))
    return needs.gpu.on(gpu_speed(machine.gpu, machine.n_gpus))
