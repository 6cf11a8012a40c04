"""convert: the snapshot becomes `base.gguf` in its own 16-bit type, and every GGUF row is found in
the model.

llama.cpp's own converter does the work, sandboxed (`quantkit.converter`). Beside the file:
`tensors.json` (shapes, types, which tensors llama.cpp lets one quantize) and `rowmaps.safetensors`
(which row of which Hugging Face weight is which row here). Of a model that sees or hears also
`mmproj.gguf`, the encoder in 16 bits, which llama.cpp loads beside the language model.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.converter.architectures import tables
from quantkit.converter.convert import convert
from quantkit.errors import QuantkitError
from quantkit.ggufio.read import GgufFile
from quantkit.levels import plan_levels
from quantkit.plan import check_sizes, specs_of
from quantkit.qtypes import QuantType
from quantkit.rundir import RunDir, read_json, write_json
from quantkit.stages import StageResult, fetch, open_model
from quantkit.tensors import TensorSpec

if TYPE_CHECKING:
    from quantkit.pipeline import Run

NAME = "convert"
VERSION = 3
FIELDS: tuple[str, ...] = ()


def execute(run: Run) -> StageResult:
    """Raises QuantkitError when the converter does not know the model, or nothing of it is found
    again.
    """
    from quantkit.rowmap import RowMatcher, save_row_maps

    folder = run.dir.stage_dir(NAME)
    snapshot = fetch.load(run.dir)
    base_path = folder / "base.gguf"

    def progress(done: int, total: int) -> None:
        run.events.progress(NAME, done, max(done, total), "llama.cpp's converter writes base.gguf")

    result = convert(
        snapshot.folder,
        base_path,
        model_name=model_name(snapshot),
        left_out=snapshot.left_out,
        progress=progress,
    )
    run.events.emit(NAME, "note", f"sandbox: {result.sandbox}")
    for warning in result.warnings:
        run.events.emit(NAME, "note", f"converter: {warning}")
    base = GgufFile(base_path)
    specs = specs_of(base)
    check_sizes(run.config, base, plan_levels(specs, run.config))  # before the long work
    quantizable = {spec.name for spec in specs.values() if spec.quantizable}

    model = open_model(run, NAME, snapshot.folder)
    matcher = RowMatcher(model.model, model.weight)
    maps = {}
    for spec in specs.values():
        found = matcher.match(spec, base.packed(spec.name)) if spec.quantizable else None
        if found is not None:
            maps[spec.name] = found
    unmapped = sorted(quantizable - maps.keys())
    if not maps:
        raise QuantkitError(
            "No tensor of base.gguf was found in the model that transformers loads.",
            "This architecture is not supported yet: please open an issue with the model's id.",
        )
    rowmaps_path = folder / "rowmaps.safetensors"
    save_row_maps(maps, rowmaps_path)
    n_mapped = sum(specs[name].n_elements for name in maps)
    n_all = sum(specs[name].n_elements for name in quantizable)
    tensors = {"specs": list(specs.values()), "unmapped": unmapped, "conversion": result.to_json()}
    outputs = [base_path, write_json(folder / "tensors.json", tensors), rowmaps_path]
    projector = projector_path(run.dir)
    if _make_projector(run, snapshot, projector):
        outputs.append(projector)
    summary = {
        "n_bytes": result.n_bytes,
        "mapped_share": round(n_mapped / n_all, 4),
        "unmapped": unmapped,
    }
    return StageResult(outputs, summary)


def projector_path(directory: RunDir) -> Path:
    """Where the encoder's GGUF lies, if the model has one that could be converted."""
    return directory.stage_dir(NAME) / "mmproj.gguf"


def _make_projector(run: Run, snapshot: fetch.Snapshot, path: Path) -> bool:
    """Convert the model's encoder. What cannot be converted is said: the language model is whole
    without it.
    """
    info = snapshot.info
    if info.architectures[0] not in tables()["mmproj"]:
        return False
    try:
        convert(
            snapshot.folder, path, outtype="f16", projector=True, model_name=model_name(snapshot)
        )
    except QuantkitError as error:
        run.events.emit(NAME, "note", f"no mmproj, the result reads text only: {error.message}")
        return False
    return True


def model_name(snapshot: fetch.Snapshot) -> str:
    """What the GGUF calls the model: the Hub id, or the folder's name."""
    return snapshot.folder.name if snapshot.info.local_path else snapshot.info.id


def load_base(directory: RunDir) -> GgufFile:
    """`base.gguf` of a run whose convert stage is finished. Every stage asks for it; a header with
    100,000s of tokens is read once.
    """
    path = directory.stage_dir(NAME) / "base.gguf"
    found = path.stat() if path.exists() else None
    return _opened(path, (found.st_ino, found.st_size, found.st_mtime_ns) if found else None)


@lru_cache(maxsize=1)
def _opened(path: Path, _version: object) -> GgufFile:
    return GgufFile(path)


def load_specs(directory: RunDir) -> dict[str, TensorSpec]:
    """The tensors of `base.gguf` by name, in file order."""
    table = read_json(directory.stage_dir(NAME) / "tensors.json")["specs"]
    return {
        row["name"]: TensorSpec(
            row["name"], tuple(row["shape"]), QuantType(row["qtype"]), row["quantizable"]
        )
        for row in table
    }
