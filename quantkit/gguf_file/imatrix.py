"""The importance matrix as a GGUF file, in the format that llama-imatrix writes and llama-quantize
reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from quantkit.errors import QuantkitError
from quantkit.files import replacing
from quantkit.ggml.native import Floats
from quantkit.gguf_file.read import GgufFile


def write_imatrix(
    path: Path,
    importances: Mapping[str, tuple[Floats, int | Floats]],
    datasets: Sequence[str],
    n_chunks: int,
    n_ctx: int,
) -> None:
    """Write mean squared inputs and token counts by tensor name.

    The values are float32 (n_columns,), or (n_experts, n_columns) with a count for each. The keys
    are those of llama.cpp's tools/imatrix/imatrix.cpp: sums of squares as `<tensor>.in_sum2`,
    tokens as `<tensor>.counts`.
    """
    with replacing(path) as partial:
        writer = GGUFWriter(partial, arch="")
        writer.kv_data[0].clear()
        writer.add_string("general.type", "imatrix")
        writer.add_array("imatrix.datasets", list(datasets))
        writer.add_uint32("imatrix.chunk_count", n_chunks)
        writer.add_uint32("imatrix.chunk_size", n_ctx)
        for name, (mean_squares, n_tokens) in sorted(importances.items()):
            rows = np.atleast_2d(np.asarray(mean_squares, np.float32))
            # An expert that was never chosen would lose its importances to a count of nothing.
            counts = np.maximum(np.broadcast_to(n_tokens, len(rows)), 1).astype(np.float32)[:, None]
            writer.add_tensor(f"{name}.in_sum2", rows * counts)
            writer.add_tensor(f"{name}.counts", counts)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_imatrix(path: Path) -> dict[str, Floats]:
    """Read the mean squared inputs by tensor name, from our file or llama-imatrix's. Raises
    QuantkitError for other files.
    """
    file = GgufFile(path)
    if file.metadata.get("general.type") != "imatrix":
        raise QuantkitError(
            f"{path.name} is not an importance matrix.", "Make one with llama-imatrix."
        )
    means: dict[str, Floats] = {}
    for tensor in file.tensors:
        if tensor.endswith(".in_sum2"):
            name = tensor.removesuffix(".in_sum2")
            if f"{name}.counts" not in file.tensors:
                raise QuantkitError(
                    f"{path.name} has sums for {name} but no counts.",
                    "It is damaged: make it again with llama-imatrix.",
                )
            counts = file.values(f"{name}.counts").reshape(-1, 1)
            mean = file.values(tensor) / np.maximum(counts, np.float32(1))
            means[name] = mean.reshape(-1).astype(np.float32)
    return means
