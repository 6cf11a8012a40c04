"""The cost of a run: time, memory and disk, put together."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.config import RunConfig
from quantkit.config.levels import LevelPlan
from quantkit.gguf_file.read import GgufFile, StoredTensor
from quantkit.planning.disk import Footprint
from quantkit.planning.here import here
from quantkit.planning.memory import stage_memory
from quantkit.planning.nouns import Estimates, PerFile, Seconds, Times
from quantkit.planning.time import StageTimes, stage_times
from quantkit.tensors import ONE_INPUT, is_in_block

_PER_FILE = ("search", "tune", "stitch")  # what each file takes; validate, half


def estimates(
    config: RunConfig,
    base: GgufFile,
    levels: LevelPlan,
    footprint: Footprint,
    disk: Mapping[str, int],
) -> Estimates:
    """Estimate what the run takes for one file, from the model's shapes, and what each further size
    adds. `disk` are the bytes of the run's folder by stage, of all sizes.
    """
    machine = here(config.device)
    found = stage_times(config, base, levels, footprint.base)
    stages = found.of(config.device)
    return Estimates(
        **vars(times(config.device, found)),
        disk_bytes=footprint.downloaded + max(disk.values()),
        disk=dict(disk),
        memory_bytes=max(memory_by_stage(config, base, levels, 0).values()),
        memory=memory_by_stage(config, base, levels, free_bytes(config.device)),
        machine=machine.name,
        stage_seconds={n: round(seconds.on(machine.speed)) for n, seconds in stages.items()},
    )


def times(device: str, found: StageTimes) -> Times:
    """Estimate the time of a run for one file on this machine's `device`, and what each further
    size adds.
    """
    cpu, gpu = (sum(of.values(), Seconds(0, 0)) for of in (found.cpu, found.gpu))
    each_cpu, each_gpu = _of_a_file(found.cpu), _of_a_file(found.gpu)
    whole, each = (cpu, each_cpu) if device == "cpu" else (gpu, each_gpu)
    speed = here(device).speed
    per_file = PerFile(each_cpu, each_gpu, round(each.on(speed)))
    return Times(cpu=cpu, gpu=gpu, seconds=round(whole.on(speed)), n_files=1, per_file=per_file)


def _of_a_file(times: Mapping[str, Seconds]) -> Seconds:
    """The time that a further file takes. It is measured as well, but the base is not once more."""
    validate = times["validate"]
    found = sum((times[name] for name in _PER_FILE), Seconds(0, 0))
    return found + Seconds(validate.fixed / 2, validate.work / 2)


def memory_by_stage(
    config: RunConfig, base: GgufFile, levels: LevelPlan, free: int
) -> dict[str, int]:
    """Return the bytes of memory at the peak of every stage, on a machine with `free` of them."""
    by_block: dict[str, int] = {}  # Hessians of one block are in memory together
    for tensor in _inputs(base):
        block = tensor.name.split(".")[1]
        by_block[block] = by_block.get(block, 0) + _hessian_bytes(tensor)
    return stage_memory(config, base, levels, max(by_block.values(), default=0), free)


def free_bytes(device: str) -> int:
    """Return the bytes of memory that a run may take on a device, or on this machine instead."""
    from quantkit.machine.memory import free_memory  # needs torch

    try:
        return free_memory(device)
    except (AssertionError, RuntimeError):  # planned for a machine with a GPU, on one without
        return free_memory()


def _blocks(base: GgufFile) -> list[StoredTensor]:
    return [t for t in base.tensors.values() if len(t.shape) > 1 and is_in_block(t.name)]


def _inputs(base: GgufFile) -> list[StoredTensor]:
    """A tensor of every distinct input of a block: q, k and v share one, gate and up another."""
    shared = {kind for kinds in ONE_INPUT for kind in kinds[1:]} | {"ffn_up_exps"}
    return [t for t in _blocks(base) if t.name.split(".")[2] not in shared]


def _hessian_bytes(tensor: StoredTensor) -> int:
    """What the Hessians of a tensor's input take."""
    from quantkit.statistics.turns import hessian_bytes  # needs torch

    return hessian_bytes(tensor.shape[-1], tensor.shape[0] if len(tensor.shape) == 3 else 1)
