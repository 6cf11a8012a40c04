"""Find the Hub's machines that a run fits on, and estimate its time and cost there.

A run's work is counted in multiply-adds by the planner. What a machine does of them in a second is
measured for two cores of a server CPU and for one H200; other GPUs are scaled by what their makers
state for dense bf16. So the times are good to a factor of two or so, and are shown as "about".
"""

from __future__ import annotations

from quantkit.hub.jobs import Machine
from quantkit.planning.nouns import Plan
from quantkit.server.executors.protocol import SHARE, Offer

_CPU_SPEED = 6e10  # multiply-adds a second of one virtual core
_GPU_SPEEDS = {
    **{"T4": 1.3e13, "L4": 2.4e13, "A10G": 1.4e13, "A10": 2.5e13, "L40S": 7e13, "A100": 6e13},
    **{"RTX PRO 6000": 1e14, "H200": 2e14, "H100": 2e14},
}
_STARTING_SECONDS = 420  # image, packages, converter, and getting a machine at all
_SHORTEST_HOURS, _LONGEST_HOURS = 1, 24


def offers(plan: Plan, machines: tuple[Machine, ...], executor: str) -> tuple[Offer, ...]:
    """Return every machine that the run fits on, cheapest run first."""
    needs = plan.estimates
    found = []
    for machine in machines:
        if machine.gpu and not machine.gpu.startswith("1x"):
            continue  # a run uses one GPU
        memory = machine.gpu_bytes if machine.gpu else machine.memory_bytes
        if needs.memory_bytes > SHARE * min(memory, machine.memory_bytes or memory):
            continue
        if machine.disk_bytes and needs.disk_bytes > SHARE * machine.disk_bytes:
            continue
        seconds = _STARTING_SECONDS + needs.multiply_adds / _speed(machine)
        hours = min(_LONGEST_HOURS, max(_SHORTEST_HOURS, round(3 * seconds / 3600)))
        if seconds < 3600 * hours:
            title = f"Job: {machine.name}" + (f" ({machine.gpu})" if machine.gpu else "")
            device = "cuda" if machine.gpu else "cpu"
            price = machine.usd_per_hour
            found.append(Offer(executor, machine.name, title, device, seconds, hours, price))
    return tuple(sorted(found, key=lambda offer: (offer.usd, offer.seconds)))


def _speed(machine: Machine) -> float:
    if machine.gpu:
        known = (speed for name, speed in _GPU_SPEEDS.items() if name in machine.gpu.upper())
        return next(known, 1e13)
    return _CPU_SPEED * machine.n_cpu
