"""search: the type of every tensor, within the budget of the whole file's bytes.

Proposes allocations from estimated damages, decides by KL to the full-precision model on held-out
text (EvoPress); where files are tuned afterwards, by the KL that is expected then. Several budgets
are searched one after the other, smallest first, with one evaluator; each begins with what was
found for the one before. Writes `budgets.json` (the budgets that are met, those that are refused)
and, in a folder per budget, called after its bytes, `allocation.json` (tensor -> type, method),
`trace.jsonl` and `state.json` (after every generation: a killed search goes on from there). Then
the found files are tuned, block by block: `tuned-<bytes>.gguf` is a level file of one allocation,
`tuning.json` says what came of it. `budget.json` sums up.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.files import write_json
from quantkit.ggml.types import QuantType
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.write import Layout, slot_bytes
from quantkit.llamacpp.output import Provenance, lay_out_output
from quantkit.llamacpp.stock import STOCK_MIXES, StockRecipe, stock_types
from quantkit.planning.budgets import Budget
from quantkit.planning.cost import tuning_bytes, tuning_bytes_beside_model
from quantkit.planning.levels import plan_levels
from quantkit.planning.plan import budgets_of
from quantkit.run.folder import RunDir, read_json
from quantkit.run.stage import StageResult
from quantkit.search import answers
from quantkit.search.allocation import Choices, SearchSpace, choices_of, in_order, pruned
from quantkit.search.caps import cap_types
from quantkit.search.evopress import MOST_SEQUENCES, Evaluator, Plan, SearchState, begin, evolve
from quantkit.search.expected import AfterTuning, costs_after
from quantkit.search.propose import Costs, damages, knapsack, knapsacks, spend, uniform
from quantkit.search.workers import Workers
from quantkit.stages import convert, database, fetch, open_model
from quantkit.tensors import Candidate, CandidateKey
from quantkit.tuning.tuned import (
    Outcome,
    Progress,
    lack_of_memory,
    load_stored,
    load_tuner,
    tune_file,
    tuned_name,
)

if TYPE_CHECKING:
    from quantkit.run.stage import Run
    from quantkit.search.fitness import Fitness
    from quantkit.tuning.tuner import Stored, Tuner

NAME = "search"
VERSION = 7
FIELDS = ("targets", "max_types", "seed", "profile", "device", "types", "tuning")

_FLOAT32_ABOVE_BPW = 6.5
_LEAST_SEQUENCES = 4


def execute(run: Run) -> StageResult:
    """Raises QuantkitError when all budgets lie outside what the levels can make."""
    folder = run.dir.stage_dir(NAME)
    folder.mkdir(parents=True, exist_ok=True)
    base = convert.load_base(run.dir)
    space = make_space(run, base)
    smallest, largest = space.n_bytes(space.smallest), space.limit_bytes
    budgets, refused = budgets_of(run.config, base, smallest, largest)
    for budget in refused:
        run.events.emit(NAME, "note", f"refused: {budget.target}: {budget.refusal}")
    asked = budgets or (Budget("what the types come to", largest),)
    space = _capped(run, space, asked)
    reason = reason_not_to_tune(run, base)
    # Free memory may be another after an interruption: the first attempt decides what counts.
    path = folder / "budgets.json"
    known = read_json(path) if path.exists() else {}
    expects = known.get("expects_tuning", run.config.tuning_steps > 0 and not reason)
    choices = answers.fingerprint(space)
    if known.get("choices", choices) != choices:  # levels were made anew since: numbers mean others
        for left in folder.glob("*/*.json"):
            left.unlink()
    table = {"budgets": asked, "refused": refused, "expects_tuning": expects, "choices": choices}
    outputs = [write_json(path, table)]
    searcher = _Searcher(run, base, space, asked, expects)
    found: list[_Found] = []
    for budget in asked:
        found.append(searcher.search(budget, found[-1].choices if found else None))
    del searcher  # and its model
    summaries = []
    for position, answer in enumerate(found):
        is_new = not any(np.array_equal(answer.choices, f.choices) for f in found[:position])
        about = answer.about
        if reason:
            about |= {"tuning": {"steps": 0, "reason": reason}}
        elif is_new and run.config.tuning_steps:
            outcome, files = _tuned(run, base, space, answer, position, len(found))
            outputs += files
            about |= {"tuning": outcome.in_short}
        path = budget_dir(run.dir, answer.budget) / "budget.json"
        outputs += [*answer.outputs, write_json(path, about)]
        summaries.append(about)
    return StageResult(outputs, {"budgets": summaries, "n_refused": len(refused)})


def is_intermediate(path: str) -> bool:
    """Tuned level files are dropped by `clean`."""
    return path.endswith(".gguf")


def last_reader(path: str) -> str:
    """Tuned levels are stitched in; the rest stands in the report."""
    return "stitch" if is_intermediate(path) else "validate"


def load_budgets(directory: RunDir) -> list[Budget]:
    """The budgets of a run whose search stage is finished, smallest first."""
    table = read_json(directory.stage_dir(NAME) / "budgets.json")["budgets"]
    return [Budget(**row) for row in table]


def budget_dir(directory: RunDir, budget: Budget) -> Path:
    """Where the answer for one budget lies."""
    return directory.stage_dir(NAME) / str(budget.limit_bytes)


def load_allocation(directory: RunDir, budget: Budget) -> dict[str, CandidateKey]:
    """The allocation for one budget, of a run whose search stage is finished."""
    table = read_json(budget_dir(directory, budget) / "allocation.json")
    return {
        name: CandidateKey(name, QuantType(row["qtype"]), row["method"])
        for name, row in table.items()
    }


def load_tuned(directory: RunDir, budget: Budget) -> tuple[Path, tuple[str, ...]] | None:
    """The tuned level file of one budget and the tensors that it changed, where tuning helped."""
    folder = budget_dir(directory, budget)
    outcome = Outcome.load(folder)
    # An interrupted attempt may have left one behind: the budget's own word counts.
    said = read_json(folder / "budget.json").get("tuning", {})
    if outcome is None or not said.get("n_tensors"):
        return None
    return folder / tuned_name(budget.limit_bytes), outcome.tensors


def provenance(run: Run) -> Provenance:
    """What the stages so far put into the output's metadata."""
    record = read_json(run.dir.stage_dir("calibrate") / "calibration.json")
    return Provenance(
        fetch.load(run.dir).info.sha,
        tuple(d["name"] for d in record["domains"]),
        record["n_imatrix_entries"],
        record["n_tokens"]["train"] // record["n_ctx"],
    )


def make_space(run: Run, base: GgufFile) -> SearchSpace:
    """Every tensor's choices, also those that others beat, and the size of everything else; the
    budget is the largest file.
    """
    index = database.load(run.dir)
    tensors = tuple(index.candidates)
    candidates = tuple(in_order(index.candidates[name]) for name in tensors)
    smallest = {c[0].key.tensor: c[0].key.qtype for c in candidates}
    layout = lay_out_output(base, smallest, provenance(run), "Q8_0")
    slots = tuple(tuple(slot_bytes(base, c.n_bytes) for c in of_tensor) for of_tensor in candidates)
    fixed = layout.n_bytes - sum(sizes[0] for sizes in slots)
    largest = fixed + sum(sizes[-1] for sizes in slots)
    return SearchSpace(tensors, candidates, slots, fixed, largest)


def _capped(run: Run, space: SearchSpace, budgets: Sequence[Budget]) -> SearchSpace:
    """The space of choices that none beats, of at most as many types as were asked for."""
    n_types = run.config.max_types
    if n_types is None:
        return pruned(space)
    capped = cap_types(space, damages, [b.limit_bytes for b in budgets], n_types)
    if capped is None:
        raise QuantkitError(
            f"No {n_types} of the types meet every size.",
            "Allow more with --max-types, or pin fewer tensors.",
        )
    used = sorted({c.key.qtype for of_tensor in capped.candidates for c in of_tensor})
    run.events.emit(NAME, "note", f"the types are {', '.join(map(str, used))}")
    return capped


def proposals(
    run: Run,
    space: SearchSpace,
    costs: Costs,
    mixes: Mapping[str, Mapping[str, QuantType]],
) -> list[tuple[Choices, str]]:
    """The first population: the knapsack's answers, uniform levels, and the stock mixes, types of
    tensors by label, that can be built and fit.
    """
    found = [(knapsack(space, costs), "knapsack")]
    found += [(choices, "knapsack") for choices in knapsacks(space, costs)]
    plan = plan_levels(convert.load_specs(run.dir), run.config)
    for level in plan.levels:
        choices = choices_of(space, plan.uniform(level))
        if choices is not None and space.fits(choices):
            found.append((spend(space, choices, costs), f"uniform {level}"))
    found += [(choices, "uniform step") for choices in uniform(space, costs)]
    for label, types in mixes.items():
        choices = choices_of(space, types)
        if choices is not None and space.fits(choices):
            found.append((spend(space, choices, costs), f"like {label}"))
    return found


@dataclass(frozen=True)
class _Found:
    """The answer for one budget: the files written, and what to say of it."""

    budget: Budget
    choices: Choices
    outputs: list[Path]
    about: dict[str, Any]


class _Searcher:
    """Searches one budget after the other. The model and its targets are made once, when the first
    search needs them.
    """

    def __init__(
        self,
        run: Run,
        base: GgufFile,
        space: SearchSpace,
        budgets: Sequence[Budget],
        expects_tuning: bool,
    ) -> None:
        self._run, self._base, self._space = run, base, space
        self._expects_tuning = expects_tuning
        self._costs = costs_after(space, damages(space)) if expects_tuning else damages(space)
        self._budgets = budgets
        self._evaluator: Evaluator | None = None

    @cached_property
    def _mixes(self) -> dict[str, dict[str, QuantType]]:
        """What llama.cpp would make of the model: asked once for all budgets."""
        return {label: stock_types(self._base.path, StockRecipe(label)) for label in STOCK_MIXES}

    def search(self, budget: Budget, before: Choices | None) -> _Found:
        """The best allocation found within a budget; `before` is the answer for the next smaller
        one.
        """
        folder = budget_dir(self._run.dir, budget)
        folder.mkdir(exist_ok=True)
        space = replace(self._space, limit_bytes=budget.limit_bytes)
        allocation_path, state_path = folder / "allocation.json", folder / "state.json"
        state: SearchState | None
        if bool((space.n_choices == 1).all()):
            state = None
        elif allocation_path.exists() and state_path.exists():  # found before an interruption
            state = SearchState.from_json(read_json(state_path))
        else:
            state = self._evolve(budget, space, before, state_path)
        if state is None:
            chosen = space.smallest
            report: dict[str, Any] = {"searched": False, "reason": "every tensor's type is given"}
        else:
            chosen = np.array(state.best.choices, np.int64)
            report = answers.summary(state) | {"expects_tuning": self._expects_tuning}
        about = {
            "target": budget.target,
            "limit_bytes": budget.limit_bytes,
            "n_bytes": space.n_bytes(chosen),
            "smallest_bytes": space.n_bytes(space.smallest),
            "largest_bytes": space.n_bytes(space.largest),
            **report,
        }
        outputs = [write_json(allocation_path, answers.by_name(space, chosen))]
        if state is not None:
            outputs += [state_path, answers.write_trace(folder / "trace.jsonl", state)]
        return _Found(budget, chosen, outputs, about)

    def _evolve(
        self, budget: Budget, space: SearchSpace, before: Choices | None, path: Path
    ) -> SearchState:
        events, config = self._run.events, self._run.config
        if self._evaluator is None:
            judge = _evaluator(self._run, self._space, self._budgets[-1].limit_bytes)
            if self._expects_tuning:
                judge = AfterTuning(judge, self._space, self._costs)
            self._evaluator = judge
        evaluator = self._evaluator
        plan = Plan.of(self._run.profile.search_tokens, evaluator.n_sequences, evaluator.n_batch)
        position, n_budgets = self._budgets.index(budget), len(self._budgets)
        what = f"{budget.target}: " if n_budgets > 1 else ""
        kl = "expected KL" if self._expects_tuning else "KL"
        stage_folder = self._run.dir.stage_dir(NAME)

        def save(state: SearchState) -> None:
            write_json(path, state)
            best = state.best
            choices = np.array(best.choices, np.int64)
            # For whoever watches; the stage itself never reads it.
            write_json(stage_folder / "best.json", answers.by_name(space, choices))
            done = min(state.n_tokens, plan.n_tokens)
            events.progress(
                NAME,
                position * plan.n_tokens + done,
                n_budgets * plan.n_tokens,
                f"{what}generation {state.generation}: {kl} {best.kl:.4f} ± {best.stderr:.4f}",
                generation=state.generation,
                kl=best.kl,
                stderr=best.stderr,
                n_tokens=state.n_tokens,
                n_bytes=space.n_bytes(choices),
                budget=budget.target,
                expects_tuning=self._expects_tuning,
            )

        if path.exists():
            state = SearchState.from_json(read_json(path))
            events.emit(NAME, "note", f"{what}going on from generation {state.generation}")
        else:
            first = proposals(self._run, space, self._costs, self._mixes)
            if before is not None:
                first.append((spend(space, before, self._costs), "the next smaller file"))
            state = begin(evaluator, plan, first, config.seed)
            said = f"the best proposal is {state.best.origin}, {kl} {state.best.kl:.4f}"
            events.emit(NAME, "note", what + said)
            save(state)
        return evolve(space, evaluator, self._costs, plan, state, save)


def _evaluator(run: Run, space: SearchSpace, limit_bytes: int) -> Evaluator:
    """What judges candidates: this machine's CPU, or all of its GPUs."""
    import torch

    if run.config.device == "cpu":
        return _fitness(run, space, limit_bytes, "cpu")
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return Workers([_fitness(run, space, limit_bytes, device) for device in devices])


def _fitness(run: Run, space: SearchSpace, limit_bytes: int, device: str) -> Fitness:
    import torch
    from safetensors.numpy import load_file

    from quantkit.model.blockwise import compute_dtype
    from quantkit.model.row_maps import load_row_maps
    from quantkit.search.fitness import Fitness

    snapshot = fetch.load(run.dir)
    # Near 8 bits per weight 16-bit products are noisier than the files are.
    bpw = 8 * limit_bytes / max(convert.load_base(run.dir).n_elements, 1)
    dtype = torch.float32 if bpw > _FLOAT32_ABOVE_BPW else compute_dtype(device)
    model = open_model(run, NAME, snapshot.folder, dtype, device)
    maps = load_row_maps(run.dir.stage_dir("convert") / "rowmaps.safetensors")
    unmapped = [name for name in space.tensors if name not in maps]
    if unmapped:
        run.events.emit(
            NAME,
            "note",
            f"{len(unmapped)} tensors cannot be put into the model: their damage is estimated only",
        )
    ids = load_file(run.dir.stage_dir("calibrate") / "tokens.safetensors")["heldout"]
    ids = ids[:MOST_SEQUENCES]
    if len(ids) < _LEAST_SEQUENCES:
        raise QuantkitError(
            "There are too few held-out tokens to search with.",
            "Use a larger --profile or more text.",
        )
    targets = run.dir.stage_dir(NAME) / f"targets-{device.replace(':', '-')}.partial"
    return Fitness(model, space, maps, run.dir.stage_dir("quantize"), ids, targets)


def reason_not_to_tune(run: Run, base: GgufFile) -> str:
    """Why files are not tuned although that was asked for; empty where nothing is in the way."""
    if not run.config.tuning_steps:
        return ""
    from quantkit.machine.memory import free_memory

    free = free_memory(run.config.device)
    reason = lack_of_memory(tuning_bytes(run.config, base, free), free)
    if reason:
        run.events.emit(NAME, "note", f"not tuned: {reason}")
    return reason


def _tuned(
    run: Run, base: GgufFile, space: SearchSpace, found: _Found, position: int, n_budgets: int
) -> tuple[Outcome, list[Path]]:
    """Tune the file of one budget."""
    what = f"{found.budget.target}: " if n_budgets > 1 else ""

    def progress(done: int, total: int, message: str) -> None:
        run.events.progress(
            NAME, position * total + done, n_budgets * total, f"{what}tuning {message}"
        )

    path = budget_dir(run.dir, found.budget) / tuned_name(found.budget.limit_bytes)
    index = database.load(run.dir)
    chosen = {name: index.find(key) for name, key in space.keys(found.choices).items()}
    outcome, written = tune(run, base, chosen, path, progress)
    said = f"{what}tuning: KL {outcome.kl_before:.4f} -> {outcome.kl_after:.4f}"
    run.events.emit(NAME, "note", said if outcome.tensors else f"{said}: not taken")
    return outcome, written


def tune(
    run: Run, base: GgufFile, chosen: Mapping[str, Candidate], path: Path, progress: Progress
) -> tuple[Outcome, list[Path]]:
    """Tune the file of an allocation, of a run whose database stage is finished, into the level
    file `path`. Returns what `quantkit.tuning.tuned.tune_file` returns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = load_stored(chosen, run.dir.stage_dir("quantize"))
    types = {name: candidate.key.qtype for name, candidate in chosen.items()}
    layout = lay_out_output(base, types, provenance(run), "Q8_0")

    def make() -> Tuner:
        return _tuner(run, base, stored, layout)

    return tune_file(path, layout, base, stored, make, run.config.tuning_steps, progress)


def _tuner(run: Run, base: GgufFile, stored: Mapping[str, Stored], layout: Layout) -> Tuner:
    import torch

    from quantkit.machine.memory import free_memory

    gc.collect()  # the model before this one refers to itself, and would stay on the GPU
    exact = 8 * layout.n_bytes / base.n_elements > _FLOAT32_ABOVE_BPW
    folder, device = fetch.load(run.dir).folder, run.config.device
    beside = tuning_bytes_beside_model(run.config, base, free_memory(device))
    return load_tuner(
        open_model(run, NAME, folder, torch.float32, device, beside),
        run.dir.stage_dir("convert") / "rowmaps.safetensors",
        run.dir.stage_dir("calibrate") / "tokens.safetensors",
        stored,
        run.config.tuning_steps,
        run.dir.stage_dir(NAME),
        exact,
    )
