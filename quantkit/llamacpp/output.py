"""Lay out the output file before its weights: its metadata, its name and its exact size."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

from quantkit import __version__
from quantkit.ggml.types import FILE_TYPES, STOCK_MIXES, QuantType, file_label
from quantkit.gguf_file.fields import Field
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.write import Layout, lay_out
from quantkit.llamacpp.stock import StockRecipe, stock_bytes
from quantkit.run.folder import RunDir, read_json
from quantkit.run.recipe import Provenance
from quantkit.sources.snapshot import load_snapshot

_TABLES = ("token_embd", "output.", "per_layer_token_embd")  # as large as the vocabulary
# Mixes that are mostly of a type which is not their name's beginning.
_ALSO = {"IQ2_S": ("IQ2_M",), "IQ3_XXS": ("IQ3_XS",), "IQ3_S": ("IQ3_M",)}


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


def lay_out_labelled(
    base: GgufFile, types: Mapping[str, QuantType], provenance: Provenance, mix: str
) -> tuple[Layout, str]:
    """Lay out the output under the label of the stock mix that was asked for, or where none was
    (`mix` is empty) of what it holds; return both.
    """
    label = mix or label_of(base, types)
    return lay_out_output(base, types, provenance, label), label


def label_of(base: GgufFile, types: Mapping[str, QuantType]) -> str:
    """Return llama.cpp's label for a file with these types of tensors: that of the type which holds
    most of the weights outside of tables, since a large vocabulary at Q8_0 says nothing of the
    rest. Of several labels of a type (Q4_K_S, Q4_K_M) it is the one whose file is nearest in size.
    """
    layout = lay_out(base, types, [])
    weights: Counter[QuantType] = Counter()
    matrices = [t for t in base.tensors.values() if len(t.shape) > 1]
    outside = [t for t in matrices if not t.name.startswith(_TABLES)]
    for tensor in outside or matrices:
        weights[layout.types[tensor.name]] += math.prod(tensor.shape)
    (qtype, _), *_ = weights.most_common(1)
    labels = [x for x in STOCK_MIXES if f"{x}_".startswith(f"{qtype}_")]
    labels += _ALSO.get(str(qtype), ())
    if not labels:
        return file_label(qtype)
    sizes = {label: stock_bytes(base, StockRecipe(label)) for label in labels}
    return min(sizes, key=lambda label: (abs(sizes[label] - layout.n_bytes), label))


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
