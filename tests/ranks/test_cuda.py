"""Two GPUs of one machine: sums by NCCL, and a death that a wait in CUDA hides.

Run on a machine with two: `pytest tests/ranks/test_cuda.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

# What every rank does: a sum by NCCL, from a thread, and a death that rank 0 cannot see in CUDA.
RANK = """
import json, os, signal, sys, threading
import torch
from quantkit.ranks.join import joined
with joined("cuda") as ranks:
    found = {}
    def work():
        own = torch.full((3,), ranks.rank + 1.0, device="cuda")
        ranks.sum([own, torch.ones(1)])
        found.update(sum=own.tolist(), uuid=str(torch.cuda.get_device_properties("cuda").uuid))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    told = ranks.gather(found)
    if ranks.rank == 0:
        print(json.dumps(told), flush=True)
    if sys.argv[1] == "dies":
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        def say(error):
            print(json.dumps(error.message), flush=True)
        with ranks.ending(say):
            lonely = torch.ones(1 << 20, device="cuda")
            ranks.sum([lonely])
            lonely.cpu()
    ranks.gather(None)
    if ranks.rank:
        ranks.tell(None)
"""


@pytest.mark.parametrize("how", ["lives", "dies"])
def test_ranks_on_gpus(tmp_path: Path, how: str) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK, "utf-8")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, script, how],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line[:1] in '["']
    assert [own["sum"] for own in lines[0]] == [[3, 3, 3]] * 2, done.stderr
    assert lines[0][0]["uuid"] != lines[0][1]["uuid"]
    if how == "dies":
        assert done.returncode == 1
        assert "was killed or died without a word" in lines[1] + done.stderr
    else:
        assert done.returncode == 0, done.stderr
