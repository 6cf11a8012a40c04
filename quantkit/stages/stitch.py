"""stitch: one GGUF per budget, from base.gguf's metadata and the chosen levels' bytes.

Writes `<Model>-EVO-<label>.gguf` and, for each, under `recipes/` what makes it again: the recipe,
and the types alone as `llama-quantize --tensor-type-file` and the EvoPress toolkit read them. The
label is the stock mix that is nearest in size, so that the Hub, llama.cpp and Ollama know what to
do with the file. `outputs.json` lists the files by their budgets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import __version__
from quantkit.errors import QuantkitError
from quantkit.files import sha256_file, write_json, write_text
from quantkit.ggml.types import QuantType
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.stitch import stitch
from quantkit.gguf_file.write import Layout
from quantkit.llamacpp import exports
from quantkit.llamacpp.output import Provenance, file_name, lay_out_output, nearest_label
from quantkit.planning.budgets import Budget
from quantkit.run.folder import RunDir, read_json
from quantkit.run.stage import StageResult
from quantkit.stages import convert, database, fetch, search
from quantkit.tensors import Candidate, CandidateKey, to_json

if TYPE_CHECKING:
    from quantkit.run.stage import Run

NAME = "stitch"
VERSION = 4
FIELDS: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Where a tensor's bytes lie: a level file, or the tuned file of its budget."""

    qtype: QuantType
    method: str
    path: Path


@dataclass(frozen=True)
class Output:
    """One finished file: its name in the stage's folder, its label and its budget."""

    file: str
    n_bytes: int
    label: str
    budget: Budget

    @property
    def recipe(self) -> str:
        return f"recipes/{self.file.removesuffix('.gguf')}.json"


def execute(run: Run) -> StageResult:
    """Raises QuantkitError when a tensor's bytes do not have the size that its type and shape ask
    for.
    """
    folder = run.dir.stage_dir(NAME)
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    base, made = convert.load_base(run.dir), search.provenance(run)
    index = database.load(run.dir)
    written, outputs = [], []
    for budget, layout, label, name in _named(run, base, made):
        allocation = search.load_allocation(run.dir, budget)
        used = _sources(run, budget, {t: index.find(key) for t, key in allocation.items()})
        output = Output(name, layout.n_bytes, label, budget)
        _stitch(run, folder / name, layout, base, used)
        recipe = _recipe(run, folder / name, used, label, made)
        stem = (folder / output.recipe).with_suffix("")
        written += [
            folder / name,
            write_json(folder / output.recipe, recipe),
            write_text(stem.with_suffix(".tensor-types.txt"), exports.tensor_types(recipe)),
            write_text(stem.with_suffix(".toolkit.txt"), exports.toolkit(recipe)),
        ]
        outputs.append(output)
    written.append(write_json(folder / "outputs.json", {"outputs": outputs}))
    return StageResult(written, {"outputs": outputs})


def load_outputs(directory: RunDir) -> list[Output]:
    """The files of a run whose stitch stage is finished, by rising budget."""
    table = read_json(directory.stage_dir(NAME) / "outputs.json")["outputs"]
    return [Output(**{**row, "budget": Budget(**row["budget"])}) for row in table]


def _named(run: Run, base: GgufFile, made: Provenance) -> Iterator[tuple[Budget, Layout, str, str]]:
    """The budgets with layout, label and file name. Where two files would be called after one
    label, their bits per weight are put in; an allocation that was found for a smaller budget,
    too, is left out.
    """
    model = convert.model_name(fetch.load(run.dir))
    found: list[tuple[Budget, Layout, str]] = []
    known: list[dict[str, CandidateKey]] = []
    for budget in search.load_budgets(run.dir):
        allocation = search.load_allocation(run.dir, budget)
        if allocation in known:
            text = f"{budget.target}: the same file as for a smaller size"
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
    levels = run.dir.stage_dir("quantize")
    tuned = search.load_tuned(run.dir, budget)
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
            f"{path.name} has another size than was computed.", "This is a bug: please report it."
        )


def _recipe(
    run: Run, path: Path, used: Mapping[str, Source], label: str, made: Provenance
) -> dict[str, Any]:
    """Everything that makes this file again: base, calibration, levels, every tensor's choice."""
    info = fetch.load(run.dir).info
    levels = run.dir.stage_dir("quantize")
    base = run.records["convert"].outputs[0]
    onto = info.base and {"model": info.base.id, "revision": info.base.sha}
    outputs = [*run.records["quantize"].outputs, *run.records["search"].outputs]
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
        "calibration": read_json(run.dir.stage_dir("calibrate") / "calibration.json"),
        "levels": {path.name: known[path] for path in sorted({s.path for s in used.values()})},
        "tensors": {
            name: {"qtype": str(s.qtype), "method": s.method, "file": s.path.name}
            for name, s in used.items()
        },
        "fallbacks": to_json(read_json(levels / "errors.json")["fallbacks"]),
    }
