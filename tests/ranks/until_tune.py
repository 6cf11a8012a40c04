"""What the tests of `test_search_tune.py` run as several processes: a run's stages up to tune."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from quantkit import pipeline
from quantkit.errors import QuantkitError
from quantkit.files import write_json
from quantkit.machine import faults
from quantkit.ranks.join import joined, serve
from quantkit.stages import TASKS


def main(folder: Path) -> int:
    config = pipeline.load_config(pipeline.open_run(folder))
    with joined(config.device) as ranks:
        write_json(folder.with_name(f"rank-{ranks.rank}.json"), os.getpid())
        if ranks.rank:
            serve(ranks, TASKS, lambda e: faults.explain(e) or QuantkitError(f"bug: {e!r}"))
        try:
            pipeline.run(config, folder, until="tune", ranks=ranks)
        except QuantkitError:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
