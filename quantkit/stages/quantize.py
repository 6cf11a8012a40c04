"""quantize: every tensor in every type it may have, each by the method that did best on held-out
inputs.

One pass over the blocks: the Hessians of a block's inputs are summed while it runs, its tensors are
solved, and the Hessians are dropped. Writes one uniform GGUF for each asked level that a file of
the sizes asked for can want, `Q4_K.gguf` and so on: whole, runnable files that differ from
`base.gguf` in their weights alone. A tensor is stored once per type, by the winner of gptq, imatrix
and rtn; `errors.json` keeps the errors of all of them, `database.json` is the index that the search
reads, and `importances/imatrix.gguf` holds the Hessians' diagonals, as llama-imatrix writes them.
The unit of work is one block: after a kill, blocks that are done are only run forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.config import RunConfig
from quantkit.config.levels import LEFT_OUT
from quantkit.files import sha256_file
from quantkit.gguf_file.base import load_base, load_specs
from quantkit.planning.plan import made_levels
from quantkit.ranks.group import Ranks
from quantkit.ranks.join import Task
from quantkit.run.stage import Run, Stage, StageResult
from quantkit.search.database import write_database


def _take_part(ranks: Ranks, payload: Any) -> None:
    from quantkit.gptq.distributed import take_part  # needs torch

    take_part(ranks, payload)


class Quantize(Stage):
    """Quantize every tensor to every type, by several methods."""

    name = "quantize"
    version = 9
    fields = ("profile", "levels", "prefer", "levels_from", "methods", "types", "tensors", "device")
    takes_long = True

    def execute(self, run: Run) -> StageResult:
        """Raise QuantkitError when activations or weights are not finite."""
        from quantkit.gptq.levels import make_levels

        base, specs = load_base(run.dir), load_specs(run.dir)
        made = made_levels(run.config, base, specs)
        if made.left_out:
            run.events.emit(self.name, "note", f"{', '.join(made.left_out)} left out: {LEFT_OUT}")
        outputs, errors = make_levels(run, made.levels)
        found = write_database(run.artifacts, errors, made.levels.kept).candidates
        winners = [won.method for types in errors.errors.values() for won in types.values()]
        summary = {
            "n_fallbacks": len(errors.fallbacks),
            "winners": Counter(winners),
            "n_candidates": sum(map(len, found.values())),
            "n_tensors": len(found),
            "levels": list(map(str, made.levels.levels)),
            "left_out": made.left_out,
        }
        return StageResult([*outputs, run.artifacts.database], summary)

    @property
    def tasks(self) -> Mapping[str, Task]:
        """Return the pass over the blocks, and what is solved beside it."""
        return {self.name: _take_part}

    def extra_inputs(self, config: RunConfig) -> dict[str, str]:
        """Return the hashes of the files of others that compete."""
        files = [path for name in config.levels_from if (path := Path(name)).is_file()]
        return {f"levels_from {path}": sha256_file(path) for path in files}

    def is_intermediate(self, path: str) -> bool:
        """Level files are dropped by `clean`; the tables stay."""
        return path.endswith(".gguf") and "/importances/" not in path

    def last_reader(self, path: str) -> str:
        """Return the importance matrix is published, the levels are compared with."""
        return "publish" if "/importances/" in path else "validate"
