"""search: the type of every tensor, within the budget of the whole file's bytes.

Proposes allocations from estimated damages, decides by KL to the full-precision model on held-out
text (EvoPress). Writes
`allocation.json` (tensor -> type, method), `state.json` (after every generation: a killed search
goes on from there),
`trace.jsonl` and `budget.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.ggufio.read import GgufFile
from quantkit.ggufio.write import slot_bytes
from quantkit.kquants.stock import STOCK_MIXES, StockRecipe, stock_types
from quantkit.levels import plan_levels
from quantkit.output import lay_out_output
from quantkit.plan import budget_bytes, check_budget
from quantkit.rundir import read_json, replacing, write_json
from quantkit.search.allocation import Choices, SearchSpace, choices_of, prune
from quantkit.search.evolve import Plan, SearchState, begin, evolve
from quantkit.search.propose import Costs, knapsack, spend, uniform
from quantkit.stages import StageResult, convert, database, fetch, stitch
from quantkit.tensors import to_json

if TYPE_CHECKING:
    from quantkit.pipeline import Run
    from quantkit.search.fitness import Fitness

NAME = "search"
VERSION = 2
FIELDS = ("target", "seed", "profile", "device", "types")

_FLOAT32_ABOVE_BPW = 6.5


def execute(run: Run) -> StageResult:
    """Raises QuantkitError when the budget lies outside what the levels can make."""
    folder = run.dir.stage_dir(NAME)
    folder.mkdir(parents=True, exist_ok=True)
    base = convert.load_base(run.dir)
    space = make_space(run, base)
    check_budget(space.limit_bytes, space.n_bytes(space.smallest), space.n_bytes(space.largest))
    costs = damages(space)
    outputs: list[Path] = []
    if bool((space.n_choices == 1).all()):
        state, report = None, {"searched": False, "reason": "every tensor's type is given"}
        chosen = space.smallest
    else:
        state, report = _search(run, base, space, costs, folder)
        chosen = np.array(state.best.choices, np.int64)
        outputs += [folder / "state.json", _write_trace(folder / "trace.jsonl", state)]
    keys = space.keys(chosen)
    allocation = {
        name: {"qtype": str(key.qtype), "method": key.method} for name, key in keys.items()
    }
    n_bytes = space.n_bytes(chosen)
    budget = {
        "target": str(run.config.target or "like Q4_K_M"),
        "limit_bytes": space.limit_bytes,
        "n_bytes": n_bytes,
        "smallest_bytes": space.n_bytes(space.smallest),
        "largest_bytes": space.n_bytes(space.largest),
        **report,
    }
    outputs += [
        write_json(folder / "allocation.json", allocation),
        write_json(folder / "budget.json", budget),
    ]
    return StageResult(outputs, {"n_bytes": n_bytes, "limit_bytes": space.limit_bytes, **report})


def make_space(run: Run, base: GgufFile) -> SearchSpace:
    """Every tensor's choices, the size of everything else, and the budget in bytes."""
    index = database.load(run.dir)
    tensors = tuple(index.candidates)
    candidates = tuple(prune(index.candidates[name]) for name in tensors)
    smallest = {c[0].key.tensor: c[0].key.qtype for c in candidates}
    layout = lay_out_output(base, smallest, stitch.provenance(run), "Q8_0")
    slots = tuple(tuple(slot_bytes(base, c.n_bytes) for c in of_tensor) for of_tensor in candidates)
    fixed = layout.n_bytes - sum(sizes[0] for sizes in slots)
    largest = fixed + sum(sizes[-1] for sizes in slots)
    limit = budget_bytes(run.config, base) or largest
    return SearchSpace(tensors, candidates, slots, fixed, limit)


def damages(space: SearchSpace) -> Costs:
    """Estimated nats per token of every choice. Tensors without an estimate get the median rate of
    the others.
    """
    known = [
        c.nats / c.error
        for cs in space.candidates
        for c in cs
        if c.nats is not None and c.error > 0
    ]
    rate = float(np.median(known)) if known else 1.0
    return [
        np.array([c.error * rate if c.nats is None else c.nats for c in cs])
        for cs in space.candidates
    ]


def proposals(
    run: Run, space: SearchSpace, costs: Costs, base: GgufFile
) -> list[tuple[Choices, str]]:
    """The first population: the knapsack's answer, uniform levels, and the stock mixes that can be
    built and fit.
    """
    found = [(knapsack(space, costs), "knapsack")]
    plan = plan_levels(convert.load_specs(run.dir), run.config)
    for level in plan.levels:
        choices = choices_of(space, plan.uniform(level))
        if choices is not None and space.fits(choices):
            found.append((spend(space, choices, costs), f"uniform {level}"))
    found += [(choices, "uniform step") for choices in uniform(space, costs)]
    for label in STOCK_MIXES:
        choices = choices_of(space, stock_types(base.path, StockRecipe(label)))
        if choices is not None and space.fits(choices):
            found.append((spend(space, choices, costs), f"like {label}"))
    return found


def _search(
    run: Run, base: GgufFile, space: SearchSpace, costs: Costs, folder: Path
) -> tuple[SearchState, dict[str, Any]]:
    from quantkit.search.fitness import SEQUENCES_PER_BATCH

    evaluator = _evaluator(run, space)
    plan = Plan.of(run.profile.search_tokens, evaluator.n_sequences, SEQUENCES_PER_BATCH)
    state_path = folder / "state.json"

    def save(state: SearchState) -> None:
        write_json(state_path, state)
        best = state.best
        _show_best(space, np.array(best.choices, np.int64), folder / "best.json")
        run.events.progress(
            NAME,
            min(state.n_tokens, plan.n_tokens),
            plan.n_tokens,
            f"generation {state.generation}: KL {best.kl:.4f} ± {best.stderr:.4f}",
            generation=state.generation,
            kl=best.kl,
            stderr=best.stderr,
        )

    if state_path.exists():
        state = SearchState.from_json(read_json(state_path))
        run.events.emit(NAME, "note", f"going on from generation {state.generation}")
    else:
        state = begin(evaluator, plan, proposals(run, space, costs, base), run.config.seed)
        run.events.emit(
            NAME, "note", f"the best proposal is {state.best.origin}, KL {state.best.kl:.4f}"
        )
        save(state)
    first = state.history[0]
    state = evolve(space, evaluator, costs, plan, state, save)
    report = {
        "searched": True,
        "generations": state.generation,
        "tokens": state.n_tokens,
        "proposal_kl": first[2],
        "kl": state.best.kl,
        "kl_stderr": state.best.stderr,
    }
    return state, report


def _show_best(space: SearchSpace, choices: Choices, path: Path) -> None:
    """The best allocation so far, for whoever watches; the stage itself never reads it."""
    keys = space.keys(choices)
    write_json(path, {n: {"qtype": str(k.qtype), "method": k.method} for n, k in keys.items()})


def _evaluator(run: Run, space: SearchSpace) -> Fitness:
    import torch
    from safetensors.numpy import load_file

    from quantkit.blockwise import BlockwiseModel, compute_dtype, load_model
    from quantkit.rowmap import load_row_maps
    from quantkit.search.fitness import SEQUENCES_PER_BATCH, Fitness

    snapshot = fetch.load(run.dir)
    # Near 8 bits per weight 16-bit products are noisier than the files are.
    bpw = 8 * space.limit_bytes / max(convert.load_base(run.dir).n_elements, 1)
    dtype = torch.float32 if bpw > _FLOAT32_ABOVE_BPW else compute_dtype(run.config.device)
    model = load_model(snapshot.folder, dtype, run.config.device)
    maps = load_row_maps(run.dir.stage_dir("convert") / "rowmaps.safetensors")
    unmapped = [name for name in space.tensors if name not in maps]
    if unmapped:
        run.events.emit(
            NAME,
            "note",
            f"{len(unmapped)} tensors cannot be put into the model: their damage is estimated only",
        )
    ids = load_file(run.dir.stage_dir("calibrate") / "tokens.safetensors")["heldout"]
    if len(ids) < 2 * SEQUENCES_PER_BATCH:
        raise QuantkitError(
            "There are too few held-out tokens to search with.",
            "Use a larger --profile or more text.",
        )
    targets = run.dir.stage_dir(NAME) / "targets.partial"
    return Fitness(BlockwiseModel(model), space, maps, run.dir.stage_dir("quantize"), ids, targets)


def _write_trace(path: Path, state: SearchState) -> Path:
    with replacing(path) as partial:
        names = ("generation", "tokens", "kl", "stderr")
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in to_json(state.history)]
        partial.write_text("\n".join(lines) + "\n", "utf-8")
    return path
