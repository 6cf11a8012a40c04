"""Try many seeds of the generator of trouble: `python dev/trouble.py FIRST LAST [WORKERS]`.

Prints every verdict that is not fine, and the counts. About six seconds of a core for each seed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from trouble_judge import judge_all  # noqa: E402


def main() -> int:
    first, last, *more = map(int, sys.argv[1:])
    n_workers = more[0] if more else os.cpu_count() or 1
    counts: Counter[str] = Counter()
    worst_kl, n_bad = 0.0, 0
    with tempfile.TemporaryDirectory(prefix="trouble-") as folder:
        for verdict in judge_all(range(first, last), Path(folder), n_workers):
            counts[f"{verdict.outcome}: {verdict.kind}"] += 1
            if verdict.kind == "right" and verdict.kl is not None:
                worst_kl = max(worst_kl, verdict.kl)
            if not verdict.is_fine:
                n_bad += 1
                sys.stdout.write(f"{verdict}\n")
                sys.stdout.flush()
    for kind, n in sorted(counts.items()):
        sys.stdout.write(f"{n:6}  {kind}\n")
    sys.stdout.write(f"largest KL of a right file {worst_kl:.2g}\n")
    sys.stdout.write(f"{n_bad} of {last - first} are not fine\n")
    return 1 if n_bad else 0


if __name__ == "__main__":
    sys.exit(main())
