"""A first estimate from a model's number of parameters alone, shown at once while the planner works
out the exact one. Within a fifth or so for sizes, a factor of two for time.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.checkpoint.info import ModelInfo
from quantkit.config import PROFILES, TUNING_BATCH, RunConfig
from quantkit.config.targets import DEFAULT_TARGET, Target
from quantkit.sandbox.untrusted import shortened

# Bits per weight of llama.cpp's own files of a model of 8B parameters. Of the whole file, so small
# models, with their large embeddings, take more.
_BITS = {
    **{"Q2_K": 3.2, "Q2_K_S": 3.0, "Q3_K_S": 3.7, "Q3_K_M": 4.0, "Q3_K_L": 4.3, "IQ4_XS": 4.5},
    **{"IQ4_NL": 4.7, "Q4_0": 4.7, "Q4_1": 5.1, "Q4_K_S": 4.7, "Q4_K_M": 4.9, "Q5_0": 5.6},
    **{"Q5_1": 6.1, "Q5_K_S": 5.6, "Q5_K_M": 5.7, "Q6_K": 6.6, "Q8_0": 8.5},
}
_SPEED = {"cpu": 1.2e11, "cuda": 2e14}  # multiply-adds a second, as the planner counts
_BESIDE_FORWARD = 1.2  # statistics and quantizing, in forward passes


@dataclass(frozen=True)
class FirstLook:
    """What is known of a model before the planner has answered."""

    architecture: str
    n_parameters: int
    licence: str | None
    gated: bool
    n_download_bytes: int

    @classmethod
    def of(cls, info: ModelInfo) -> FirstLook:
        return cls(
            shortened(info.architectures[0], 100),
            info.n_parameters,
            info.license and shortened(info.license, 100),
            info.gated,
            info.n_download_bytes,
        )


DEMO = FirstLook("LlamaForCausalLM", 134_515_008, "apache-2.0", False, 0)


def rough_bytes(config: RunConfig, n_parameters: int) -> tuple[int, ...]:
    """About the bytes of every file that is asked for, as far as that can be said."""
    if not config.targets and any(pattern == "default" for pattern, _ in config.types):
        return ()
    found = (_bytes(target, n_parameters) for target in config.targets or (DEFAULT_TARGET,))
    return tuple(n for n in found if n is not None)


def _bytes(target: Target, n_parameters: int) -> int | None:
    if target.n_context is not None:
        return None  # hangs on what a context takes
    if target.mix is not None:
        bits = _BITS.get(target.mix)
        return None if bits is None else round(bits * n_parameters / 8)
    return target.limit_bytes(n_parameters, lambda label: 0, lambda n_tokens: 0)


def rough_seconds(config: RunConfig, n_parameters: int) -> float:
    """About the time of the run on a machine of two cores, or with a GPU."""
    profile = PROFILES[config.profile]
    tokens = profile.calibration_tokens + profile.heldout_tokens + profile.search_tokens
    tokens += 3 * config.tuning_steps * TUNING_BATCH * 512  # forward and backward
    return 60 + _BESIDE_FORWARD * n_parameters * tokens / _SPEED[config.device]
