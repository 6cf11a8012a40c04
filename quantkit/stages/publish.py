"""publish: everything a downloader needs in one folder, and that folder on the Hub when it was
asked for.

Stages GGUFs, imatrix, recipes, report, receipt and model card under `upload/` (hard links: no
second copy of a weight, but for files that are too large for the Hub, which are cut). Only a
validated run comes here. Without a repository the folder stays as it is, ready for `quantkit
publish`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from quantkit import hub
from quantkit.config import RunConfig
from quantkit.config.calibration import shown
from quantkit.errors import QuantkitError
from quantkit.evidence import ollama
from quantkit.evidence import receipt as receipts
from quantkit.evidence.card import BADGE, model_card
from quantkit.evidence.receipt import Receipt
from quantkit.evidence.receipt.make import complete
from quantkit.evidence.receipt.schema import Joined
from quantkit.evidence.report import read
from quantkit.evidence.report.text import without_folders
from quantkit.files import copy_whole, link, sha256_file, write_json, write_text
from quantkit.gguf_file import cut
from quantkit.hub.visibility import why_private
from quantkit.llamacpp.output import safe_name
from quantkit.run.artifacts import RELATIVE
from quantkit.run.folder import StageRecord, read_json
from quantkit.run.outputs import load_outputs
from quantkit.run.recipe import Published, Recipe
from quantkit.run.stage import Run, Stage, StageResult
from quantkit.sources.snapshot import load_snapshot, model_name

NAME = "publish"


class Publish(Stage):
    """Gather the files, and upload them if you asked for it."""

    name = NAME
    version = 4

    def execute(self, run: Run) -> StageResult:
        """Raise QuantkitError for whatever the Hub refuses."""
        folder = run.artifacts.upload
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        snapshot = load_snapshot(run.dir)
        validate = run.artifacts.report.parent
        outputs = load_outputs(run.dir).outputs
        stitched = run.artifacts.stitched
        link(run.artifacts.imatrix, folder / f"{_name(run)}-imatrix.gguf")
        link(run.artifacts.report, folder / "report.json")
        projector = run.artifacts.projector
        if projector.exists():  # by this name llama.cpp finds it in the repository
            link(projector, folder / f"mmproj-{_name(run)}-F16.gguf")
        (folder / "recipes").mkdir()
        joined: dict[str, Joined] = {}
        for output in outputs:
            made = Recipe.load(stitched / output.recipe).output
            for path in _files(run, stitched / output.file, made):
                link(path, folder / path.name)
            if made.parts:
                parts = tuple(part.name for part in made.parts)
                joined[made.file] = Joined(made.n_bytes, made.sha256, parts)
            recipe = read_json(stitched / output.recipe)
            recipe["config"] = _without_folders(recipe["config"])
            write_json(folder / output.recipe, recipe)
        for path in sorted((stitched / "recipes").glob("*.txt")):
            link(path, folder / "recipes" / path.name)
        _texts(run, folder)
        (folder / "plots").mkdir()
        for path in sorted((validate / "plots").iterdir()):
            link(path, folder / "plots" / path.name)
        with resources.as_file(resources.files("quantkit").joinpath("data", BADGE)) as badge:
            copy_whole(badge, folder / BADGE)
        sampling = ollama.params(snapshot.folder, stitched / outputs[0].file)
        if sampling:
            write_json(folder / ollama.NAME, sampling)
        receipt = receipts.to_json(_with_sums(run, folder, joined))
        write_json(folder / receipts.NAME, receipt)
        report = read(read_json(run.artifacts.report))
        card = model_card(snapshot.info, report, run.config, run.config.publish, receipt["sha256"])
        write_text(folder / "README.md", card)
        staged = sorted(path for path in folder.rglob("*") if path.is_file())
        if run.config.publish is None:
            run.events.emit(
                NAME, "note", f"not uploaded: quantkit publish {run.dir.path} <owner>/<repo>"
            )
            names = [path.relative_to(folder).as_posix() for path in staged]
            return StageResult(staged, {"published": False, "files": names})
        return _upload(run, folder, staged)

    def is_current(self, config: RunConfig, record: StageRecord) -> bool:
        """Return False if a repository is asked for: on the Hub it may be gone, or changed."""
        return config.publish is None


def _texts(run: Run, folder: Path) -> None:
    """Stage the texts that were measured on, where their licenses allow it."""
    found, _ = receipts.read(run.artifacts.receipt)
    for text in found.texts:
        if text.file is not None:
            link(run.artifacts.eval_texts / f"{text.name}.txt", folder / text.file)


def _files(run: Run, path: Path, made: Published) -> list[Path]:
    """The files that a finished one is published in: itself, or its parts, of which those that are
    there are not written again.
    """
    if not made.parts:
        return [path]
    folder = run.artifacts.parts
    parts = cut.cut(path, run.config.split_bytes)
    for i, (part, known) in enumerate(zip(parts, made.parts, strict=True)):
        target = folder / known.name
        if not target.exists() or sha256_file(target) != known.sha256:
            cut.write(path, part, target)
            if sha256_file(target) != known.sha256:
                raise QuantkitError(
                    f"{path.name} is not the file that was made: its bytes have changed.",
                    "Check the disk, and resume: the file is made again. Nothing was published.",
                )
        run.events.progress(NAME, i + 1, len(parts), f"writing {path.name} in parts")
    return [folder / part.name for part in made.parts]


def _with_sums(run: Run, folder: Path, joined: Mapping[str, Joined]) -> Receipt:
    """The receipt with the sums of all that is staged."""
    found, _ = receipts.read(run.artifacts.receipt)
    return complete(found, folder, _known(run, folder), joined)


def _without_folders(config: Mapping[str, object]) -> dict[str, object]:
    """A recipe's config that names local files without the folders they are in. Rebuilding from the
    level files does not need them.
    """

    def strip(value: object) -> object:
        if isinstance(value, list):
            return [strip(item) for item in value]
        if not isinstance(value, str):
            return value
        # A folder's name may have spaces in it, which a sentence's parts do not.
        return Path(value).name if value.startswith("/") else without_folders(value)

    stripped = {name: strip(value) for name, value in config.items()}
    return {**stripped, "calibration": shown(str(config["calibration"]))}


def _upload(run: Run, folder: Path, staged: Sequence[Path]) -> StageResult:
    assert run.config.publish is not None

    def progress(done: int, total: int) -> None:
        run.events.progress(NAME, done, total, f"uploading to {run.config.publish}")

    files = sorted(output.file for output in load_outputs(run.dir).outputs)
    message = f"{_name(run)}: {', '.join(files)}"
    why = why_private(run.config, load_snapshot(run.dir).info)
    if why and not run.config.private:
        run.events.emit(NAME, "note", f"{why}: published privately, as nothing else was asked for")
    private, token = why is not None, hub.resolve_token()
    made = hub.publish(
        folder, run.config.publish, token, private, message, progress, _known(run, folder)
    )
    if run.config.collection is not None:
        try:
            hub.add_to_collection(run.config.collection, made.repo_id, token, private)
        except QuantkitError as error:  # what was asked for first is done
            run.events.emit(NAME, "note", f"it was not added to the collection: {error}")
    about = {
        "published": True,
        "asked": run.config.publish,
        "repo": made.repo_id,
        "url": made.url,
        "private": made.private,
        "commit": made.sha,
        "files": {file.path: file.sha256 for file in made.files},
        "changed": list(made.changed),
    }
    return StageResult(staged, about)


def _known(run: Run, folder: Path) -> dict[str, str]:
    """The sha256 of what earlier stages made of what is uploaded, by its name there."""
    paths = {
        f"{_name(run)}-imatrix.gguf": str(RELATIVE.imatrix),
        f"mmproj-{_name(run)}-F16.gguf": str(RELATIVE.projector),
    }
    for stage in ("stitch", "validate"):
        for output in run.records[stage].outputs:
            name = output.path.partition("/")[2]
            is_recipe = name.startswith("recipes/") and name.endswith(".json")
            if not is_recipe and name != receipts.NAME:  # written anew here
                paths[name] = output.path
    sums = {o.path: o.sha256 for record in run.records.values() for o in record.outputs}
    known = {name: sums[path] for name, path in paths.items() if path in sums}
    for made in load_outputs(run.dir).outputs:
        recipe = Recipe.load(run.artifacts.stitched / made.recipe)
        known |= {part.name: part.sha256 for part in recipe.output.parts}
    return {name: sha256 for name, sha256 in known.items() if (folder / name).exists()}


def _name(run: Run) -> str:
    return safe_name(model_name(load_snapshot(run.dir)))
