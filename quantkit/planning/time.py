"""Estimate the time of every stage from a model's shapes, on two cores of a server CPU and on one
H200 with sixteen.

Terms follow what a stage does; what a machine takes for each was measured by
`benchmarks/scaling.py` and, on a CPU, by the demo (dev/LOG.md). How long llama.cpp measures a large
model on a GPU is an estimate. A download is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from quantkit.config import N_CTX, PROFILES, TUNING_BATCH, Profile, RunConfig
from quantkit.config.levels import LevelPlan
from quantkit.ggml.types import CODEBOOK_TYPES
from quantkit.gguf_file.read import GgufFile, StoredTensor
from quantkit.planning.nouns import Seconds
from quantkit.tensors import is_in_block

_GPU_SPEEDS = {  # multiply-adds a second in dense bf16; what their makers state, over an H200's
    **{"T4": 1.3e13, "L4": 2.4e13, "A10G": 1.4e13, "A10": 2.5e13, "L40S": 7e13, "A100": 6e13},
    **{"RTX PRO 6000": 1e14, "H200": 2e14, "H100": 2e14},
    **{"RTX 3090": 1.4e13, "RTX 4090": 3.3e13, "RTX 5090": 4.2e13},
}
_N_CORES = 2  # that CPU times are of
# What cores of which CPU times are true can do: fitted to the demo on two that do less than half.
CPU_MULTIPLY_ADDS = 2.1e11
_SCALING = 0.85  # two GPUs do 1.8 times what one does
_WRITTEN = 0.45  # of the calibration text, with the half that texts lose to held-out parts
_DOMAINS = 4  # that validate measures on
_PROMPT_TOKENS = 150  # of a prompt with its tools
_DOCUMENTS, _DOCUMENT_TOKENS = 56, 300  # conversations, and about the tokens of one
_KINDS = 12  # of conversations


def cpu_speed(n_cores: int) -> float:
    """Return the speed of so many cores over that of those which CPU times are of."""
    return n_cores / _N_CORES


def gpu_speed(name: str, n_gpus: int = 1) -> float:
    """Return the speed of GPUs that are called `name` over that of one H200; one that nobody knows
    is taken for a T4.
    """
    known = max((key for key in _GPU_SPEEDS if key in name.upper()), key=len, default="T4")
    return _GPU_SPEEDS[known] / _GPU_SPEEDS["H200"] * float(n_gpus**_SCALING)


@dataclass(frozen=True)
class _Rates:
    """What a machine takes: seconds, but for speeds a second."""

    starts: float  # of a stage that opens the model: imports, kernels that are compiled
    searches: float  # of the search until it judges
    multiply_adds: float  # a second, of a forward pass
    judged: float  # a second, of the search's passes
    bytes: float  # a second: read, hashed or written on the way through a file
    equalized: float  # of an input of a matrix
    token: float  # that the model writes, and for each of its weights:
    token_weight: float
    block: float  # of a block in one level
    solved: float  # of a weight in one level, and for each of its columns:
    column: float
    codebook: float  # of a weight in one level of a codebook
    step: float  # of tuning a block, and for each of its weights:
    step_weight: float
    step_codebook: float  # the same, more, where its type is a codebook
    measured: float  # multiply-adds a second of llama.cpp, answers and speed included
    stock: float  # of a weight that llama.cpp quantizes


_CPU = _Rates(
    starts=12,
    searches=40,
    multiply_adds=1.2e11,
    judged=1.5e11,
    bytes=1.6e8,
    equalized=2e-4,
    token=0.0,
    token_weight=4.3e-11,
    block=0.0,
    solved=2.2e-7,
    column=4e-11,
    codebook=3.3e-6,
    step=0.01,
    step_weight=3 * TUNING_BATCH * N_CTX / 6e10,
    step_codebook=1.7e-8,
    measured=6e10,
    stock=8e-8,
)
_GPU = _Rates(
    starts=8,
    searches=5,
    multiply_adds=2e14,
    judged=2e14,
    bytes=1.6e8,
    equalized=2e-5,  # a guess: no GPU has run it
    token=1.3e-4,
    token_weight=3.1e-14,
    block=0.12,
    solved=3.6e-9,
    column=0.0,
    codebook=9e-9,
    step=0.013,
    step_weight=5.5e-11,
    step_codebook=1e-10,  # by counting instructions: no GPU has run it
    measured=5e13,
    stock=9e-9,
)


@dataclass(frozen=True)
class StageTimes:
    """Seconds by stage on a CPU and on a GPU."""

    cpu: Mapping[str, Seconds]
    gpu: Mapping[str, Seconds]

    def of(self, device: str) -> Mapping[str, Seconds]:
        """Return those of a device."""
        return self.cpu if device == "cpu" else self.gpu


def stage_times(
    config: RunConfig, base: GgufFile, levels: LevelPlan, base_bytes: int
) -> StageTimes:
    """Return the time of every stage of a run for one file; `base_bytes` are those of the whole
    base.gguf, of which `base` may be the header alone.
    """
    cpu, gpu = (_times(config, base, levels, base_bytes, rates) for rates in (_CPU, _GPU))
    return StageTimes(cpu, gpu)


def _times(
    config: RunConfig, base: GgufFile, levels: LevelPlan, base_bytes: int, rates: _Rates
) -> dict[str, Seconds]:
    profile = PROFILES[config.profile]
    blocks = [t for t in base.tensors.values() if len(t.shape) > 1 and is_in_block(t.name)]
    n_blocks = len({t.name.split(".")[1] for t in blocks})
    n_all = sum(prod(t.shape) for t in base.tensors.values())
    chosen = _experts_used(base)
    n_used = round(sum(prod(t.shape) * _share(t, chosen) for t in blocks))
    n_head = prod(base.tensors["token_embd.weight"].shape)
    inputs = sum(t.shape[-1] for t in blocks if len(t.shape) == 2)
    equalized = rates.equalized * inputs + base_bytes / rates.bytes if config.equalize else 0.0
    n_tokens = profile.calibration_tokens + profile.heldout_tokens
    written = _WRITTEN * n_tokens + 3 * N_CTX * profile.eval_windows
    solved = sum(
        prod(t.shape)
        * (rates.codebook if qtype in CODEBOOK_TYPES else rates.solved + rates.column * t.shape[-1])
        for t in base.tensors.values()
        for qtype in set(levels.types.get(t.name, {}).values())
    )
    gathered = n_tokens * sum(t.shape[-1] ** 2 * (chosen or 1) for t in blocks) / 2
    steps = config.tuning_steps * n_blocks
    made = [q for t in blocks for q in set(levels.types.get(t.name, {}).values())]
    share = sum(q in CODEBOOK_TYPES for q in made) / max(len(made), 1)  # which, nobody knows yet
    step_weight = rates.step_weight + share * rates.step_codebook
    tuned = steps * (rates.step + step_weight * n_used / max(n_blocks, 1))
    passes = 4 * n_tokens * n_used / rates.multiply_adds if config.tuning_steps else 0.0
    n_files = 2 + profile.effort.n_uniform + _most(profile.effort.n_below)
    scored = 2 * n_files * _DOMAINS * profile.eval_windows * N_CTX
    scored += _in_use(profile)
    opened = rates.starts + base_bytes / 1e9
    return {
        "fetch": Seconds(8 + base_bytes / 8e8, 0.0),
        "convert": Seconds(5 + base_bytes / rates.bytes, equalized),
        "calibrate": Seconds(
            opened, written * (rates.token + rates.token_weight * (n_used + n_head))
        ),
        "quantize": Seconds(
            opened,
            solved
            + rates.block * len(levels.levels) * n_blocks
            + (n_tokens * n_used + gathered) / rates.multiply_adds,
        ),
        "search": Seconds(
            rates.searches + base_bytes / 1e9,
            profile.search_tokens * (n_used + n_head) / rates.judged,
        ),
        "tune": Seconds(opened if steps else 0.0, tuned + passes),
        "stitch": Seconds(1 + base_bytes / 3 / 8e8, 0.0),
        "validate": Seconds(
            30 + (1 + _most(profile.effort.n_below)) * n_all * rates.stock,
            scored * (n_used + n_head) / rates.measured,
        ),
    }


def _in_use(profile: Profile) -> int:
    """Tokens that are read and written for answers and in conversations: by the base, a file and
    the one that it is compared with; conversations by the weights of the first two, too.
    """
    n_prompts, n_new = profile.effort.answers
    answered = 3 * n_prompts * 2 * (_PROMPT_TOKENS + n_new)
    n_documents = (
        _DOCUMENTS
        if profile.effort.documents is None
        else (min(_DOCUMENTS, _KINDS * profile.effort.documents))
    )
    return answered + 5 * n_documents * _DOCUMENT_TOKENS


def _most(n_below: int | None) -> int:
    return 12 if n_below is None else n_below  # of all that llama.cpp can make


def _experts_used(base: GgufFile) -> int:
    """How many experts a token is sent to; 0 without experts."""
    name = base.metadata["general.architecture"]
    return int(base.metadata.get(f"{name}.expert_used_count", 0))


def _share(tensor: StoredTensor, chosen: int) -> float:
    """The part of a tensor that a token is multiplied with."""
    return chosen / tensor.shape[0] if len(tensor.shape) == 3 and chosen else 1.0
