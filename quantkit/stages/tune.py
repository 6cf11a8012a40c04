"""tune: fine-tune the files of the found allocations, block by block, towards the original.

Codes, scales and whatever else a stock file leaves free move by gradient. Writes, in a folder per
budget, `tuned-<bytes>.gguf` (where tuning helped: the finished file of the allocation, which stitch
gives its name) and `outcome.json`; `tuning.json` sums up. The unit of work is a block.

The search has assumed that its files are tuned, or that they are not: this stage does as it
assumed, or stops.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.config.budgets import Budget
from quantkit.errors import QuantkitError
from quantkit.files import write_json
from quantkit.gguf_file.base import load_base
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.write import Layout
from quantkit.llamacpp.output import lay_out_labelled, load_provenance
from quantkit.planning.memory import tuning_bytes, tuning_bytes_beside_model
from quantkit.ranks.group import Ranks
from quantkit.ranks.join import Task
from quantkit.run.folder import read_as
from quantkit.run.outputs import Budgets
from quantkit.run.stage import Run, Stage, StageResult
from quantkit.search.answers import load_allocation
from quantkit.search.database import load_database
from quantkit.sources.snapshot import Place, load_quantized
from quantkit.tensors import Candidate, CandidateKey
from quantkit.tuning.tuned import (
    FLOAT32_ABOVE_BPW,
    NotTuned,
    Outcome,
    Progress,
    Tuned,
    Tunings,
    lack_of_memory,
    load_stored,
    tune_file,
)

if TYPE_CHECKING:
    from quantkit.tuning.distributed import Setting
    from quantkit.tuning.tuner import Tuner

NAME = "tune"


class Tune(Stage):
    """Fine-tune the files, block by block, to bring them closer to the original."""

    name = NAME
    version = 4
    fields = ("tuning", "profile", "device")
    takes_long = True

    def execute(self, run: Run) -> StageResult:
        """Raise QuantkitError where the search counted on tuning that is not possible now."""
        searched = read_as(Budgets, run.artifacts.budgets)
        found: dict[str, Tuned | NotTuned] = {}
        outputs: list[Path] = []
        if searched.expects_tuning:
            outputs = _tune_all(run, searched.budgets, found)
        elif searched.not_tuned:
            found |= {str(b.limit_bytes): NotTuned(searched.not_tuned) for b in searched.budgets}
        outputs.append(write_json(run.artifacts.tuning, Tunings(found)))
        return StageResult(outputs, {"budgets": found})

    @property
    def tasks(self) -> Mapping[str, Task]:
        """Return what other ranks do: their share of every block."""

        def tune(ranks: Ranks, payload: object) -> None:
            from quantkit.tuning import distributed

            distributed.tune(ranks, payload)

        return {NAME: tune}

    def is_intermediate(self, path: str) -> bool:
        """Tuned level files are dropped by `clean`."""
        return path.endswith(".gguf")

    def last_reader(self, path: str) -> str:
        """Tuned levels are stitched in; the rest stands in the report."""
        return "stitch" if self.is_intermediate(path) else "validate"


def _tune_all(
    run: Run, budgets: Sequence[Budget], found: dict[str, Tuned | NotTuned]
) -> list[Path]:
    """Tune the file of every allocation once. Fill `found` by budget; return the files."""
    base, index = load_base(run.dir), load_database(run.artifacts)
    reason = reason_not_to_tune(run, base)
    if reason:
        raise QuantkitError(
            f"The search counted on tuning, but {reason}.",
            "Free that memory and resume, or start a new run (with --tuning 0 and another --out).",
        )
    seen: list[dict[str, CandidateKey]] = []
    outputs: list[Path] = []
    for position, budget in enumerate(budgets):
        allocation = load_allocation(run.artifacts, budget.limit_bytes)
        if allocation in seen:  # the same file as for a smaller budget
            continue
        seen.append(allocation)
        what = f"{budget.target}: " if len(budgets) > 1 else ""
        chosen = {name: index.find(key) for name, key in allocation.items()}
        path = run.artifacts.tuned(budget.limit_bytes)
        progress = partial(_progress, run, position, len(budgets), what)
        outcome, files = tune(run, base, chosen, path, progress, budget.mix)
        said = f"{what}KL {outcome.kl_before:.4f} -> {outcome.kl_after:.4f}"
        run.events.emit(
            NAME, "note", said if outcome.tensors else f"{said}: the untuned file is kept"
        )
        outputs += files
        found[str(budget.limit_bytes)] = outcome.in_short
    return outputs


def _progress(
    run: Run, position: int, n_budgets: int, what: str, done: int, total: int, message: str
) -> None:
    run.events.progress(NAME, position * total + done, n_budgets * total, what + message)


def reason_not_to_tune(run: Run, base: GgufFile) -> str:
    """Return why files cannot be tuned although that was asked for; empty where nothing is in the
    way.
    """
    if not run.config.tuning_steps:
        return ""
    from quantkit.machine.memory import free_memory

    free = free_memory(run.config.device)
    return lack_of_memory(tuning_bytes(run.config, base, free), free)


def tune(
    run: Run,
    base: GgufFile,
    chosen: Mapping[str, Candidate],
    path: Path,
    progress: Progress,
    mix: str = "",
) -> tuple[Outcome, list[Path]]:
    """Tune the file of an allocation, of a run whose quantize stage is finished, into the level
    file `path`, laid out as the output that is called after the stock mix `mix`. Return what
    `tuning.tuned.tune_file` returns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = {c.file: run.artifacts.levels / c.file for c in chosen.values()}
    stored = load_stored(chosen, levels)
    types = {name: candidate.qtype for name, candidate in chosen.items()}
    layout, _ = lay_out_labelled(base, types, load_provenance(run.dir), mix)

    @contextmanager
    def tuning() -> Iterator[Tuner]:
        from quantkit.model.opening import STREAMED
        from quantkit.tuning import distributed

        gc.collect()  # the model before this one refers to itself, and would stay on the GPU
        setting = _setting(run, base, chosen, layout, path.parent)
        with distributed.tuning(run.ranks, setting, stored) as tuner:
            if tuner.is_streamed:
                run.events.emit(NAME, "note", STREAMED)
            yield tuner

    return tune_file(path, layout, base, stored, tuning, run.config.tuning_steps, progress)


def _setting(
    run: Run, base: GgufFile, chosen: Mapping[str, Candidate], layout: Layout, scratch: Path
) -> Setting:
    from quantkit.machine.memory import free_memory
    from quantkit.tuning.distributed import Setting

    config, artifacts = run.config, run.artifacts
    return Setting(
        dict(chosen),
        Place.of(load_quantized(run.dir)),
        str(artifacts.row_maps),
        str(artifacts.tokens),
        {c.file: str(artifacts.levels / c.file) for c in chosen.values()},
        str(scratch),
        config.device,
        config.tuning_steps,
        8 * layout.n_bytes / base.n_elements > FLOAT32_ABOVE_BPW,
        tuning_bytes_beside_model(config, base, free_memory(config.device)),
    )


def tuned_tensors(run: Run, limit_bytes: int) -> tuple[str, ...]:
    """Return the tensors that tuning changed in the file for one budget."""
    said = read_as(Tunings, run.artifacts.tuning).budgets.get(str(limit_bytes))
    outcome = Outcome.load(run.artifacts.tuned(limit_bytes).parent)
    # An interrupted attempt may have left one behind: the stage's own word counts.
    return outcome.tensors if outcome and isinstance(said, Tuned) and said.n_tensors else ()
