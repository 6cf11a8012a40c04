"""Make a published file again from its recipe.

From the kept level files the result is equal to the byte anywhere. From the base alone, the levels
are made again first: equal to the byte on the same machine with the same versions and threads,
elsewhere the same allocation.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from quantkit.config import RunConfig
from quantkit.errors import QuantkitError
from quantkit.ggufio.read import GgufFile
from quantkit.ggufio.stitch import stitch
from quantkit.output import Provenance, lay_out_output
from quantkit.qtypes import QuantType
from quantkit.rundir import RunDir, read_json, sha256_file


def rebuild(recipe_path: Path, base_path: Path, levels: Path | None, out: Path) -> dict[str, Any]:
    """Write the recipe's file to `out`. Returns its size, sha256 and whether it equals the
    published one.

    Raises QuantkitError when the recipe, the base or a level file is not what the recipe says.
    """
    recipe = _read(recipe_path)
    found = sha256_file(base_path)
    if found != recipe["base"]["sha256"]:
        raise QuantkitError(
            f"{base_path.name} is not the base of this recipe: its sha256 is {found[:12]}…, not"
            f" {recipe['base']['sha256'][:12]}….",
            f"Convert {recipe['model']} at revision {recipe['revision'][:12]}"
            f" with quantkit {recipe['quantkit']}.",
        )
    if levels is not None:
        for name, sha256 in recipe["levels"].items():
            path = levels / name
            if not path.exists() or sha256_file(path) != sha256:
                what = "not the level file of this recipe" if path.exists() else "missing"
                raise QuantkitError(
                    f"{path} is {what}.",
                    "Leave --levels out to make the levels again.",
                )
        return _stitch(recipe, base_path, levels, out)
    with tempfile.TemporaryDirectory(dir=out.resolve().parent) as folder:
        return _stitch(recipe, base_path, _make_levels(recipe, Path(folder)), out)


def _read(path: Path) -> dict[str, Any]:
    try:
        recipe = read_json(path)
        if recipe["schema"] != 1:
            raise QuantkitError(f"{path} is a recipe of another version.", "Use a newer quantkit.")
        return recipe
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QuantkitError(
            f"{path} is not a recipe ({error}).", "Give the recipe.json that lies beside the GGUF."
        ) from None


def _make_levels(recipe: dict[str, Any], folder: Path) -> Path:
    """Run the stages up to the levels again, at the recipe's revision and settings."""
    from quantkit import pipeline

    config = RunConfig.from_json(recipe["config"])
    pipeline.run(config, folder, until="quantize")
    return RunDir(folder).stage_dir("quantize")


def _stitch(recipe: dict[str, Any], base_path: Path, levels: Path, out: Path) -> dict[str, Any]:
    base = GgufFile(base_path)
    types = {name: QuantType(row["qtype"]) for name, row in recipe["tensors"].items()}
    provenance = Provenance(
        **{**recipe["provenance"], "datasets": tuple(recipe["provenance"]["datasets"])}
    )
    layout = lay_out_output(base, types, provenance, recipe["output"]["label"])
    stitch(
        out, layout, base, {name: levels / row["file"] for name, row in recipe["tensors"].items()}
    )
    sha256 = sha256_file(out)
    return {
        "file": str(out),
        "n_bytes": out.stat().st_size,
        "sha256": sha256,
        "equal": sha256 == recipe["output"]["sha256"],
    }
