"""stitch: one GGUF per budget, from base.gguf's metadata and the chosen levels' bytes.

A tuned file is whole already: it gets a second name, and its bytes are not copied.
Writes `<Model>-EVO-<label>.gguf` and, for each, under `recipes/` what makes it again: the recipe,
and the types alone as `llama-quantize --tensor-type-file` reads them. The label is the stock mix
that was asked for, else that of the type which holds most weights: the Hub, llama.cpp and Ollama
read it. `outputs.json` lists the files by their budgets. Of two files the larger is never the
worse: where search and tuning left it farther from the original, the smaller one serves for both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from quantkit import __version__
from quantkit.config.budgets import Budget
from quantkit.errors import QuantkitError
from quantkit.files import link, sha256_file, write_json, write_text
from quantkit.gguf_file import cut
from quantkit.gguf_file.base import load_base
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.stitch import stitch
from quantkit.gguf_file.write import Layout
from quantkit.gptq.errors import Errors
from quantkit.llamacpp.output import file_name, lay_out_labelled, load_provenance
from quantkit.llamacpp.stock import tensor_types
from quantkit.run.folder import OutputFile, read_as, read_json
from quantkit.run.outputs import Output, Outputs, load_budgets
from quantkit.run.recipe import Base, Pinned, Provenance, Published, Recipe, Stored
from quantkit.run.stage import Run, Stage, StageResult
from quantkit.search.answers import load_allocation, load_searched
from quantkit.search.database import load_database
from quantkit.sizes import size
from quantkit.sources.snapshot import load_snapshot, model_name
from quantkit.stages.tune import tuned_tensors
from quantkit.tensors import Candidate, CandidateKey, FilePart
from quantkit.tuning.tuned import Tuned, Tunings

NAME = "stitch"
_ON_A_DEVICE = ("calibrate", "quantize", "search", "tune")  # what decides the bytes of weights


class Stitch(Stage):
    """Put the final file together."""

    name = NAME
    version = 7
    fields = ("split_bytes",)

    def execute(self, run: Run) -> StageResult:
        """Raise QuantkitError when a tensor's bytes do not have the size that its type and shape
        ask for.
        """
        folder = run.artifacts.stitched
        (folder / "recipes").mkdir(parents=True, exist_ok=True)
        base, made = load_base(run.dir), load_provenance(run.dir)
        index = load_database(run.artifacts)
        written, outputs = [], []
        kept, left_out = _kept(run)
        for budget in left_out:
            run.events.emit(NAME, "note", f"{budget.target}: {budget.refusal}")
        for budget, layout, label, name in _named(run, base, made, kept):
            allocation = load_allocation(run.artifacts, budget.limit_bytes)
            used = _stored(run, budget, {t: index.find(key) for t, key in allocation.items()})
            output = Output(name, layout.n_bytes, label, budget)
            if tuned_tensors(run, budget.limit_bytes):
                _take_tuned(run.artifacts.tuned(budget.limit_bytes), folder / name, layout)
            else:
                _stitch(run, folder / name, layout, base, used)
            recipe = _recipe(run, folder / name, used, label, made)
            stem = (folder / output.recipe).with_suffix("")
            written += [
                folder / name,
                recipe.write(folder / output.recipe),
                write_text(stem.with_suffix(".tensor-types.txt"), tensor_types(recipe.types)),
            ]
            outputs.append(output)
        made_here = Outputs(tuple(outputs), tuple(left_out))
        written.append(write_json(run.artifacts.outputs, made_here))
        return StageResult(written, {"outputs": outputs})


def _kept(run: Run) -> tuple[list[Budget], list[Budget]]:
    """The budgets that get a file, and those that a smaller one's serves as well."""
    return without_worse(
        [
            (budget, load_allocation(run.artifacts, budget.limit_bytes), _kl(run, budget))
            for budget in load_budgets(run.dir)
        ]
    )


def _kl(run: Run, budget: Budget) -> float | None:
    """The KL of a budget's file on sequences that those of all budgets have met: after tuning, or
    where none is tuned, by the search. None where no search was needed.
    """
    tuned = read_as(Tunings, run.artifacts.tuning).budgets.get(str(budget.limit_bytes))
    if isinstance(tuned, Tuned):
        return tuned.kl_after
    searched = load_searched(run.artifacts, budget.limit_bytes)
    return None if searched is None or searched.expects_tuning else searched.kl


def without_worse(
    found: Sequence[tuple[Budget, Mapping[str, CandidateKey], float | None]],
) -> tuple[list[Budget], list[Budget]]:
    """Split budgets, smallest first, into those that get a file and those that a smaller one's
    serves as well: with the same allocation, or a smaller KL(original || file) on the same
    sequences. The latter's `refusal` says so. The KL is None where a file's is not known.
    """
    kept: list[Budget] = []
    left_out: list[Budget] = []
    known: list[Mapping[str, CandidateKey]] = []
    best, of_best = math.inf, ""
    for budget, allocation, kl in found:
        if allocation in known:
            left_out.append(replace(budget, refusal="this is the same file as for a smaller size"))
        elif kl is not None and kl > best:
            reason = f"the smaller file for {of_best} is closer to the original"
            told = f"{reason} (KL {best:.5f} against {kl:.5f})"
            left_out.append(replace(budget, refusal=told))
        else:
            kept.append(budget)
            if kl is not None:
                best, of_best = kl, budget.target
        known.append(allocation)
    return kept, left_out


def _named(
    run: Run, base: GgufFile, made: Provenance, budgets: Sequence[Budget]
) -> Iterator[tuple[Budget, Layout, str, str]]:
    """The budgets with layout, label and file name. Where two files would be called after one
    label, their bits per weight are put in.
    """
    model = model_name(load_snapshot(run.dir))
    found: list[tuple[Budget, Layout, str]] = []
    for budget in budgets:
        allocation = load_allocation(run.artifacts, budget.limit_bytes)
        types = {name: key.qtype for name, key in allocation.items()}
        found.append((budget, *lay_out_labelled(base, types, made, budget.mix)))
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


def _stored(run: Run, budget: Budget, chosen: Mapping[str, Candidate]) -> dict[str, Stored]:
    """How every tensor of an allocation is stored: as tuned for its budget, where that helped."""
    tuned, file = tuned_tensors(run, budget.limit_bytes), run.artifacts.tuned(budget.limit_bytes)
    return {
        name: Stored(c.qtype, f"{c.method}+tuned", file.name)
        if name in tuned
        else Stored(c.qtype, c.method, Path(c.file).name)
        for name, c in chosen.items()
    }


def _level_files(run: Run) -> dict[str, OutputFile]:
    """The level files by name, tuned ones and base.gguf too."""
    records = (run.records[stage] for stage in ("convert", "quantize", "tune"))
    outputs = (output for record in records for output in record.outputs)
    return {Path(output.path).name: output for output in outputs}


def _stitch(
    run: Run, path: Path, layout: Layout, base: GgufFile, used: Mapping[str, Stored]
) -> None:
    files = _level_files(run)
    sources = {name: run.dir.path / files[stored.file].path for name, stored in used.items()}

    def progress(done: int, total: int) -> None:
        run.events.progress(NAME, done, total, path.name)

    stitch(path, layout, base, sources, progress)
    if path.stat().st_size != layout.n_bytes:
        raise QuantkitError(
            f"{path.name} does not have the size that was computed.",
            "This is a bug: please report it.",
        )


def _take_tuned(tuned: Path, path: Path, layout: Layout) -> None:
    """Give the tuned file the output's name: tuning laid it out as the output, and what tuning did
    not change is there as the level has it.
    """
    with tuned.open("rb") as file:
        header = file.read(len(layout.header))
    if header != layout.header or tuned.stat().st_size != layout.n_bytes:
        raise QuantkitError(
            f"{tuned.name} is not laid out as {path.name}.", "Run the tune stage again."
        )
    link(tuned, path)


def _parts(run: Run, path: Path) -> tuple[FilePart, ...]:
    """What is published of a file that is too large for the Hub; publish writes it."""
    parts = cut.cut(path, run.config.split_bytes)
    if parts:
        said = f"{path.name} will be published in {len(parts)} parts"
        run.events.emit(NAME, "note", f"{said} of at most {size(run.config.split_bytes)}")
    return tuple(FilePart(part.name, part.n_bytes, cut.sha256(path, part)) for part in parts)


def _recipe(run: Run, path: Path, used: dict[str, Stored], label: str, made: Provenance) -> Recipe:
    """Everything that makes this file again: base, calibration, levels, every tensor's choice; and
    the parts that it is published in.
    """
    info = load_snapshot(run.dir).info
    name = run.artifacts.quantized.name
    base = next(o for o in run.records["convert"].outputs if o.path.endswith(name))
    files = _level_files(run)
    return Recipe(
        __version__,
        info.id,
        info.sha,
        run.config,
        Base(base.sha256, base.n_bytes),
        Published(path.name, path.stat().st_size, sha256_file(path), label, _parts(run, path)),
        made,
        read_json(run.artifacts.calibration),
        levels={file: files[file].sha256 for file in sorted({s.file for s in used.values()})},
        tensors=used,
        fallbacks=read_as(Errors, run.artifacts.errors).fallbacks,
        adapter_of=Pinned(info.base.id, info.base.sha) if info.base else None,
        made_on={
            stage: record.made_on
            for stage, record in run.records.items()
            if stage in _ON_A_DEVICE and record.made_on is not None
        },
    )
