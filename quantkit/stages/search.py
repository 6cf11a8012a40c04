"""search: the type of every tensor, within the budget of the whole file's bytes.

Proposes allocations from estimated costs, decides by KL to the full-precision model on held-out
text (EvoPress); where files are tuned afterwards, by the KL that is expected then. Several budgets
are searched one after the other, smallest first, with one evaluator; each begins with what was
found for the one before. Writes `budgets.json` (the budgets that are met, those that are refused)
and, in a folder per budget, called after its bytes, `allocation.json` (tensor -> type, method),
`trace.jsonl`, `state.json` (after every generation: a killed search goes on from there) and
`budget.json`, which sums up. What is assumed of tuning is recorded, and `tune` does as it says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.config.budgets import Budget
from quantkit.config.levels import plan_levels, wanted
from quantkit.errors import QuantkitError
from quantkit.files import write_json
from quantkit.ggml.types import STOCK_MIXES, QuantType
from quantkit.gguf_file.base import load_base, load_specs
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.write import slot_bytes
from quantkit.llamacpp.output import lay_out_output, load_provenance
from quantkit.llamacpp.stock import StockRecipe, stock_types
from quantkit.planning.plan import budgets_of, uniform_bytes
from quantkit.ranks.group import Ranks
from quantkit.ranks.join import Task
from quantkit.run.folder import read_as, read_json
from quantkit.run.outputs import Budgets
from quantkit.run.stage import Run, Stage, StageResult
from quantkit.search import answers
from quantkit.search.allocation import Choices, SearchSpace, choices_of, in_order, pruned
from quantkit.search.caps import cap_types
from quantkit.search.database import load_database
from quantkit.search.evopress import EvoPress
from quantkit.search.expected import AfterTuning, costs_after
from quantkit.search.optimizer import Evaluator, Optimizer, Problem, Step
from quantkit.search.propose import Costs, estimated_costs, knapsack, knapsacks, spend, uniform
from quantkit.sources.snapshot import Place, load_quantized
from quantkit.stages.tune import reason_not_to_tune
from quantkit.tuning.tuned import FLOAT32_ABOVE_BPW

if TYPE_CHECKING:
    from quantkit.search.distributed import Setting
    from quantkit.search.fitness import Fitness

NAME = "search"

_LEAST_SEQUENCES = 4
OPTIMIZER: Optimizer = EvoPress()


class Search(Stage):
    """Find the mix of types that changes the model least at this size."""

    name = NAME
    version = 10
    fields = ("targets", "max_types", "seed", "profile", "device", "types", "tuning")
    takes_long = True

    def execute(self, run: Run) -> StageResult:
        """Raise QuantkitError when all budgets lie outside what the levels can make."""
        base = load_base(run.dir)
        space = make_space(run, base)
        budgets, refused = budgets_of(run.config, base, *_range(run, base))
        for budget in refused:
            run.events.emit(NAME, "note", f"refused: {budget.target}: {budget.refusal}")
        _check_levels(run, base, budgets)
        asked = budgets or (Budget("what the types come to", space.limit_bytes),)
        space = _capped(run, space, asked)
        path = run.artifacts.budgets
        known = read_as(Budgets, path) if path.exists() else None
        # Free memory may be another after an interruption: the first attempt decides what counts.
        reason = known.not_tuned if known else reason_not_to_tune(run, base)
        expects = run.config.tuning_steps > 0 and not reason
        if reason:
            run.events.emit(NAME, "note", f"the files will not be tuned: {reason}")
        choices = answers.fingerprint(space)
        if known and known.choices != choices:  # levels were made anew: numbers mean others
            for left in run.artifacts.folder(NAME).glob("*/*.json"):
                left.unlink()
        outputs = [write_json(path, Budgets(asked, refused, expects, reason, choices))]
        found: list[_Found] = []
        with _Searcher(run, base, space, asked, expects) as searcher:
            for budget in asked:
                found.append(searcher.search(budget, found[-1].choices if found else None))
        for answer in found:
            about = run.artifacts.answer(answer.about.limit_bytes) / "budget.json"
            outputs += [*answer.outputs, write_json(about, answer.about)]
        summary = {"budgets": [answer.about for answer in found], "n_refused": len(refused)}
        return StageResult(outputs, summary)

    @property
    def tasks(self) -> Mapping[str, Task]:
        """Return what other ranks do: they judge candidates."""

        def judge(ranks: Ranks, payload: object) -> None:
            from quantkit.search import distributed

            distributed.judge(ranks, payload)

        return {NAME: judge}

    def last_reader(self, path: str) -> str:
        """Return validate: what was found stands in the report."""
        return "validate"


def _check_levels(run: Run, base: GgufFile, budgets: Sequence[Budget]) -> None:
    """Raise QuantkitError when levels that the sizes can want were not made."""
    uniform = uniform_bytes(base, plan_levels(load_specs(run.dir), run.config))
    limits = [budget.limit_bytes for budget in budgets]
    missing = {f"{q}.gguf" for q in wanted(uniform, limits, run.config)} - {
        Path(output.path).name for output in run.records["quantize"].outputs
    }
    if missing:
        raise QuantkitError(
            f"The levels of {run.dir.path} were made for other sizes: {min(missing)} is missing.",
            "Start a new run (with another --out).",
        )


def _range(run: Run, base: GgufFile) -> Iterator[int]:
    """The bytes of the smallest and the largest file of all asked levels, made or left out, and of
    the largest that has no tensor as the original has it.
    """
    levels, made = plan_levels(load_specs(run.dir), run.config), load_provenance(run.dir)
    for types in (levels.smallest, levels.largest, levels.largest_made):
        yield lay_out_output(base, types, made, "Q8_0").n_bytes


def make_space(run: Run, base: GgufFile) -> SearchSpace:
    """Return the space of every tensor's choices, also those that others beat, and the size of
    everything else; its budget is the largest file.
    """
    index = load_database(run.artifacts)
    tensors = tuple(index.candidates)
    candidates = tuple(in_order(index.candidates[name]) for name in tensors)
    smallest = {c[0].tensor: c[0].qtype for c in candidates}
    layout = lay_out_output(base, smallest, load_provenance(run.dir), "Q8_0")
    slots = tuple(tuple(slot_bytes(base, c.n_bytes) for c in of_tensor) for of_tensor in candidates)
    fixed = layout.n_bytes - sum(sizes[0] for sizes in slots)
    largest = fixed + sum(sizes[-1] for sizes in slots)
    return SearchSpace(tensors, candidates, slots, fixed, largest)


def _capped(run: Run, space: SearchSpace, budgets: Sequence[Budget]) -> SearchSpace:
    """The space of choices that none beats, of at most as many types as were asked for."""
    n_types = run.config.max_types
    if n_types is None:
        return pruned(space)
    capped = cap_types(space, estimated_costs, [b.limit_bytes for b in budgets], n_types)
    if capped is None:
        raise QuantkitError(
            f"No {n_types} of the types can meet every size.",
            "Allow more with --max-types, or pin fewer tensors.",
        )
    used = sorted({c.qtype for of_tensor in capped.candidates for c in of_tensor})
    run.events.emit(NAME, "note", f"the types are {', '.join(map(str, used))}")
    return capped


def proposals(
    run: Run,
    space: SearchSpace,
    costs: Costs,
    mixes: Mapping[str, Mapping[str, QuantType]],
) -> list[tuple[Choices, str]]:
    """Return the first population: the knapsack's answers, uniform levels, and those of the stock
    `mixes` (types of tensors by label) that can be built and fit.
    """
    found = [(knapsack(space, costs), "knapsack")]
    found += [(choices, "knapsack") for choices in knapsacks(space, costs)]
    plan = plan_levels(load_specs(run.dir), run.config)
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

    choices: Choices
    outputs: list[Path]
    about: answers.Given | answers.Searched


class _Searcher:
    """Searches one budget after the other. The model and its targets are made once, when the first
    search needs them, on every rank.
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
        costs = estimated_costs(space)
        self._costs = costs_after(space, costs) if expects_tuning else costs
        self._budgets = budgets
        self._evaluator: Evaluator | None = None
        self._tasks = ExitStack()

    def __enter__(self) -> _Searcher:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._tasks.__exit__(*raised)

    @cached_property
    def _mixes(self) -> dict[str, dict[str, QuantType]]:
        """What llama.cpp would make of the model: asked once for all budgets."""
        return {label: stock_types(self._base.path, StockRecipe(label)) for label in STOCK_MIXES}

    def search(self, budget: Budget, before: Choices | None) -> _Found:
        """Find the best allocation within a budget; `before` is the answer for the next smaller
        one.
        """
        folder = self._run.artifacts.answer(budget.limit_bytes)
        folder.mkdir(parents=True, exist_ok=True)
        space = replace(self._space, limit_bytes=budget.limit_bytes)
        allocation_path, state_path = folder / "allocation.json", folder / "state.json"
        step: Step | None = None
        if not bool((space.n_choices == 1).all()):
            if allocation_path.exists() and state_path.exists():  # found before an interruption
                step = OPTIMIZER.step_of(read_json(state_path))
            else:
                step = self._optimize(budget, space, before, state_path)
        chosen = space.smallest if step is None else np.array(step.choices, np.int64)
        about = answers.answer(budget, space, chosen, step, self._expects_tuning)
        outputs = [write_json(allocation_path, answers.by_name(space, chosen))]
        if step is not None:
            outputs += [state_path, answers.write_trace(folder / "trace.jsonl", step)]
        return _Found(chosen, outputs, about)

    def _make_evaluator(self) -> Evaluator:
        from quantkit.search.distributed import distributed

        setting = _setting(self._run, self._space, self._budgets[-1].limit_bytes)
        judged = distributed(self._run.ranks, setting)
        evaluator, fitness = self._tasks.enter_context(judged)
        _tell(self._run, fitness)
        if self._expects_tuning:
            return AfterTuning(evaluator, self._space, self._costs)
        return evaluator

    def _optimize(
        self, budget: Budget, space: SearchSpace, before: Choices | None, path: Path
    ) -> Step:
        events, n_tokens = self._run.events, self._run.profile.search_tokens
        if self._evaluator is None:
            self._evaluator = self._make_evaluator()
        position, n_budgets = self._budgets.index(budget), len(self._budgets)
        what = f"{budget.target}: " if n_budgets > 1 else ""
        kl = "expected KL" if self._expects_tuning else "KL"
        state = read_json(path) if path.exists() else None

        def propose() -> list[tuple[Choices, str]]:
            first = proposals(self._run, space, self._costs, self._mixes)
            if before is not None:
                first.append((spend(space, before, self._costs), "the next smaller file"))
            return first

        def save(step: Step) -> None:
            if state is None and len(step.trace) == 1:
                said = f"the best proposal is {step.origin}, {kl} {step.kl:.4f}"
                events.emit(NAME, "note", what + said)
            write_json(path, step.state)
            choices = np.array(step.choices, np.int64)
            # For whoever watches; the stage itself never reads it.
            write_json(self._run.artifacts.best, answers.by_name(space, choices))
            events.progress(
                NAME,
                position * n_tokens + min(step.n_tokens, n_tokens),
                n_budgets * n_tokens,
                f"{what}{OPTIMIZER.unit} {step.number}: {kl} {step.kl:.4f} ± {step.stderr:.4f}",
                generation=step.number,
                kl=step.kl,
                stderr=step.stderr,
                n_tokens=step.n_tokens,
                n_bytes=space.n_bytes(choices),
                budget=budget.target,
                expects_tuning=self._expects_tuning,
            )

        if state is not None:
            number = OPTIMIZER.step_of(state).number
            events.emit(NAME, "note", f"{what}continuing from {OPTIMIZER.unit} {number}")
        seed = self._run.config.seed
        problem = Problem(space, self._evaluator, self._costs, propose, n_tokens, seed)
        return OPTIMIZER.run(problem, state, save)


def _setting(run: Run, space: SearchSpace, limit_bytes: int) -> Setting:
    """What candidates are judged with, on every rank. Raises QuantkitError for too few tokens."""
    from safetensors.numpy import load_file

    from quantkit.model.blockwise import compute_dtype
    from quantkit.search.distributed import Setting

    artifacts = run.artifacts
    if len(load_file(artifacts.tokens)["heldout"]) < _LEAST_SEQUENCES:
        raise QuantkitError(
            "There are too few held-out tokens to search with.",
            "Use a larger --profile or more text.",
        )
    bpw = 8 * limit_bytes / max(load_base(run.dir).n_elements, 1)
    exact = bpw > FLOAT32_ABOVE_BPW or compute_dtype(run.config.device).itemsize > 2
    levels = sorted({c.file for of_tensor in space.candidates for c in of_tensor})
    return Setting(
        space,
        Place.of(load_quantized(run.dir)),
        str(artifacts.row_maps),
        str(artifacts.tokens),
        {name: str(artifacts.levels / name) for name in levels},
        str(artifacts.folder(NAME)),
        run.config.device,
        "float32" if exact else "bfloat16",
    )


def _tell(run: Run, fitness: Fitness) -> None:
    """Say what of the model the evaluator cannot hold or exchange."""
    from quantkit.model.opening import STREAMED

    if fitness.is_streamed:
        run.events.emit(NAME, "note", STREAMED)
    if fitness.n_unmapped:
        text = "tensors are not in the model: the damage to them is only estimated"
        run.events.emit(NAME, "note", f"{fitness.n_unmapped} {text}")
