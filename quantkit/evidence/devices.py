"""Choose what llama.cpp measures on: the GPUs that the run was given, as far as they have room, or
the CPU. All files of a report are measured on the same, and the report says on what.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.evidence.receipt.schema import Engine
from quantkit.gguf_file.read import GgufFile
from quantkit.llamacpp import place
from quantkit.sizes import size

if TYPE_CHECKING:
    from evaluators.llama_runtime import Runtime

ALL_LAYERS = -1  # as llama.cpp counts them
# Of each GPU's memory, beside the weights and the largest of them in 32 bits: keys and values of a
# long context, 512 rows of logits over a large vocabulary, llama.cpp's own buffers.
_RESERVE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Device:
    """`runtime` measures; `on_cpu` is the one that a GPU is compared with. `reason` says why it is
    not, or not wholly, the GPUs although the run has them.
    """

    runtime: Runtime
    on_cpu: Runtime
    name: str
    reason: str | None = None

    @property
    def is_gpu(self) -> bool:
        return self.runtime.n_gpu_layers != 0

    def engine(self) -> Engine:
        """Return the build that measures, for a receipt."""
        from evaluators.devices import build

        return Engine(**build(), device=self.name, n_threads=self.runtime.threads)


def choose(device: str, base: GgufFile) -> Device:
    """Return what to measure on in a run on `device` ("cpu" or "cuda"). `base` is the largest file
    that is measured.
    """
    from evaluators.devices import described, gpus

    on_cpu = place.runtime()
    if device == "cpu":
        return Device(on_cpu, on_cpu, described(on_cpu))
    if not gpus():
        return Device(on_cpu, on_cpu, described(on_cpu), "this llama-cpp-python finds no GPU")
    free = _free_gpu_memory()
    n_bytes = base.n_bytes
    largest = max(4 * math.prod(tensor.shape) for tensor in base.tensors.values())
    n_layers = gpu_layers(n_bytes, _n_blocks(base), [n - largest - _RESERVE_BYTES for n in free])
    runtime = place.runtime(n_gpu_layers=n_layers)
    reason = None
    if n_layers != ALL_LAYERS:
        reason = f"full precision is {size(n_bytes)} and the GPUs have {size(sum(free))} free"
    return Device(runtime, on_cpu, described(runtime), reason)


def gpu_layers(n_bytes: int, n_blocks: int, free: list[int]) -> int:
    """Return how many layers of a file of `n_bytes` fit GPUs with room for `free` bytes each:
    ALL_LAYERS, or the number of blocks, 0 where there is room for none.
    """
    room = sum(max(0, n) for n in free)
    if n_bytes <= room:
        return ALL_LAYERS
    return n_blocks * room // n_bytes


def release(device: str) -> None:
    """Give back what PyTorch keeps of a GPU's memory: it is another process that measures."""
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def _n_blocks(base: GgufFile) -> int:
    return int(base.metadata[f"{base.metadata['general.architecture']}.block_count"])


def _free_gpu_memory() -> list[int]:
    import torch

    from quantkit.machine.memory import free_memory

    release("cuda")
    return [free_memory(f"cuda:{i}") for i in range(torch.cuda.device_count())]
