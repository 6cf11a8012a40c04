"""stitch: one GGUF from base.gguf's metadata and the chosen levels' bytes.

Writes `<Model>-EVO-<label>.gguf` and `recipe.json`, which rebuilds it. The label is the stock mix
that is nearest in size, so that the Hub, llama.cpp and Ollama know what to do with the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import __version__
from quantkit.errors import QuantkitError
from quantkit.ggufio.stitch import stitch
from quantkit.output import Provenance, file_name, lay_out_output, nearest_label
from quantkit.qtypes import QuantType
from quantkit.rundir import read_json, sha256_file, write_json
from quantkit.stages import StageResult, convert, database, fetch
from quantkit.tensors import Candidate, CandidateKey, to_json

if TYPE_CHECKING:
    from quantkit.pipeline import Run

NAME = "stitch"
VERSION = 2
FIELDS: tuple[str, ...] = ()


def execute(run: Run) -> StageResult:
    """Raises QuantkitError when a tensor's bytes do not have the size that its type and shape ask
    for.
    """
    folder = run.dir.stage_dir(NAME)
    base = convert.load_base(run.dir)
    allocation = load_allocation(run)
    index = database.load(run.dir)
    types = {name: key.qtype for name, key in allocation.items()}
    made = provenance(run)
    layout = lay_out_output(base, types, made, "Q8_0")  # the label does not change its size
    matrices = [layout.types[t.name] for t in base.tensors.values() if len(t.shape) > 1]
    label = nearest_label(base, layout.n_bytes, matrices)
    layout = lay_out_output(base, types, made, label)
    path = folder / file_name(convert.model_name(fetch.load(run.dir)), label)
    used = {name: index.find(key) for name, key in allocation.items()}
    levels = run.dir.stage_dir("quantize")

    def progress(done: int, total: int) -> None:
        run.events.progress(NAME, done, total, path.name)

    stitch(path, layout, base, {name: levels / c.file for name, c in used.items()}, progress)
    if path.stat().st_size != layout.n_bytes:
        raise QuantkitError(
            f"{path.name} has another size than was computed.", "This is a bug: please report it."
        )
    recipe = _recipe(run, path, used, label, made)
    outputs = [path, write_json(folder / "recipe.json", recipe)]
    return StageResult(outputs, {"file": path.name, "n_bytes": layout.n_bytes, "label": label})


def provenance(run: Run) -> Provenance:
    """What the stages so far put into the output's metadata."""
    record = read_json(run.dir.stage_dir("calibrate") / "calibration.json")
    return Provenance(
        fetch.load(run.dir).info.sha,
        tuple(d["name"] for d in record["domains"]),
        record["n_imatrix_entries"],
        record["n_tokens"]["train"] // record["n_ctx"],
    )


def load_allocation(run: Run) -> dict[str, CandidateKey]:
    """The allocation of a run whose search stage is finished."""
    table = read_json(run.dir.stage_dir("search") / "allocation.json")
    return {
        name: CandidateKey(name, QuantType(row["qtype"]), row["method"])
        for name, row in table.items()
    }


def _recipe(
    run: Run, path: Path, used: Mapping[str, Candidate], label: str, made: Provenance
) -> dict[str, Any]:
    """Everything that makes this file again: base, calibration, levels, every tensor's choice."""
    info = fetch.load(run.dir).info
    levels = run.dir.stage_dir("quantize")
    base = run.records["convert"].outputs[0]
    return {
        "schema": 1,
        "quantkit": __version__,
        "model": info.id,
        "revision": info.sha,
        "config": run.config,
        "base": {"sha256": base.sha256, "n_bytes": base.n_bytes},
        "output": {
            "file": path.name,
            "n_bytes": path.stat().st_size,
            "sha256": sha256_file(path),
            "label": label,
        },
        "provenance": made,
        "calibration": read_json(run.dir.stage_dir("calibrate") / "calibration.json"),
        "levels": {
            file: sha256_file(levels / file) for file in sorted({c.file for c in used.values()})
        },
        "tensors": {
            name: {"qtype": str(c.key.qtype), "method": c.key.method, "file": c.file}
            for name, c in used.items()
        },
        "fallbacks": to_json(read_json(levels / "errors.json")["fallbacks"]),
    }
