"""A process of the runs that `test_stages.py` shares out: `stage_worker.py UNTIL FOLDER...`."""

from __future__ import annotations

import sys
from pathlib import Path

from quantkit import config, pipeline
from quantkit.calibration import sampling
from quantkit.errors import QuantkitError
from quantkit.ranks.join import joined, serve
from quantkit.run.folder import RunDir
from quantkit.stages import TASKS

config.PROFILES["demo"] = config.Profile(
    calibration_tokens=10_240,  # three batches, of which a rank of three has one
    heldout_tokens=2048,
    search_tokens=2048,
    eval_windows=2,
    n_sweeps=1,
    tuning_steps=3,
    effort=config.PROFILES["demo"].effort,
    levels=("Q4_K", "Q6_K"),
    about="ranks",
)
sampling._MOST_TEXTS = {"cpu": 8}  # of a batch: several batches, so that ranks share them out


def main(until: str, *folders: str) -> int:
    with joined("cpu") as ranks:
        if ranks.rank:
            serve(ranks, TASKS, lambda error: QuantkitError(f"{type(error).__name__}: {error}"))
        for folder in folders:
            asked = pipeline.load_config(RunDir(Path(folder)))
            pipeline.run(asked, Path(folder), until=until, ranks=ranks)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
