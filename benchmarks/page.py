"""What the web page costs: its start beside an empty page, and polls of many visitors.

    python benchmarks/page.py

Fifty finished runs and a live one, 20 clients that ask every 2 seconds; response times and the
processor time of the server. Then the start, in processor and wall seconds, three times each.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import app_fixtures as fixtures  # noqa: E402

from quantkit.run.events import EventLog  # noqa: E402
from quantkit.server.web.visitor import Visitors  # noqa: E402

N_JOBS, N_CLIENTS, SECONDS = 50, 20, 30
EMPTY = (
    "import gradio as gr\nwith gr.Blocks(analytics_enabled=False) as b: pass\n"
    "b.launch(ssr_mode=False, quiet=True)"
)


def start(command: list[str], runs: Path) -> tuple[subprocess.Popen[bytes], str, float]:
    """The server, its address, and the seconds until its first page."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {"GRADIO_SERVER_PORT": str(port), "QUANTKIT_RUNS": str(runs), "HF_HUB_OFFLINE": "1"}
    given["GRADIO_ANALYTICS_ENABLED"] = "False"
    began = time.perf_counter()
    child = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **given}, stdout=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}/"
    while True:
        try:
            urllib.request.urlopen(url, timeout=60).read()
            return child, url, time.perf_counter() - began
        except OSError:
            assert child.poll() is None
            time.sleep(0.02)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def polls(folder: Path) -> None:
    runs = folder / "runs"
    visitors = Visitors.of_root(runs, {})
    key = visitors.new_key()
    owner = f"visitor:{visitors.check(key)}"
    for number in range(N_JOBS):
        fixtures.own(fixtures.write_run(runs / f"job{number}"), owner)
    live = fixtures.write_run(runs / "live", until="search", share=0.3, outcome=None)
    worker = subprocess.Popen(["sleep", "600"], start_new_session=True)
    fixtures.alive(live, owner, worker.pid)
    child, url, _ = start([sys.executable, "app.py"], runs)
    config = json.loads(urllib.request.urlopen(f"{url}config").read())
    tick = next(d for d in config["dependencies"] if d["targets"] and d["targets"][0][1] == "tick")
    took: list[float] = []
    stop = time.monotonic() + SECONDS

    def ask(number: int) -> None:
        time.sleep(2 * number / N_CLIENTS)
        current = "live" if number % 2 else ""  # half watch the run, half the list
        while time.monotonic() < stop:
            body: dict[str, Any] = {"data": [current, None], "fn_index": tick["id"]}
            body["session_hash"] = f"client{number}"
            request = urllib.request.Request(
                f"{url}gradio_api/run/predict",
                json.dumps(body).encode(),
                fixtures.page_headers(url, visitors, key),
            )
            began = time.perf_counter()
            urllib.request.urlopen(request, timeout=30).read()
            took.append(time.perf_counter() - began)
            time.sleep(max(0.0, 2 - took[-1]))

    events = EventLog(live / "events.jsonl")
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(N_CLIENTS)]
    time.sleep(2)
    began = cpu_seconds(child.pid)
    for thread in threads:
        thread.start()
    step = 0
    while time.monotonic() < stop:
        step += 1
        data = {"done": 600 + step, "total": 2000, "generation": 20 + step, "kl": 0.015}
        events.emit("search", "progress", f"generation {20 + step}", stderr=0.0004, **data)
        time.sleep(1)
    for thread in threads:
        thread.join()
    share = (cpu_seconds(child.pid) - began) / SECONDS
    child.kill()
    worker.kill()
    took.sort()
    print(
        f"{len(took)} polls: median {1e3 * statistics.median(took):.0f} ms,"
        f" p95 {1e3 * took[int(0.95 * len(took))]:.0f} ms; server {100 * share:.0f} % of a core"
    )


def starts(folder: Path) -> None:
    for _ in range(3):
        for name, arguments in (("empty", ["-c", EMPTY]), ("app", ["app.py"])):
            command = [sys.executable, *arguments]
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            child, _, seconds = start(command, folder / "none")
            child.terminate()
            child.wait()
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            print(f"start of {name}: {seconds:.2f} s, {used:.2f} s of processor time")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="quantkit-page-") as scratch:
        polls(Path(scratch))
        starts(Path(scratch))
