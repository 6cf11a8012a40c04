"""Lay out the output file before its weights: its metadata, its name and its exact size."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from quantkit import __version__
from quantkit.ggml.types import FILE_TYPES, STOCK_MIXES, QuantType
from quantkit.gguf_file.fields import Field
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.write import Layout, lay_out
from quantkit.llamacpp.stock import StockRecipe, stock_bytes
from quantkit.run.folder import RunDir, read_json
from quantkit.run.recipe import Provenance
from quantkit.sources.snapshot import load_snapshot


def load_provenance(directory: RunDir) -> Provenance:
    """Return what the stages up to quantize put into the metadata of a run's outputs."""
    record = read_json(directory.artifacts.calibration)
    imatrix = GgufFile(directory.artifacts.imatrix)
    return Provenance(
        load_snapshot(directory).info.sha,
        tuple(d["name"] for d in record["domains"]),
        sum(name.endswith(".in_sum2") for name in imatrix.tensors),
        record["n_tokens"]["train"] // record["n_ctx"],
    )


def lay_out_output(
    base: GgufFile, types: Mapping[str, QuantType], provenance: Provenance, label: str
) -> Layout:
    """Lay out the output: base.gguf's metadata whole, a new file type, and the provenance."""
    fields = [
        Field.uint32("general.file_type", FILE_TYPES[label]),
        Field.uint32("general.quantization_version", 2),
        Field.string("quantize.imatrix.file", "imatrix.gguf"),
        Field.string("quantize.imatrix.dataset", ", ".join(provenance.datasets)),
        Field.uint32("quantize.imatrix.entries_count", provenance.n_imatrix_entries),
        Field.uint32("quantize.imatrix.chunks_count", provenance.n_imatrix_chunks),
        Field.string("quantkit.version", __version__),
        Field.string("quantkit.base.revision", provenance.revision),
    ]
    return lay_out(base, types, fields)


def lay_out_nearest(
    base: GgufFile, types: Mapping[str, QuantType], provenance: Provenance
) -> tuple[Layout, str]:
    """Lay out the output under the label of the stock mix that is nearest in size; return both."""
    layout = lay_out_output(base, types, provenance, "Q8_0")  # the label does not change its size
    matrices = [layout.types[t.name] for t in base.tensors.values() if len(t.shape) > 1]
    label = nearest_label(base, layout.n_bytes, matrices)
    return lay_out_output(base, types, provenance, label), label


def nearest_label(base: GgufFile, n_bytes: int, types: Iterable[QuantType] = ()) -> str:
    """Return the stock mix whose file is nearest in size to `n_bytes`, among those that a file with
    these `types` can be named after.
    """
    sizes = {label: stock_bytes(base, StockRecipe(label)) for label in _labels(set(types))}
    return min(sizes, key=lambda label: (abs(sizes[label] - n_bytes), -STOCK_MIXES.index(label)))


def _labels(types: set[QuantType]) -> list[str]:
    """A file of one type is called after that type. No file is called after codebooks that it does
    not use: where rows are narrow, stock mixes of many names have nearly the same size.
    """
    names = {str(qtype) for qtype in types}
    if len(names) == 1:
        (name,) = names
        of_type = [label for label in STOCK_MIXES if f"{label}_".startswith(f"{name}_")]
        if of_type:
            return of_type
    families = {name[:3] for name in names}  # IQ2, IQ3, ...
    return [
        label
        for label in STOCK_MIXES
        if not names or not label.startswith("IQ") or label[:3] in families
    ]


def file_name(model: str, label: str, bpw: float | None = None, decimals: int = 2) -> str:
    """Return `<Model>-EVO-<label>.gguf`; with `bpw`, of a second file of one label,
    `<Model>-EVO-4.62bpw-<label>.gguf`.

    The label comes last: the Hub, llama.cpp and Ollama read it there.
    """
    middle = "" if bpw is None else f"{bpw:.{decimals}f}bpw-"
    return f"{safe_name(model)}-EVO-{middle}{label}.gguf"


def safe_name(model: str) -> str:
    """Return a model's name as a file name: the part after the owner, no path characters."""
    name = model.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
