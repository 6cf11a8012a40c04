"""One family through the whole pipeline, and what it showed: a row of docs/architectures.md."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import Family, write_checkpoint

from evaluators import agreement
from evaluators.weights import expanded_to_f16
from quantkit import config, integrity, pipeline
from quantkit.ggufio.read import GgufFile
from quantkit.rowmap import RowMap, load_row_maps
from quantkit.rundir import RunDir, read_json

# Four held-out sequences are what the search needs; nothing is judged on so few tokens.
_PROFILE = config.Profile(4096, 2048, 6144, 2, 0, ("Q4_K", "Q6_K"), "families")
_N_TOKENS = 96
_TEXT = (
    "The quick brown fox (born 1984) jumps over 13 lazy dogs; isn't that odd? def f(x): return x"
)


@dataclass(frozen=True)
class Row:
    """What a family's run showed. KL are mean nats per token, PyTorch against llama.cpp."""

    family: str
    architecture: str  # of the GGUF
    mapped_share: float  # of the parameters of quantizable tensors
    gptq_share: float  # of the parameters of linear layers: all but a table that is looked up
    kl_f16: float
    kl_f16_worst: float  # of one token
    kl_file: float
    kl_swapped: float  # with two heads, or other rows, exchanged on one side
    spread: float  # standard deviation of a position's logits
    seconds: float
    problem: str = ""


@contextmanager
def _profile() -> Iterator[str]:
    config.PROFILES["families"] = _PROFILE
    try:
        yield "families"
    finally:
        del config.PROFILES["families"]


def run_family(family: Family, folder: Path) -> Row:
    """Make the checkpoint, run fetch to stitch, compare logits. Raises what fails."""
    begun = time.monotonic()
    checkpoint = write_checkpoint(family, folder / "model")
    with _profile() as profile:
        asked = config.RunConfig(
            str(checkpoint),
            targets=(config.Target("like", "Q5_K_M"),),
            profile=profile,
            calibration="docs,code",
        )
        records = pipeline.run(asked, folder / "run", until="stitch")
    directory = RunDir(folder / "run")
    (stitched,) = directory.stage_dir("stitch").glob("*.gguf")
    file = GgufFile(stitched)
    maps = load_row_maps(directory.stage_dir("convert") / "rowmaps.safetensors")
    ids = agreement.tokens_of(stitched, _TEXT * 4, _N_TOKENS)
    logits = integrity.torch_logits(checkpoint, maps, file, ids, "cpu")
    wrong = integrity.torch_logits(checkpoint, swapped(maps, file), file, ids, "cpu")
    with expanded_to_f16(stitched, folder) as f16:
        at_f16 = agreement.measure(f16, ids, logits)
        swap = agreement.measure(f16, ids, wrong)
    as_it_is = agreement.measure(stitched, ids, logits)
    summary = records["convert"].summary
    errors = read_json(directory.stage_dir("quantize") / "errors.json")["errors"]
    sizes = {
        name: math.prod(file.tensors[name].shape)
        for name in errors
        if not (name in maps and maps[name].is_lookup and maps[name].module == _table(maps[name]))
    }
    solved = sum(n for name, n in sizes.items() if _has_gptq(errors[name]))
    return Row(
        family.name,
        str(file.metadata["general.architecture"]),
        summary["mapped_share"],
        solved / sum(sizes.values()),
        at_f16.mean_kl,
        at_f16.max_kl,
        as_it_is.mean_kl,
        swap.mean_kl,
        float(logits.std(-1).mean()),
        time.monotonic() - begun,
    )


def _table(row_map: RowMap) -> str:
    """The module of an embedding that is not also the head."""
    return row_map.parameter.removesuffix(".weight")


def _has_gptq(types: dict[str, Any]) -> bool:
    return all("gptq" in level["errors"] for level in types.values())


def swapped(maps: dict[str, RowMap], file: GgufFile) -> dict[str, RowMap]:
    """The maps, with the first two heads of one tensor's rows exchanged: what a wrong map does."""
    names = [
        name
        for part in ("attn_q.weight", "attn_qkv.weight", "attn_q_b.weight", "ssm_in.weight", "blk.")
        for name in maps
        if part in name and file.tensors[name].qtype.is_quantized
    ]
    chosen = maps[names[0]]
    rows = chosen.rows
    if rows is None:
        rows = torch.arange(math.prod(file.tensors[chosen.tensor].shape[:-1]))
    rows, n = rows.clone(), min(32, len(rows) // 2)
    rows[:n], rows[n : 2 * n] = rows[n : 2 * n].clone(), rows[:n].clone()
    return {**maps, chosen.tensor: dataclasses.replace(chosen, rows=rows)}
