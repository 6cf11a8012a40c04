"""A plan as the planner makes them, for tests that need one and no planner. Holds no tests."""

from __future__ import annotations

from dataclasses import replace

from quantkit.config import RunConfig
from quantkit.llamacpp.contexts import ContextMemory
from quantkit.planning.coverage import Coverage
from quantkit.planning.disk import Footprint
from quantkit.planning.nouns import (
    Estimates,
    PerFile,
    Plan,
    PlannedModel,
    Seconds,
    Sizes,
    Times,
)
from quantkit.server.previews.sizes import with_sizes

_EACH = PerFile(Seconds(0, 600), Seconds(0, 0.5), 600)
PLAN = Plan(
    model=PlannedModel(
        "a/b", "0" * 40, "LlamaForCausalLM", 1_000_000_000, "mit", True, 2_000_000_000
    ),
    sizes=Sizes((), (), 350_000_000, 1_100_000_000, 1_000_000_000, {}),
    stock={"Q3_K_M": 480_000_000, "Q4_K_M": 600_000_000, "Q5_K_M": 700_000_000},
    context=ContextMemory(100_000, 0, 0, ((2**18, 100_000_000),), 200_000_000, 4096),
    levels=("Q3_K", "Q4_K"),
    left_out=(),
    footprint=Footprint(
        downloaded=2_000_000_000,
        fetched=0,
        base=2_000_000_000,
        equalized=0,
        compared=2_000_000_000,
        calibrated=100_000_000,
        hidden_states=0,
        importances=1_000_000,
        searched=400_000_000,
        is_tuned=True,
        tuned_states=0,
        expanded=2_000_000_000,
        predictions=1_000_000_000,
    ),
    coverage=Coverage(0.9996, {"token_embd": "looked up"}),
    fallbacks=(),
    sandbox="the kernel",
    warnings=(),
    estimates=Estimates(
        disk_bytes=9_000_000_000,
        disk={"validate": 7_000_000_000},
        memory_bytes=5_000_000_000,
        memory={"calibrate": 5_000_000_000},
        cpu=Seconds(0, 3400),
        gpu=Seconds(0, 2),
        machine="2 cores",
        stage_seconds={"quantize": 2000, "search": 1400},
        seconds=3400,
        n_files=1,
        per_file=_EACH,
    ),
    profiles={
        name: Times(
            cpu=Seconds(0, n), gpu=Seconds(0, n / 1700), seconds=n, n_files=1, per_file=_EACH
        )
        for name, n in {"demo": 400, "fast": 1800, "standard": 3400, "thorough": 7200}.items()
    },
    alike=(),
    unspent=(),
)


_BITS = {
    **{"Q2_K": 5.2, "Q3_K_S": 5.3, "Q3_K_M": 5.56, "IQ4_XS": 5.4, "Q4_K_S": 6.05, "Q4_K_M": 6.27},
    **{"Q5_K_S": 6.5, "Q5_K_M": 6.67, "Q6_K": 8.2, "Q8_0": 8.6},
}
_N = 134_515_008
SMALL = replace(
    PLAN,
    model=PlannedModel(
        "demo:smollm2-135m", "0" * 40, "LlamaForCausalLM", _N, "apache-2.0", False, 0
    ),
    sizes=Sizes((), (), 60_000_000, 270_000_000, 145_000_000, {}),
    stock={name: int(bits * _N / 8) for name, bits in _BITS.items()},
)


def ask_small(config: RunConfig, *_: object) -> Plan:
    """Answer for every model as for the one of the demo."""
    return with_sizes(SMALL, config)


def ask(config: RunConfig, *_: object) -> Plan:
    """Answer as `quantkit.server.previews.estimate.estimate` does."""
    return with_sizes(PLAN, config)
