"""The command `quantkit app`: what it says, and a port that is taken."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_page_says_where_it_is_and_takes_no_other_port(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"QUANTKIT_RUNS": str(tmp_path / "runs"), "HF_HUB_OFFLINE": "1"}
    app = [sys.executable, "-m", "quantkit", "app"]
    with subprocess.Popen(
        [*app, "--port", port], env=environment, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            said = [child.stdout.readline() for _ in range(3)]
            assert said[0] == f"The page: http://127.0.0.1:{port}/\n", "nothing of Gradio's before"
            assert said[1] == f"Its runs: {tmp_path / 'runs'}\n"
            for more in (["--port", port], []):
                again = subprocess.run(
                    [*app, *more],
                    env=environment | {"GRADIO_SERVER_PORT": port},
                    capture_output=True,
                    text=True,
                    timeout=300,
                    check=False,
                )
                assert again.returncode == 1
                assert f"Port {port} is taken" in again.stderr and "Traceback" not in again.stderr
        finally:
            child.terminate()
