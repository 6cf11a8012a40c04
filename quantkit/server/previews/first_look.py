"""The first facts about a model, shown while the planner works out the rest."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.checkpoint.info import ModelInfo
from quantkit.sandbox.untrusted import shortened


@dataclass(frozen=True)
class FirstLook:
    """The facts about a model before the planner has answered."""

    architecture: str
    n_parameters: int
    license: str | None
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
