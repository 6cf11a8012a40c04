"""The Jobs half of the test Hub: hardware and prices, jobs that really run, their logs as events.

A job is a process on this machine: its command's last module is run with the job's environment, the
bucket mounted at /state is a folder. So a test follows a run from the request that starts it to
the last line that it prints.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hub_server import HubServer

PRICES = [  # name, title, cpu, ram, disk, gpu, vram, micro USD a minute
    ("cpu-basic", "CPU Basic", "2 vCPU", "16 GB", "50 GB", None, None, 167),
    ("cpu-upgrade", "CPU Upgrade", "8 vCPU", "32 GB", "50 GB", None, None, 500),
    ("t4-small", "Nvidia T4 - small", "4 vCPU", "15 GB", "50 GB", "T4", "16 GB", 6667),
    ("a10g-large", "Nvidia A10G - large", "12 vCPU", "46 GB", "110 GB", "A10G", "24 GB", 25000),
    ("h200", "Nvidia H200", "23 vCPU", "256 GB", "3000 GB", "H200", "141 GB", 83333),
    ("h200x4", "4x Nvidia H200", "92 vCPU", "1024 GB", "12000 GB", "H200", "564 GB", 333333),
]


def hardware() -> list[dict[str, Any]]:
    """As GET /api/jobs/hardware answers."""
    return [
        {
            "name": name,
            "prettyName": title,
            "cpu": cpu,
            "ram": ram,
            "ephemeralStorage": disk,
            "accelerator": gpu
            and {
                "type": "gpu",
                "model": gpu,
                "quantity": title[0] if title[1] == "x" else "1",
                "vram": vram,
                "manufacturer": "Nvidia",
            },
            "unitCostMicroUSD": micro,
            "unitCostUSD": micro / 1e6,
            "unitLabel": "minute",
        }
        for name, title, cpu, ram, disk, gpu, vram, micro in PRICES
    ]


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass
class Job:
    """One job and its process."""

    id: str
    owner: str
    spec: dict[str, Any]
    stage: str = "SCHEDULING"
    message: str | None = None
    created: str = field(default_factory=_now)
    lines: list[tuple[str, str]] = field(default_factory=list)  # time, text
    process: subprocess.Popen[str] | None = None
    began: float = 0.0
    ended: float = 0.0

    def json(self) -> dict[str, Any]:
        end = self.ended or time.time()
        spec = {name: v for name, v in self.spec.items() if name != "secrets"}
        return {
            "id": self.id,
            "createdAt": self.created,
            "owner": {"id": "1", "name": self.owner, "type": "user"},
            "status": {"stage": self.stage, "message": self.message},
            "durations": {"runningSecs": round(end - self.began) if self.began else None},
            **spec,
        }


class Jobs:
    """All jobs of a test Hub. `command` replaces the uv command of real ones."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.all: dict[str, Job] = {}
        self.command: list[str] = [sys.executable, "-m", "quantkit.server.executors.hf_jobs.in_job"]
        self.waiting_seconds = 0.0
        self.buckets: set[str] = set()
        self.may_make_buckets = True
        self._lock = threading.Lock()

    def start(self, owner: str, spec: dict[str, Any]) -> Job:
        with self._lock:
            job = Job(f"{len(self.all) + 1:024x}", owner, spec)
            self.all[job.id] = job
        threading.Thread(target=self._run, args=(job,), daemon=True).start()
        return job

    def _run(self, job: Job) -> None:
        time.sleep(self.waiting_seconds)
        if job.stage != "SCHEDULING":
            return
        machine = self.root / job.id
        machine.mkdir(parents=True)
        given = {**job.spec["environment"], **job.spec.get("secrets", {})}
        for volume in job.spec.get("volumes", ()):
            place = self.root / "buckets" / volume["source"]
            place.mkdir(parents=True, exist_ok=True)
            mount = volume["mountPath"]
            given = {
                k: str(place) + v.removeprefix(mount) if v.startswith(mount) else v
                for k, v in given.items()
            }
        kept = ("PATH", "PYTHONPATH", "HOME", "LD_LIBRARY_PATH")
        own = {n: v for n, v in os.environ.items() if n in kept or n.startswith("QUANTKIT_")}
        own.pop("QUANTKIT_HF_TOKEN", None)
        endpoint = {n: os.environ[n] for n in ("HF_ENDPOINT",) if n in os.environ}
        job.began, job.stage = time.time(), "RUNNING"
        job.process = subprocess.Popen(
            self.command,
            cwd=machine,
            env={**own, **endpoint, "HF_HUB_DISABLE_XET": "1", **given},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert job.process.stdout is not None
        job.lines.append((_now(), f"===== Job started at {_now()} ====="))
        for line in job.process.stdout:
            job.lines.append((_now(), line.rstrip("\n")))
        code = job.process.wait()
        job.ended = time.time()
        if job.stage == "RUNNING":
            job.stage = "COMPLETED" if code == 0 else "ERROR"
            job.message = None if code == 0 else f"Job failed with exit code: {code}"

    def stop(self, job: Job, stage: str, message: str | None = None) -> None:
        """End a job as the Hub does: cancelled, or out of time."""
        job.stage, job.message = stage, message
        if job.process is not None and job.process.poll() is None:
            os.killpg(job.process.pid, 9)
            job.process.wait()
        job.ended = job.ended or time.time()

    def close(self) -> None:
        for job in self.all.values():
            self.stop(job, job.stage)


def route(hub: HubServer, user: str | None, method: str, parts: list[str], query: Any, body: bytes):
    """Status and body of a request under /api/jobs; a generator for a stream."""
    jobs = hub.jobs
    if parts == ["hardware"]:
        return 200, hardware()
    if user is None:
        return 401, {"error": "Invalid username or password."}
    if parts[0] != user:
        return 403, {"error": "You do not have access to the jobs of this namespace"}
    if len(parts) == 1 and method == "POST":
        return 200, jobs.start(user, json.loads(body)).json()
    if len(parts) == 1:
        wanted = [label.split("=", 1) for label in query.get("label", ())]
        found = [
            job.json()
            for job in jobs.all.values()
            if job.owner == user
            and all(job.spec.get("labels", {}).get(k) == v for k, v in wanted)
            and (not query.get("stage") or job.stage in query["stage"])
        ]
        return 200, found
    job = jobs.all.get(parts[1])
    if job is None or job.owner != user:
        return 404, {"error": "Job not found"}
    if parts[2:] == ["cancel"] and method == "POST":
        jobs.stop(job, "CANCELED")
        return 200, {}
    if parts[2:] == ["logs"]:
        return 200, _logs(hub, job)
    if parts[2:] == ["metrics"]:
        return 200, _metrics(hub, job)
    return 200, job.json()


def _logs(hub: HubServer, job: Job):
    """Every line from the first on, then new ones until the job has ended."""
    n = 0
    while not hub.stopping.is_set():
        is_over = job.ended > 0
        while n < len(job.lines):
            moment, text = job.lines[n]
            n += 1
            yield {"data": text, "timestamp": moment}
        if is_over:
            return
        hub.stopping.wait(0.05)


def _metrics(hub: HubServer, job: Job):
    while job.stage == "RUNNING" and not hub.stopping.is_set():
        yield {
            "cpu_usage_pct": 87,
            "memory_used_bytes": 3_100_000_000,
            "memory_total_bytes": 16_000_000_000,
            "gpus": {"0": {"utilization": 42, "memory_used_bytes": 1, "memory_total_bytes": 2}},
        }
        hub.stopping.wait(0.2)
