"""The model of a run, opened for a stage."""

from __future__ import annotations

from pathlib import Path

import torch

from quantkit.model import streaming
from quantkit.model.blockwise import BlockwiseModel
from quantkit.run.stage import Run

STREAMED = "there is too little free memory for the whole model: its blocks are read one by one"


def open_model(
    run: Run,
    stage: str,
    folder: Path,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    n_beside: int = 0,
) -> BlockwiseModel:
    """Do `streaming.open_model`, and say in the run's events if the model is streamed."""
    model = streaming.open_model(folder, dtype, device, n_beside)
    if model.is_streamed:
        run.events.emit(stage, "note", STREAMED)
    return model
