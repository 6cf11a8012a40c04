"""Make a published file again from its recipe.

From the kept level files the result is equal to the byte anywhere. From the base alone, the levels
are made again first, and of a tuned file its tuning: equal to the byte on the same machine with the
same versions and threads, elsewhere the same allocation. Nothing is searched again.
"""

from __future__ import annotations

import dataclasses
import glob
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantkit import hub
from quantkit.config import RunConfig
from quantkit.errors import QuantkitError
from quantkit.files import sha256_file
from quantkit.gguf_file.base import load_base
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.stitch import stitch
from quantkit.llamacpp.output import lay_out_output
from quantkit.machine.kind import device_kind
from quantkit.run.artifacts import RELATIVE
from quantkit.run.events import EventLog
from quantkit.run.folder import MadeOn, RunDir
from quantkit.run.recipe import Recipe
from quantkit.run.stage import Run
from quantkit.search.database import load_database
from quantkit.tuning.tuned import is_tuned


@dataclass(frozen=True)
class Rebuilt:
    """A file that was made again; `equal`: to the published one. Else `reason` says why not, where
    that is known.
    """

    file: str
    n_bytes: int
    sha256: str
    equal: bool
    reason: str = ""


def rebuild(recipe_path: Path, base_path: Path, levels: Path | None, out: Path) -> Rebuilt:
    """Write the recipe's file to `out`.

    Raises QuantkitError when the recipe, the base or a level file is not what the recipe says, and
    when `out` is one of them.
    """
    recipe = Recipe.load(recipe_path)
    kept = {} if levels is None else _kept(recipe, levels, base_path)
    if out.resolve() in {path.resolve() for path in (recipe_path, base_path, *kept.values())}:
        raise QuantkitError(f"{out} is one of the inputs.", "Choose another --out.")
    base = GgufFile(base_path)
    _check_base(recipe, base)
    if levels is None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.resolve().parent) as folder:
            made = _stitch(recipe, base, _make_levels(recipe, Path(folder), base_path), out)
            return made if made.equal else dataclasses.replace(made, reason=_reason(recipe))
    for name, sha256 in recipe.levels.items():
        path = kept[name]
        if path == base_path:
            continue  # is known to be the recipe's
        if not path.exists() or sha256_file(path) != sha256:
            what = "not the level file of this recipe" if path.exists() else "missing"
            raise QuantkitError(
                f"{path} is {what}.",
                "Leave --levels out to make the levels again.",
            )
    return _stitch(recipe, base, kept, out)


def _reason(recipe: Recipe) -> str:
    """Why levels that were made again may have other bytes; nothing if they were made alike."""
    here = MadeOn(1, device_kind(recipe.config.device))
    there = next((made for made in recipe.made_on.values() if made != here), None)
    if there is None:
        return ""
    return (
        f"The published file was made on {there}, this one on {here}: sums are rounded otherwise,"
        " and the file is as good, but not equal to the byte."
    )


def _kept(recipe: Recipe, levels: Path, base: Path) -> dict[str, Path]:
    """The level files by name: in the folder or, as a tuned one in that of a run, below it."""
    found = {}
    for name in recipe.levels:
        if name in (RELATIVE.base.name, RELATIVE.equalized_base.name):
            found[name] = base
            continue
        found[name] = levels / name
        if not found[name].exists():
            found[name] = next(levels.rglob(glob.escape(name)), found[name])
    return found


def _check_base(recipe: Recipe, base: GgufFile) -> None:
    """Raises QuantkitError when `base` is another file than the recipe's, or lacks its tensors."""
    found = sha256_file(base.path)
    if found != recipe.base.sha256:
        raise QuantkitError(
            f"{base.path.name} is not the base of this recipe: its sha256 is {found[:12]}…, not"
            f" {recipe.base.sha256[:12]}….",
            f"Convert {recipe.model} at revision {recipe.revision[:12]}"
            f" with quantkit {recipe.quantkit}.",
        )
    for name, qtype in recipe.types.items():
        if name not in base.tensors or not qtype.fits(base.tensors[name].shape[-1]):
            raise QuantkitError(
                f"The recipe stores {name} as {qtype}, which the base does not allow.",
                "The recipe is damaged: download it again.",
            )


def _pinned(recipe: Recipe) -> RunConfig:
    """The config that makes the levels again: of a model on the Hub the very commit, and nothing
    published.
    """
    config = dataclasses.replace(recipe.config, publish=None, private=False)
    reference = hub.parse_reference(config.model, config.revision)
    if not reference.is_on_hub:
        return config
    return dataclasses.replace(config, model=reference.id, revision=recipe.revision)


def _make_levels(recipe: Recipe, folder: Path, base: Path) -> dict[str, Path]:
    """Run the stages up to the levels again, at the recipe's revision and settings; a tuned file is
    the recipe's allocation, tuned again.
    """
    from quantkit import pipeline

    config, tuned = _pinned(recipe), [name for name in recipe.levels if is_tuned(name)]
    pipeline.run(config, folder, until="quantize")
    run = Run(config, RunDir(folder), EventLog(RunDir(folder).events_path))
    for name in tuned:
        _tune(recipe, run, folder / name)
    return _kept(recipe, folder, base)


def _tune(recipe: Recipe, run: Run, path: Path) -> None:
    """Make the tuned level file: every tensor of the type that the recipe says."""
    from quantkit.stages import tune

    base, index = load_base(run.dir), load_database(run.artifacts)
    reason = tune.reason_not_to_tune(run, base)
    if reason:
        raise QuantkitError(
            f"The file is tuned, which is not possible here: {reason}.",
            "Use a machine with more memory, or --levels.",
        )
    types, rows = recipe.types, recipe.tensors
    chosen = {
        c.tensor: c
        for candidates in index.candidates.values()
        for c in candidates
        # Of a tensor that tuning changed, the recipe does not say what it was changed from.
        if c.qtype == types[c.tensor] and rows[c.tensor].file in (Path(c.file).name, path.name)
    }

    def progress(done: int, total: int, message: str) -> None:
        run.events.progress(tune.NAME, done, total, message)

    outcome, _ = tune.tune(run, base, chosen, path, progress, recipe.output.label)
    if not outcome.tensors:
        raise QuantkitError(
            "Tuning the file again did not bring it nearer to the original on this machine.",
            "Give the tuned file that was kept with --levels.",
        )


def _stitch(recipe: Recipe, base: GgufFile, levels: Mapping[str, Path], out: Path) -> Rebuilt:
    layout = lay_out_output(base, recipe.types, recipe.provenance, recipe.output.label)
    stitch(out, layout, base, {name: levels[t.file] for name, t in recipe.tensors.items()})
    sha256 = sha256_file(out)
    return Rebuilt(str(out), out.stat().st_size, sha256, sha256 == recipe.output.sha256)
