"""The cost of a run in time, from a model's shapes; `memory` and `disk` have the others.

Work is counted in multiply-adds. What a machine does of them in a second was measured for two cores
of a server CPU (bf16) and for one H200; other GPUs are scaled by what their makers state for dense
bf16.
"""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.config import PROFILES, TUNING_BATCH, RunConfig
from quantkit.config.levels import LevelPlan
from quantkit.gguf_file.read import GgufFile, StoredTensor
from quantkit.planning.disk import Footprint
from quantkit.planning.memory import stage_memory
from quantkit.planning.nouns import Estimates, PerFile
from quantkit.tensors import ONE_INPUT, is_in_block

CORE_SPEED = 6e10  # multiply-adds a second of one virtual core
GPU_SPEEDS = {
    **{"T4": 1.3e13, "L4": 2.4e13, "A10G": 1.4e13, "A10": 2.5e13, "L40S": 7e13, "A100": 6e13},
    **{"RTX PRO 6000": 1e14, "H200": 2e14, "H100": 2e14},
}


def estimates(
    config: RunConfig,
    base: GgufFile,
    levels: LevelPlan,
    footprint: Footprint,
    disk: Mapping[str, int],
) -> Estimates:
    """Estimate what the run takes for one file, from the model's shapes, and what each further size
    adds. `disk` are the bytes of the run's folder by stage, of all sizes.

    Time is counted in multiply-adds over what the device does in a second: two cores of a server
    CPU, or one H200. It is within a factor of two or so.
    """
    profile = PROFILES[config.profile]
    chosen = _experts_used(base)
    n_linear = sum(
        t.shape[-1] * (t.n_bytes // t.qtype.row_bytes(t.shape[-1])) * _share(t, chosen)
        for t in _blocks(base)
    )
    inputs = _inputs(base)
    speed = 2 * CORE_SPEED if config.device == "cpu" else GPU_SPEEDS["H200"]
    n_calibrated = profile.calibration_tokens + profile.heldout_tokens
    forward = round(n_linear) * n_calibrated
    gather = n_calibrated * sum(
        t.shape[-1] ** 2 * (chosen if len(t.shape) == 3 else 1) for t in inputs
    )
    solve = len(levels.levels) * 4 * sum(t.n_bytes // 2 * t.shape[-1] for t in _blocks(base))
    # A step's backward pass takes two forward ones; streams of hidden states pass four times.
    tuned = 3 * config.tuning_steps * TUNING_BATCH * 512
    tuned += 4 * n_calibrated if config.tuning_steps else 0
    search = round(n_linear) * (profile.search_tokens + tuned)
    return Estimates(
        disk_bytes=footprint.downloaded + max(disk.values()),
        disk=dict(disk),
        memory_bytes=max(memory_by_stage(config, base, levels, 0).values()),
        memory=memory_by_stage(config, base, levels, free_bytes(config.device)),
        multiply_adds=forward + gather + solve + search,
        seconds=round(60 + 30 + (forward + gather + solve + search) / speed),
        n_files=1,
        per_file=PerFile(
            multiply_adds=search,
            seconds=round(30 + search / speed),
        ),
    )


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


def _experts_used(base: GgufFile) -> int:
    """How many experts a token is sent to; 0 without experts."""
    name = base.metadata["general.architecture"]
    return int(base.metadata.get(f"{name}.expert_used_count", 0))


def _share(tensor: StoredTensor, chosen: int) -> float:
    """The part of a tensor that a token is multiplied with."""
    return chosen / tensor.shape[0] if len(tensor.shape) == 3 and chosen else 1.0
