"""A command as several processes: its exit status, its output, its signals and its secrets are
those of one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import CHEAP, ROOT, wait_for

from quantkit.run.events import read_events
from quantkit.run.folder import RunDir

# `quantkit ...`, as it starts itself on a machine with two GPUs.
LAUNCH = """
import sys
from quantkit.ranks.launch import launch
from quantkit.sandbox import secrets
secrets.hide()
told = {name: secrets.get(name) for name in secrets.HUB if secrets.get(name)}
sys.exit(launch(2, sys.argv[1:], told))
"""


def start(*arguments: object, env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *map(str, arguments)],
        cwd=ROOT,
        env={**env, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_wrong_use_is_said_once(offline: dict[str, str], tmp_path: Path) -> None:
    """By rank 0, with its exit status."""
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").touch()
    process = start("run", "nobody/nothing", "--out", tmp_path / "used", env=offline)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2 and out == ""
    assert err.count("quantkit: ") == 1 and "is not empty and holds no run" in err, err
    assert "Traceback" not in err and "torch" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_end_all(
    tiny_checkpoint: Path, offline: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C, the server's Cancel, and a kill that nobody can hand on."""
    folder = tmp_path / "run"
    process = start("run", tiny_checkpoint, "--out", folder, *CHEAP, env=offline)
    assert wait_for(process, folder, "convert", "started")  # type: ignore[arg-type]
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    events, _ = read_events(RunDir(folder).events_path)
    if number == signal.SIGINT:
        assert process.returncode == 1 and "interrupted" in err
        assert events[-1].message == "Interrupted."
    else:
        assert process.returncode == -number
        assert events[-1].kind != "failed"
    assert "Traceback" not in err
    for _ in range(100):
        if not RunDir(folder).is_locked():
            break
        time.sleep(0.1)
    assert not RunDir(folder).is_locked()
