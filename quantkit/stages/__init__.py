"""The nine stages, one module each: NAME, VERSION, FIELDS and `execute(run) -> StageResult`.

`VERSION` goes up when the same inputs would give other outputs; `FIELDS` are the fields of
RunConfig that the result depends on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from quantkit.model.blockwise import BlockwiseModel
    from quantkit.run.stage import Run


def open_model(
    run: Run,
    stage: str,
    folder: Path,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    n_beside: int = 0,
) -> BlockwiseModel:
    """`streaming.open_model`; where it does not take the model whole, the run's events say so."""
    from quantkit.model.streaming import open_model

    model = open_model(folder, dtype, device, n_beside)
    if model.is_streamed:
        text = "there is too little free memory for the whole model: its blocks are read one by one"
        run.events.emit(stage, "note", text)
    return model
