"""Make room for what validate measures with, where the disk has too little: of the level files it
reads only a few.
"""

from __future__ import annotations

from collections.abc import Sequence
from shutil import disk_usage

from quantkit.config.levels import around
from quantkit.ggml.types import STOCK_MIXES
from quantkit.gguf_file.read import GgufFile
from quantkit.llamacpp.stock import StockRecipe, stock_bytes
from quantkit.planning.cost import free_bytes
from quantkit.planning.disk import footprint, largest_stock
from quantkit.run.outputs import Output
from quantkit.run.stage import Run
from quantkit.sizes import size
from quantkit.sources.snapshot import load_snapshot

_MARGIN = 1.05  # times what is foretold


def make_room(run: Run, base: GgufFile, outputs: Sequence[Output]) -> int:
    """Delete the levels that only finished stages read, unless the disk has room without that.
    Return the bytes freed.
    """
    memory = free_bytes(run.config.device), free_bytes("cpu")
    found = footprint(run.config, load_snapshot(run.dir).info, base, *memory)
    sizes = [output.n_bytes for output in outputs]
    stock = [stock_bytes(base, StockRecipe(label)) for label in STOCK_MIXES]
    needed = int(_MARGIN * found.measuring(largest_stock(stock, sizes)))
    if disk_usage(run.dir.path).free >= needed:
        return 0
    levels = {
        output: output.n_bytes
        for output in run.records["quantize"].outputs
        if (run.dir.path / output.path).parent == run.artifacts.levels
        and (run.dir.path / output.path).suffix == ".gguf"
    }
    measured = around(levels, sizes, run.profile.effort.n_uniform)
    freed = run.dir.drop("quantize", [level for level in levels if level not in measured])
    if freed:
        text = f"levels of {size(freed)} are deleted: nothing reads them any more, and measuring"
        run.events.emit("validate", "note", f"{text} takes {size(needed)} of the disk")
    return freed
