"""stitch: one GGUF per budget, from base.gguf's metadata and the chosen levels' bytes.

Writes `<Model>-EVO-<label>.gguf` and, for each, under `recipes/` what makes it again: the recipe,
and the types alone as `llama-quantize --tensor-type-file` reads them. The
label is the stock mix that is nearest in size, so that the Hub, llama.cpp and Ollama know what to
do with the file. `outputs.json` lists the files by their budgets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import __version__
from quantkit.config.budgets import Budget
from quantkit.errors import QuantkitError
from quantkit.files import sha256_file, write_json, write_text
from quantkit.ggml.types import QuantType
from quantkit.gguf_file.base import load_base
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.stitch import stitch
from quantkit.gguf_file.write import Layout
from quantkit.llamacpp.output import (
    Provenance,
    file_name,
    lay_out_output,
    load_provenance,
    nearest_label,
)
from quantkit.llamacpp.stock import tensor_types
from quantkit.run.folder import read_json
from quantkit.run.outputs import Output, load_budgets
from quantkit.run.stage import Run, Stage, StageResult
from quantkit.search.answers import load_allocation
from quantkit.search.database import load_database
from quantkit.sources.snapshot import load_snapshot, model_name
from quantkit.stages.tune import load_tuned
from quantkit.tensors import Candidate, CandidateKey, to_json

NAME = "stitch"


@dataclass(frozen=True)
class Source:
    """Where a tensor's bytes lie: a level file, or the tuned file of its budget."""

    qtype: QuantType
    method: str
    path: Path


class Stitch(Stage):
    """Put the final file together."""

    name = NAME
    version = 4

    def execute(self, run: Run) -> StageResult:
        """Raise QuantkitError when a tensor's bytes do not have the size that its type and shape
        ask for.
        """
        folder = run.artifacts.stitched
        (folder / "recipes").mkdir(parents=True, exist_ok=True)
        base, made = load_base(run.dir), load_provenance(run.dir)
        index = load_database(run.artifacts)
        written, outputs = [], []
        for budget, layout, label, name in _named(run, base, made):
            allocation = load_allocation(run.artifacts, budget.limit_bytes)
            used = _sources(run, budget, {t: index.find(key) for t, key in allocation.items()})
            output = Output(name, layout.n_bytes, label, budget)
            _stitch(run, folder / name, layout, base, used)
            recipe = _recipe(run, folder / name, used, label, made)
            stem = (folder / output.recipe).with_suffix("")
            written += [
                folder / name,
                write_json(folder / output.recipe, recipe),
                write_text(stem.with_suffix(".tensor-types.txt"), tensor_types(recipe)),
            ]
            outputs.append(output)
        written.append(write_json(run.artifacts.outputs, {"outputs": outputs}))
        return StageResult(written, {"outputs": outputs})


def _named(run: Run, base: GgufFile, made: Provenance) -> Iterator[tuple[Budget, Layout, str, str]]:
    """The budgets with layout, label and file name. Where two files would be called after one
    label, their bits per weight are put in; an allocation that was found for a smaller budget,
    too, is left out.
    """
    model = model_name(load_snapshot(run.dir))
    found: list[tuple[Budget, Layout, str]] = []
    known: list[dict[str, CandidateKey]] = []
    for budget in load_budgets(run.dir):
        allocation = load_allocation(run.artifacts, budget.limit_bytes)
        if allocation in known:
            text = f"{budget.target}: this is the same file as for a smaller size"
            run.events.emit(NAME, "note", text)
            continue
        known.append(allocation)
        types = {name: key.qtype for name, key in allocation.items()}
        layout = lay_out_output(base, types, made, "Q8_0")  # the label does not change its size
        matrices = [layout.types[t.name] for t in base.tensors.values() if len(t.shape) > 1]
        label = nearest_label(base, layout.n_bytes, matrices)
        found.append((budget, lay_out_output(base, types, made, label), label))
    labels = [label for _, _, label in found]
    bpws = [8 * layout.n_bytes / base.n_elements for _, layout, _ in found]
    for decimals in range(2, 17):  # as many as tell all of them apart
        names = [
            file_name(model, label, bpw if labels.count(label) > 1 else None, decimals)
            for label, bpw in zip(labels, bpws, strict=True)
        ]
        if len(set(names)) == len(names):
            break
    for (budget, layout, label), name in zip(found, names, strict=True):
        yield budget, layout, label, name


def _sources(run: Run, budget: Budget, chosen: Mapping[str, Candidate]) -> dict[str, Source]:
    """The source of every tensor of an allocation."""
    levels = run.artifacts.levels
    tuned = load_tuned(run, budget.limit_bytes)
    found = {}
    for name, candidate in chosen.items():
        key = candidate.key
        found[name] = Source(key.qtype, key.method, levels / candidate.file)
        if tuned is not None and name in tuned[1]:
            found[name] = Source(key.qtype, f"{key.method}+tuned", tuned[0])
    return found


def _stitch(
    run: Run, path: Path, layout: Layout, base: GgufFile, used: Mapping[str, Source]
) -> None:
    def progress(done: int, total: int) -> None:
        run.events.progress(NAME, done, total, path.name)

    stitch(path, layout, base, {name: source.path for name, source in used.items()}, progress)
    if path.stat().st_size != layout.n_bytes:
        raise QuantkitError(
            f"{path.name} does not have the size that was computed.",
            "This is a bug: please report it.",
        )


def _recipe(
    run: Run, path: Path, used: Mapping[str, Source], label: str, made: Provenance
) -> dict[str, Any]:
    """Everything that makes this file again: base, calibration, levels, every tensor's choice."""
    info = load_snapshot(run.dir).info
    base = run.records["convert"].outputs[0]
    onto = info.base and {"model": info.base.id, "revision": info.base.sha}
    outputs = [*run.records["quantize"].outputs, *run.records["tune"].outputs]
    known = {run.dir.path / o.path: o.sha256 for o in outputs}
    return {
        "schema": 1,
        "quantkit": __version__,
        "model": info.id,
        "revision": info.sha,
        **({"adapter_of": onto} if onto else {}),
        "config": run.config,
        "base": {"sha256": base.sha256, "n_bytes": base.n_bytes},
        "output": {
            "file": path.name,
            "n_bytes": path.stat().st_size,
            "sha256": sha256_file(path),
            "label": label,
        },
        "provenance": made,
        "calibration": read_json(run.artifacts.calibration),
        "levels": {path.name: known[path] for path in sorted({s.path for s in used.values()})},
        "tensors": {
            name: {"qtype": str(s.qtype), "method": s.method, "file": s.path.name}
            for name, s in used.items()
        },
        "fallbacks": to_json(read_json(run.artifacts.errors)["fallbacks"]),
    }
