"""What the tests of `test_search_tune.py` run as several processes: a run's stages up to tune."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from quantkit import pipeline
from quantkit.errors import QuantkitError
from quantkit.files import write_json
from quantkit.machine import faults
from quantkit.ranks.join import joined, serve
from quantkit.stages import TASKS


def in_float32(put: Callable[[object, str, object], None] = setattr) -> None:
    """Have this process multiply in float32 on any CPU: rounded to bf16, gradients that are summed
    in another order leave tuned files 5 % apart.
    """
    put(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


def main(folder: Path) -> int:
    in_float32()
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
