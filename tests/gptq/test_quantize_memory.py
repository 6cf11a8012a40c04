"""What the quantize stage holds at once: holding less changes nothing. What `plan` says of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tiny_gguf import write_llama

from quantkit.config import RunConfig
from quantkit.config.levels import plan_levels
from quantkit.ggml.types import QuantType
from quantkit.gguf_file.read import GgufFile
from quantkit.gptq.select import Inputs, solve_tensor
from quantkit.gptq.solver import factorize
from quantkit.planning.memory import stage_memory
from quantkit.planning.plan import specs_of
from quantkit.run.artifacts import NAMES

TYPES = tuple(map(QuantType, ("Q4_0", "Q4_K", "Q5_K", "Q6_K")))


def test_one_type_at_a_time_is_all_at_once() -> None:
    """How the largest tensors are solved."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(600, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    train, heldout = (x.T @ x / len(x) for x in inputs.chunk(2))
    known = Inputs(train.diagonal().numpy().copy(), train, heldout, factorize(train, 0.1))
    weight = torch.randn(96, 256, generator=generator)
    methods = ("gptq", "imatrix", "rtn")
    together = solve_tensor(weight, TYPES, methods, known, None, 2)
    for qtype in TYPES:
        (alone,) = solve_tensor(weight, (qtype,), methods, known, None, 2).values()
        assert alone.method == together[qtype].method
        assert np.array_equal(alone.packed, together[qtype].packed)


def test_peaks_by_stage(tmp_path: Path) -> None:
    """A stage that holds the whole model where there is room, needs less where there is none."""
    base = GgufFile(write_llama(tmp_path / "base.gguf"))
    config = RunConfig("m")
    levels = plan_levels(specs_of(base), config)
    whole, streamed = (stage_memory(config, base, levels, 1 << 20, free) for free in (1 << 40, 0))
    assert tuple(whole) == NAMES
    for stage in NAMES:
        assert whole[stage] >= streamed[stage] > 100_000_000
        streams = stage in ("calibrate", "quantize", "search", "tune", "validate")
        assert (whole[stage] > streamed[stage]) == streams, stage
