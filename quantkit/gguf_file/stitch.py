"""Make one GGUF from base.gguf's metadata and tensors in other files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from quantkit.errors import QuantkitError
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.write import Layout, SlotFile


def stitch(
    path: Path,
    layout: Layout,
    base: GgufFile,
    sources: Mapping[str, Path],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the laid-out file: tensors named in `sources` come from there, the others from `base`.

    Raises QuantkitError when a source holds a tensor of another shape or type than laid out.
    """
    files = {source: GgufFile(source) for source in set(sources.values())}
    out = SlotFile(path, layout)
    for position, (name, tensor) in enumerate(base.tensors.items()):
        source = files[sources[name]] if name in sources else base
        stored = source.tensors.get(name)
        wanted = (tensor.shape, layout.types[name])
        if stored is None or (stored.shape, stored.qtype) != wanted:
            raise QuantkitError(
                f"{source.path.name} does not hold {name} as {wanted[1]} of shape {wanted[0]}.",
                "Run the quantize stage again.",
            )
        out.write(name, source.packed(name))
        if progress is not None:
            progress(position + 1, len(base.tensors))
    out.finish()
