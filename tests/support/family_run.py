"""Every family through the whole pipeline, and what that showed: a row of docs/architectures.md."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, Family, write_checkpoint

from evaluators import agreement
from evaluators.weights import expanded_to_f16
from quantkit import config, pipeline
from quantkit.config.targets import LikeMix
from quantkit.evidence import integrity
from quantkit.gguf_file.read import GgufFile
from quantkit.llamacpp import contexts
from quantkit.model.row_maps import RowMap, load_row_maps
from quantkit.run.folder import RunDir, read_json

# Four held-out sequences are what the search needs; nothing is judged on so few tokens.
_PROFILE = config.Profile(
    calibration_tokens=4096,
    heldout_tokens=2048,
    search_tokens=2048,
    eval_windows=2,
    n_sweeps=0,
    tuning_steps=3,
    effort=config.PROFILES["demo"].effort,
    levels=("Q4_K", "Q6_K"),
    about="families",
)
_N_TOKENS = 96
_TEXT = "The quick brown fox (born 1984) jumps over 13 lazy dogs; isn't it odd? def f(x): return x"


@dataclass(frozen=True)
class Row:
    """What a family's run showed. KL are mean nats per token, PyTorch against llama.cpp."""

    family: str
    problem: str = ""  # why there is nothing more to say
    architecture: str = ""  # of the GGUF
    mapped_share: float = 0.0  # of the parameters of linear layers: found in the model
    gptq_share: float = 0.0  # of the same: quantized with a Hessian
    apart: tuple[str, ...] = ()  # kinds of tensors that are not counted, as `_apart` says
    agrees: bool = False  # PyTorch and llama.cpp, at F16 and on the file, as integrity judges
    kl_f16: float = math.inf
    kl_f16_trimmed: float = math.inf  # without the worst 2 % of the tokens
    kl_file: float = math.inf
    kl_file_trimmed: float = math.inf
    kl_swapped: float = 0.0  # at F16, with two heads or other rows exchanged on one side
    spread: float = 0.0  # standard deviation of a position's logits
    kl_tuned: tuple[float, float] = (0.0, 0.0)  # before and after tuning, on held-out sequences
    n_projector_bytes: int = 0  # of the vision tower's own GGUF
    context_error: float = math.inf  # of what 5000 tokens take, relative to llama.cpp's own word
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.problem and all(
            (
                self.mapped_share >= 0.99,
                self.gptq_share >= 0.99,
                self.agrees,
                self.kl_swapped >= 30 * max(self.kl_f16, integrity.F16_LIMIT / 10),
                self.spread >= 3,
                0 < self.kl_tuned[0] and math.isfinite(self.kl_tuned[1]),
                self.context_error < 0.05,
                (self.n_projector_bytes > 0) == FAMILIES[self.family].sees,
            )
        )


@contextmanager
def _profile() -> Iterator[str]:
    config.PROFILES["families"] = _PROFILE
    try:
        yield "families"
    finally:
        del config.PROFILES["families"]


def run_all(names: Sequence[str], folder: Path, n_workers: int = 2) -> Iterator[Row]:
    """The rows of families, in their order; what fails is a row that says why."""
    contexts = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_workers, contexts, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(partial(_row, folder), names)


def _row(folder: Path, name: str) -> Row:
    own = folder / name.replace(" ", "-")
    try:
        return run_family(FAMILIES[name], own)
    except Exception as error:  # whatever it is, it is the family's row
        return Row(name, f"{type(error).__name__}: {error}"[:1000])
    finally:
        shutil.rmtree(own, ignore_errors=True)


def run_family(family: Family, folder: Path) -> Row:
    """Make the checkpoint, run fetch to stitch, compare logits. Raises what fails."""
    begun = time.monotonic()
    checkpoint = write_checkpoint(family, folder / "model")
    with _profile() as profile:
        asked = config.RunConfig(
            str(checkpoint),
            targets=(LikeMix("Q5_K_M"),),
            profile=profile,
            calibration="docs,code",
        )
        pipeline.run(asked, folder / "run", until="stitch")
    directory = RunDir(folder / "run")
    (stitched,) = directory.stage_dir("stitch").glob("*.gguf")
    file = GgufFile(stitched)
    maps = load_row_maps(directory.artifacts.row_maps)
    ids = agreement.tokens_of(stitched, _TEXT * 4, _N_TOKENS)
    logits = integrity.torch_logits(checkpoint, maps, file, ids, "cpu")
    wrong = integrity.torch_logits(checkpoint, swapped(maps, file), file, ids, "cpu")
    with expanded_to_f16(stitched, folder) as f16:
        at_f16 = agreement.measure(f16, ids, logits)
        swap = agreement.measure(f16, ids, wrong)
    as_it_is = agreement.measure(stitched, ids, logits)
    errors = read_json(directory.artifacts.levels / "errors.json")["errors"]
    (tuning,) = directory.records()["tune"].summary["budgets"].values()
    apart = {name: why for name in errors if (why := _apart(maps.get(name)))}
    sizes = {n: math.prod(file.tensors[n].shape) for n in errors if n not in apart}
    kinds = sorted({f"{name.split('.')[-2]}: {why}" for name, why in apart.items()})
    projector = directory.stage_dir("convert") / "mmproj.gguf"
    return Row(
        family.name,
        "",
        str(file.metadata["general.architecture"]),
        sum(n for name, n in sizes.items() if name in maps) / sum(sizes.values()),
        sum(n for name, n in sizes.items() if _has_gptq(errors[name])) / sum(sizes.values()),
        tuple(kinds),
        integrity.agrees(file, at_f16, integrity.F16_LIMIT)
        and integrity.agrees(file, as_it_is, integrity.FILE_LIMIT),
        at_f16.mean_kl,
        at_f16.trimmed_kl,
        as_it_is.mean_kl,
        as_it_is.trimmed_kl,
        swap.mean_kl,
        float(logits.std(-1).mean()),
        (tuning["kl_before"], tuning["kl_after"]),
        projector.stat().st_size if projector.exists() else 0,
        _context_error(file),
        time.monotonic() - begun,
    )


def _context_error(file: GgufFile) -> float:
    (layout,) = contexts.ask(file.path, [5000])
    wanted = layout.buffers + sum(n_bytes for n_bytes, _ in layout.caches)
    found = contexts.context_memory(file)
    fixed = dataclasses.replace(found, fixed_bytes=found.fixed_bytes - contexts.RUNTIME_BYTES)
    return math.inf if found.note else abs(fixed.n_bytes(5000) / wanted - 1)


def _apart(row_map: RowMap | None) -> str:
    """Why a tensor is no linear layer with an input of its own; empty where it is one."""
    if row_map is None:
        return ""
    return "" if row_map.module else "columns are no module's input"


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
