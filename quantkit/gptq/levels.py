"""Quantize every tensor to every candidate type, by the method that does best on held-out inputs.

The unit of work is one block: the level files are laid out at once and filled block by block;
finished blocks are noted in `done.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.config.levels import LevelPlan, plan_levels
from quantkit.files import PARTIAL, write_json
from quantkit.ggml import native
from quantkit.ggml.types import FILE_TYPES, QuantType, file_label
from quantkit.gguf_file.base import load_base, load_specs
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.write import KeyValue, SlotFile, lay_out
from quantkit.gptq.donors import PREFIX, Donor, open_donors, rows_of
from quantkit.gptq.errors import Errors, ExpertErrors, TypeErrors
from quantkit.gptq.inputs import KnownInputs, make_inputs, modules_of, sibling_of
from quantkit.gptq.select import (
    Part,
    Solved,
    decide_experts,
    experts_at_once,
    solve_experts,
    solve_tensor,
)
from quantkit.model.row_maps import RowMap, load_row_maps
from quantkit.run.folder import read_as
from quantkit.run.stage import Run
from quantkit.statistics.sensitivity import Sensitivity
from quantkit.statistics.stored import (
    ExpertStatistics,
    Gradients,
    load_expert_statistics,
    load_gradients,
    load_statistics,
    sensitivity_of,
)
from quantkit.tensors import Fallback

STAGE = "quantize"

ALL_TYPES_AT_ONCE = 1 << 27  # weights; a larger tensor is solved one type after the other


@dataclass(frozen=True)
class Unit:
    """Tensors solved together: a block's, the head, the embeddings, or one without statistics."""

    name: str
    tensors: tuple[str, ...]
    statistics: Path | None


def make_levels(run: Run) -> tuple[list[Path], Errors]:
    """Write the level files and `errors.json`, and return them and what that says. Raise
    QuantkitError when activations or weights are not finite.
    """
    made, specs = run.artifacts, load_specs(run.dir)
    base, plan = load_base(run.dir), plan_levels(specs, run.config)
    # Until the stage is recorded: a kill while files are finished or hashed loses nothing.
    done_path = made.levels / f"done.json{PARTIAL}"
    again = done_path.exists()
    files = {level: _open(made.level(level), base, plan, level, again) for level in plan.levels}
    goes_on = again and all(f.resumed for f in files.values())
    done = read_as(dict[str, Errors], done_path) if goes_on else {}
    donors = open_donors(run.config.levels_from, specs)
    maps = load_row_maps(made.row_maps)
    gradients = load_gradients(made.folder("calibrate"))
    units = list(_units(run, plan, maps))
    work = _Work(run, base, plan, files, donors, maps, gradients)
    for position, unit in enumerate(units):
        if unit.name not in done:
            done[unit.name] = _solve_unit(unit, work)
            for file in files.values():
                file.flush()
            write_json(done_path, done)
        run.events.progress(
            STAGE, position + 1, len(units), f"{unit.name}: {len(plan.levels)} levels"
        )
    for name in base.tensors:
        if name not in plan.types:
            for file in files.values():
                file.write(name, base.packed(name))
    for file in files.values():
        file.finish()
    found = Errors(
        {tensor: types for unit in done.values() for tensor, types in unit.errors.items()},
        (*plan.fallbacks, *(f for unit in done.values() for f in unit.fallbacks)),
        tuple(d for unit in done.values() for d in unit.dampings),
    )
    return [*(f.path for f in files.values()), write_json(made.errors, found)], found


def _open(path: Path, base: GgufFile, plan: LevelPlan, level: QuantType, again: bool) -> SlotFile:
    key_values = [
        KeyValue.uint32("general.file_type", FILE_TYPES[file_label(level)]),
        KeyValue.uint32("general.quantization_version", 2),
    ]
    return SlotFile(path, lay_out(base, plan.uniform(level), key_values), reopen=again)


def _units(run: Run, plan: LevelPlan, maps: Mapping[str, RowMap]) -> Iterator[Unit]:
    """One unit per statistics file, in model order, then one tensor at a time what no Hessian is
    known of.
    """
    of_module: dict[str, list[str]] = {}
    for name, module in modules_of(plan.types, maps).items():
        of_module.setdefault(module, []).append(name)
    left = set(plan.types)
    # Without gptq the table of embeddings is rounded as llama.cpp does, whose imatrix has no
    # gradients.
    kinds = "[beh]*.safetensors" if "gptq" in run.config.methods else "[bh]*.safetensors"
    for path in sorted((run.artifacts.statistics).glob(kinds)):
        modules = [m for s in load_statistics(path) for m in s.modules]
        modules += [m for s in load_expert_statistics(path) for m in s.modules]
        tensors = tuple(name for module in modules for name in of_module.get(module, ()))
        left -= set(tensors)
        if tensors:
            yield Unit(path.stem, tensors, path)
    for name in plan.types:
        if name in left:
            yield Unit(name, (name,), None)


@dataclass(frozen=True)
class _Work:
    """The data that all units share."""

    run: Run
    base: GgufFile
    plan: LevelPlan
    files: Mapping[QuantType, SlotFile]
    donors: Sequence[Donor]
    maps: Mapping[str, RowMap]
    gradients: Gradients

    def sensitivity(self, tensor: str) -> Sensitivity | None:
        return sensitivity_of(self.gradients, self.maps.get(tensor), self.run.config.device)


def _solve_unit(unit: Unit, work: _Work) -> Errors:
    """Solve a unit's tensors and fill their slots in every file. Returns what `errors.json` will
    say of them.
    """
    run, base, plan, maps = work.run, work.base, work.plan, work.maps
    methods = run.config.methods
    errors: dict[str, dict[str, ExpertErrors | TypeErrors]] = {}
    fallbacks: list[Fallback] = []
    known = KnownInputs(unit.statistics, unit.tensors, maps, run.config, work.gradients)
    for statistics, tensors in known.groups:
        if statistics.is_judged_on_train:
            reason = "no held-out token reached its inputs"
            fallbacks += [Fallback(t, "error held out", "error on train", reason) for t in tensors]

    def solve(name: str) -> dict[QuantType, Solved]:
        sensitivity = work.sensitivity(name)
        weight = base.values(name)
        # Of the largest tensors, the vocabulary's, the rows of all types would not fit.
        choices = plan.choices(name)
        steps = [(q,) for q in choices] if weight.size > ALL_TYPES_AT_ONCE else [choices]
        solved: dict[QuantType, Solved] = {}
        with known.borrowed(name) as inputs:
            for types in steps:
                given = rows_of(work.donors, name, types)
                n_sweeps = run.profile.n_sweeps
                solved |= solve_tensor(weight, types, methods, inputs, sensitivity, n_sweeps, given)
        return solved

    def keep(name: str, solved: dict[QuantType, Solved]) -> None:
        for level, file in work.files.items():
            file.write(name, solved[plan.types[name][level]].packed)
        errors[name] = {str(q): s.found for q, s in solved.items()}

    stacked = load_expert_statistics(unit.statistics) if unit.statistics else []
    modules = modules_of(unit.tensors, maps)
    of_experts = {t for s in stacked for t in unit.tensors if modules.get(t) in s.modules}
    alone = [name for name in unit.tensors if name not in of_experts]
    # Tensors do not depend on each other; one alone leaves a CPU's cores idle between its steps.
    n_workers = 2 if run.config.device == "cpu" else 1
    with ThreadPoolExecutor(n_workers, "tensor") as pool:
        for name, solved in zip(alone, pool.map(solve, alone), strict=True):
            keep(name, solved)
            fallbacks.extend(_method_fallbacks(name, solved, methods, known.has(name)))
            if name not in maps and known.has(name):
                used = f"importances of {sibling_of(name, maps)}"
                reason = "it is not found in the model"
                fallbacks.append(Fallback(name, "statistics of its own", used, reason))
        for experts in stacked:
            tensors = [name for name in unit.tensors if modules.get(name) in experts.modules]
            if not tensors:
                continue
            rows = [
                _Experts(base, name, plan.choices(name), work.sensitivity(name)) for name in tensors
            ]
            found = _solve_experts(experts, rows, run, pool.map)
            for name, solved in zip(tensors, found, strict=True):
                keep(name, solved)
                fallbacks.extend(_method_fallbacks(name, solved, methods, True))
                fallbacks.extend(_borrowed(name, experts))
    return Errors(errors, tuple(fallbacks), known.dampings())


@dataclass(frozen=True)
class _Experts:
    """A tensor of stacked experts, whose rows are read an expert at a time."""

    base: GgufFile
    name: str
    types: tuple[QuantType, ...]
    sensitivity: Sensitivity | None

    def rows(self, expert: int) -> tuple[native.Floats, Sensitivity | None]:
        """Return an expert's weight, float32 (n_rows, n_columns), and what its errors cost."""
        stored = self.base.tensors[self.name]
        packed = self.base.packed(self.name)
        n_rows = len(packed) // stored.shape[0]
        first, last = expert * n_rows, (expert + 1) * n_rows
        own = None if self.sensitivity is None else self.sensitivity.rows(first, last)
        return native.dequantize(packed[first:last], stored.qtype), own


def _solve_experts(
    statistics: ExpertStatistics, tensors: Sequence[_Experts], run: Run, over: Callable[..., Any]
) -> list[dict[QuantType, Solved]]:
    """The tensors of a layer's experts that read one input, each in all its types. An expert's
    Hessian is read and factorized once for all of them; a GPU takes many experts at once.
    """
    methods, n_sweeps = run.config.methods, run.profile.n_sweeps

    def solve(experts: range) -> list[list[Part]]:
        """Return, for every tensor, what its experts became."""
        inputs = [make_inputs(*statistics.load(e), methods, run.config.device) for e in experts]
        parts = []
        for tensor in tensors:
            weights, own = zip(*(tensor.rows(e) for e in experts), strict=True)
            parts.append(solve_experts(weights, tensor.types, methods, inputs, own, n_sweeps))
        return parts

    n_experts, step = len(statistics.n_tokens), 1  # on a CPU every core has an expert of its own
    if run.config.device != "cpu":
        step = min(
            experts_at_once(len(t.rows(0)[0]), t.rows(0)[0].shape[1], len(t.types)) for t in tensors
        )
    batches = [range(first, min(first + step, n_experts)) for first in range(0, n_experts, step)]
    found = list(over(solve, batches))
    return [
        {q: decide_experts(q, [p for batch in found for p in batch[i]]) for q in tensor.types}
        for i, tensor in enumerate(tensors)
    ]


def _borrowed(name: str, statistics: ExpertStatistics) -> Iterator[Fallback]:
    """What is to be said of experts that saw too few tokens."""
    few = statistics.borrowers
    if len(few):
        most = int(statistics.n_tokens[few].max())
        reason = (
            f"{len(few)} of {len(statistics.n_tokens)} experts got at most {most} tokens:"
            " they borrowed others"
        )
        yield Fallback(name, "tokens routed", "tokens lent", reason)


def _method_fallbacks(
    name: str, solved: dict[QuantType, Solved], methods: tuple[str, ...], has_inputs: bool
) -> Iterator[Fallback]:
    """What is to be said where a tensor was made by a method that was not asked for."""
    for qtype, result in solved.items():
        asked = (*methods, PREFIX)
        if result.method.startswith(asked) or not qtype.is_quantized:
            continue
        reason = f"{qtype} has no grid for GPTQ" if has_inputs else "no statistics of its inputs"
        yield Fallback(name, f"{qtype}/{methods[0]}", f"{qtype}/{result.method}", reason)
