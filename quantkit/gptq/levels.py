"""Quantize every tensor to every candidate type, by the method that does best on held-out inputs.

The unit of work is one block: the level files are laid out at once and filled block by block;
finished blocks are noted in `done.json`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from quantkit.config.levels import LevelPlan
from quantkit.files import PARTIAL, write_json
from quantkit.ggml import native
from quantkit.ggml.types import FILE_TYPES, QuantType, file_label
from quantkit.gguf_file.base import load_base, load_specs
from quantkit.gguf_file.fields import Field
from quantkit.gguf_file.imatrix import write_imatrix
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.write import SlotFile, lay_out
from quantkit.gptq import distributed
from quantkit.gptq.bar import Bar
from quantkit.gptq.carried import carried_files
from quantkit.gptq.donors import open_donors
from quantkit.gptq.errors import Errors
from quantkit.gptq.units import Unit, Work
from quantkit.model.blockwise import compute_dtype
from quantkit.model.equalize import Powers
from quantkit.model.opening import open_model
from quantkit.model.row_maps import load_row_maps
from quantkit.run.artifacts import Artifacts
from quantkit.run.folder import read_as, read_json
from quantkit.run.stage import Run
from quantkit.sources.snapshot import load_quantized
from quantkit.statistics.collect import HEAD, block_names, walk
from quantkit.statistics.inputs import BlockStatistics, InputDiagonal
from quantkit.statistics.stored import (
    embedding_file,
    fisher_file,
    load_gradients,
    load_importances,
    save_importances,
)

STAGE = "quantize"


def make_levels(run: Run, plan: LevelPlan) -> tuple[list[Path], Errors]:
    """Write the planned level files, `imatrix.gguf` and `errors.json` in one pass over the model's
    blocks; return the files and what the errors are. Raise QuantkitError when activations or
    weights are not finite.
    """
    levels = _Levels(run, plan)
    work, made = levels.work, run.artifacts
    _solve_all(run, levels)
    for name in work.base.tensors:
        if name not in work.plan.types:
            for file in work.files.values():
                file.write(name, work.base.packed(name))
    for file in work.files.values():
        file.finish()
    _write_imatrix(run)
    done = levels.done.values()
    found = Errors(
        {tensor: types for unit in done for tensor, types in unit.errors.items()},
        (*work.plan.fallbacks, *(f for unit in done for f in unit.fallbacks)),
        tuple(d for unit in done for d in unit.dampings),
    )
    files = [file.path for file in work.files.values()]
    return [*files, made.imatrix, write_json(made.errors, found)], found


def _solve_all(run: Run, levels: _Levels) -> None:
    """Solve what is left of all units, with the other ranks."""
    work, made, ranks = levels.work, run.artifacts, run.ranks
    device, dtype = run.config.device, compute_dtype(run.config.device)
    with ranks.session(STAGE, distributed.told(run, work, dtype)):
        ranks.local(distributed.files(run, work))
        if HEAD not in levels.done:  # else a killed run had solved all blocks
            model = open_model(run, STAGE, load_quantized(run.dir).folder, dtype, device)
            levels.bar.n_units += len(block_names(len(model.blocks)))
            spill = made.levels / f"activations{PARTIAL}"
            with ranks.task("walk", list(levels.done)):
                tokens, ran = load_file(made.tokens), levels.bar.ran
                walk(model, tokens, levels.done, levels.solve, spill, ranks, ran)
            del model
        for name in levels.left():
            with ranks.task("solve", name):
                levels.solve(name, distributed.statistics_of(name, work))


class _Levels:
    """The level files as they are filled, and what is done of them."""

    def __init__(self, run: Run, plan: LevelPlan) -> None:
        """Lay the files out, or open those of a killed run."""
        made, specs = run.artifacts, load_specs(run.dir)
        base = load_base(run.dir)
        # Until the stage is recorded: a kill while files are finished or hashed loses nothing.
        self._done_path = made.levels / f"done.json{PARTIAL}"
        again = self._done_path.exists()
        files = {level: _open(made.level(level), base, plan, level, again) for level in plan.levels}
        goes_on = again and all(file.resumed for file in files.values())
        self._run = run
        self.done = read_as(dict[str, Errors], self._done_path) if goes_on else {}
        self.work = Work(
            config=run.config,
            n_sweeps=run.profile.n_sweeps,
            base=base,
            plan=plan,
            files=files,
            donors=open_donors(run.config.levels_from, specs),
            carried=carried_files(made.carried),
            maps=load_row_maps(made.row_maps),
            gradients=load_gradients(fisher_file(made.gradients), embedding_file(made.gradients)),
            ranks=run.ranks,
        )
        n_known = sum(map(len, self.work.of_module.values()))
        self.bar = Bar(run.events, STAGE)
        self.bar.n_units = len(plan.types) - n_known + 1  # and the blocks and the head

    def left(self) -> Iterator[str]:
        """Yield the units beside the blocks and the head that are not done when it is their turn.

        Without gptq the table of embeddings is rounded as llama.cpp does, whose imatrix has no
        gradients.
        """
        if "gptq" in self.work.config.methods and distributed.EMBEDDING not in self.done:
            yield distributed.EMBEDDING
        for name in self.work.plan.types:
            if not any(name in unit.errors for unit in self.done.values()):
                yield name

    def solve(self, name: str, turns: Iterable[BlockStatistics] | None) -> None:
        """Solve a unit unless it is done: the tensors that read what the turns tell of, or without
        them the tensor of this name. It is not solved again, whatever happens afterwards.
        """
        n_levels = len(self.work.plan.levels)
        if name not in self.done:
            self.bar.begin(name, len(self.done), self._weights(name), turns is not None)
            unit = Unit(self.work, self.bar.solved)
            unit.solve_all(name, turns)
            errors, importances = unit.end()
            self._keep_importances(name, importances)
            for file in self.work.files.values():
                file.flush()
            self.done[name] = errors
            write_json(self._done_path, self.done)
        self.bar.end(len(self.done), f"{n_levels} levels")

    def _weights(self, name: str) -> dict[str, int]:
        """The weights of the tensors of a block, by their names; other units are one tensor."""
        if not name.startswith("block-"):
            return {}
        prefix = f"blk.{int(name.removeprefix('block-'))}."
        return {
            tensor: math.prod(self.work.base.tensors[tensor].shape)
            for tensor in self.work.plan.types
            if tensor.startswith(prefix)
        }

    def _keep_importances(self, name: str, importances: dict[str, InputDiagonal]) -> None:
        """For `imatrix.gguf`, in which llama.cpp has tensors of blocks alone."""
        if name.startswith("block-"):
            save_importances(self._run.artifacts.importances / f"{name}{PARTIAL}", importances)


def _write_imatrix(run: Run) -> None:
    importances: dict[str, tuple[native.Floats, int | native.Floats]] = {}
    for path in sorted(run.artifacts.importances.glob(f"block-*{PARTIAL}")):
        importances |= {n: (d.diagonal, d.n_tokens) for n, d in load_importances(path).items()}
    _undo_equalizing(run.artifacts, importances)
    about = read_json(run.artifacts.calibration)
    names = [f"{domain['name']} ({domain['source']})" for domain in about["domains"]]
    n_chunks = about["n_tokens"]["train"] // about["n_ctx"]
    write_imatrix(run.artifacts.imatrix, importances, names, n_chunks, about["n_ctx"])


def _undo_equalizing(
    artifacts: Artifacts, importances: dict[str, tuple[native.Floats, int | native.Floats]]
) -> None:
    """Make it the imatrix of the model as it was given, which others quantize and llama.cpp's own
    files are made of: where channels were equalized, inputs were divided by powers of two.
    """
    if not artifacts.powers.exists():
        return
    powers, maps = Powers.load(artifacts.powers), load_row_maps(artifacts.row_maps)
    for name in importances.keys() & maps.keys():
        power = powers.columns.get(maps[name].parameter)
        if power is not None:
            diagonal, n_tokens = importances[name]
            times = maps[name].in_file_order(np.exp2(2 * power.numpy().astype(np.float32)))
            importances[name] = diagonal * times, n_tokens


def _open(path: Path, base: GgufFile, plan: LevelPlan, level: QuantType, again: bool) -> SlotFile:
    fields = [
        Field.uint32("general.file_type", FILE_TYPES[file_label(level)]),
        Field.uint32("general.quantization_version", 2),
    ]
    return SlotFile(path, lay_out(base, plan.uniform(level), fields), reopen=again)
