"""A run outlives its caller, its server (killed and started again) and its worker (killed too).

pytest tests/server/test_app_survival.py -m slow
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import app_fixtures as fixtures
import pytest
from gradio_client import Client
from test_app import ROOT, _app, get
from tiny_models import tiny_llama

from quantkit.server.executors import process
from quantkit.server.runs.record import load_record
from quantkit.server.runs.store import RunStore
from quantkit.server.web.visitor import Visitors

until = fixtures.patience(600.0, pause=0.3)

OPTIONS = {"profile": "demo", "calibration": "builtin"}


@pytest.mark.slow
def test_killed_and_resumed_ends_with_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "tiny", hidden_size=256, intermediate_size=512)
    runs = tmp_path / "runs"
    store = RunStore(runs)  # looks; the servers' own scheduler starts what is to be started

    first = _app(ROOT, runs, False)
    with first as url:
        job = Client(url, verbose=False).predict(str(model), api_name="/start_job", **OPTIONS)
        owner = f"visitor:{Visitors.of_root(runs, {}).check(job['key'])}"
        until(lambda: store.view(job["job_id"], owner).stages[1].state == "done")
        first._child.kill()  # the caller is gone, the server dies without a word
        first._child.wait()
        record = load_record(runs / job["job_id"])
        assert record is not None and record.pid is not None
        assert process.is_alive(record.pid, record.pid_started), "the worker died with the server"

    with _app(ROOT, runs, False) as url:
        client = Client(url, verbose=False)

        def status(wanted: dict[str, Any]) -> dict[str, Any]:
            return client.predict(wanted["job_id"], wanted["key"], api_name="/job_status")

        assert status(job)["state"] == "running"
        until(lambda: status(job)["current"] in ("quantize", "search", "stitch", "validate"))
        os.killpg(record.pid, signal.SIGKILL)
        until(lambda: status(job)["state"] == "interrupted")
        store.resume(job["job_id"], owner)
        until(lambda: status(job)["state"] in ("finished", "failed"))
        assert (status(job)["state"], status(job)["error"]) == ("finished", "")
        calm = client.predict(str(model), key=job["key"], api_name="/start_job", **OPTIONS)
        until(lambda: status(calm)["state"] in ("finished", "failed"))
        made = []
        for one in (job, calm):
            name = status(one)["files"][0]["name"]
            made.append(get(f"{url}files/{one['job_id']}/{name}", X_Quantkit_Key=one["key"])[2])
        assert made[0][:4] == b"GGUF" and made[0] == made[1]
