"""The page under 20 hostile previews at once: how another visitor's polls fare, and the memory.

    python benchmarks/hostile_previews.py [SECONDS]

Twenty visitors, each from an address of its own on the loopback, ask again and again for previews
of models that were made to be expensive: a header of 200,000 dimensions, one of 400,000 empty
tensors, a tokenizer of 20,000 splits, a config of a billion layers, a deep index. One more visitor
polls four times a second. The target: p95 <= 300 ms, and 1 GiB for the server and its children.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from quantkit.server.previews.keeper import descendants  # noqa: E402

N_VISITORS = 20
PORT = 18463


def header(value: Any) -> bytes:
    text = json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text


def tensor(shape: list[int], n: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, n]}


def models(folder: Path) -> dict[str, dict[str, bytes]]:
    """The hostile models by their ids."""
    from tiny_models import tiny_llama

    tiny = {p.name: p.read_bytes() for p in tiny_llama(folder, tokenizer="bpe").iterdir()}
    config = json.loads(tiny["config.json"])
    tokenizer = json.loads(tiny["tokenizer.json"])
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{**split, "pattern": {"Regex": f"(a{i}|b)+"}} for i in range(20_000)],
    }
    index = {"weight_map": {"a": "model-1.safetensors"}, "deep": json.loads("[" * 900 + "]" * 900)}
    deep = {name: data for name, data in tiny.items() if name != "model.safetensors"}
    return {
        "evil/dimensions": {
            **tiny,
            "model.safetensors": header({"a": tensor([2**62] * 200_000, 4)}),
        },
        "evil/tensors": {
            **tiny,
            "model.safetensors": header({f"t{i}": tensor([0], 0) for i in range(400_000)}),
        },
        "evil/splits": {**tiny, "tokenizer.json": json.dumps(tokenizer).encode()},
        "evil/layers": {
            **tiny,
            "config.json": json.dumps({**config, "num_hidden_layers": 10**9}).encode(),
        },
        "evil/vocabulary": {
            **tiny,
            "config.json": json.dumps({**config, "vocab_size": 10**9}).encode(),
        },
        "evil/index": {**deep, "model.safetensors.index.json": json.dumps(index).encode()},
    }


def serve_hub() -> None:
    """A Hub with these models; prints its address. Runs until it is ended."""
    from hub_server import HubServer

    hub = HubServer()
    with tempfile.TemporaryDirectory() as folder:
        for name, files in models(Path(folder) / "tiny").items():
            hub.add_model(name, files)
    print(hub.url(), flush=True)
    time.sleep(3600)


def ask(address: str, method: str, path: str, body: Any = None) -> tuple[int, bytes, str]:
    connection = http.client.HTTPConnection(
        "127.0.0.1", PORT, timeout=120, source_address=(address, 0)
    )
    headers = {"Content-Type": "application/json", "Origin": f"http://127.0.0.1:{PORT}"}
    with contextlib.closing(connection):
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.getheader("set-cookie") or ""


def memory(pid: int) -> int:
    """Bytes of the server and its children, what they share counted once where the kernel says."""
    total = 0
    for one in (pid, *descendants(pid)):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            total += sum(1024 * int(x.split()[1]) for x in lines if x.startswith("Pss:"))
    return total


def main(seconds: float) -> None:
    code = "import hostile_previews; hostile_previews.serve_hub()"
    here = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "benchmarks")])
    environment = {**os.environ, "PYTHONPATH": here}
    hub = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert hub.stdout is not None
    with tempfile.TemporaryDirectory(prefix="quantkit-hostile-") as scratch:
        environment |= {
            **{"HF_ENDPOINT": hub.stdout.readline().strip(), "HF_HUB_DISABLE_XET": "1"},
            **{"QUANTKIT_PUBLIC": "1", "QUANTKIT_RUNS": f"{scratch}/runs", "HF_HOME": scratch},
            **{"GRADIO_SERVER_PORT": str(PORT), "GRADIO_ANALYTICS_ENABLED": "False"},
        }
        environment.pop("HF_HUB_OFFLINE", None)
        page = subprocess.Popen(
            [sys.executable, "app.py"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
        )
        try:
            measure(page, seconds)
        finally:
            page.kill()
            page.wait()
            hub.kill()


def polls(page: subprocess.Popen[bytes], fn_index: int, stop: float) -> tuple[list[float], int]:
    """Seconds that each poll of a visitor took, sorted, and the most memory meanwhile."""
    took: list[float] = []
    most, next_look = 0, 0.0
    while time.monotonic() < stop:
        body = {"data": ["", None], "fn_index": fn_index, "session_hash": "honest"}
        began = time.perf_counter()
        status, _, _ = ask("127.0.0.1", "POST", "/gradio_api/run/predict", body)
        took.append(time.perf_counter() - began)
        assert status == 200, status
        if time.monotonic() > next_look:
            most, next_look = max(most, memory(page.pid)), time.monotonic() + 1
        time.sleep(max(0.0, 0.25 - took[-1]))
    return sorted(took), most


def said(took: list[float]) -> str:
    p95 = took[int(0.95 * len(took))]
    return (
        f"{len(took)} polls: median {1e3 * statistics.median(took):.0f} ms,"
        f" p95 {1e3 * p95:.0f} ms, longest {1e3 * took[-1]:.0f} ms"
    )


def measure(page: subprocess.Popen[bytes], seconds: float) -> None:
    while True:
        try:
            ask("127.0.0.1", "GET", "/")
            break
        except OSError:
            assert page.poll() is None
            time.sleep(0.3)
    config = json.loads(ask("127.0.0.1", "GET", "/config")[1])
    ids = {x["id"]: x["props"].get("elem_id") for x in config["components"]}
    values = {x["id"]: x["props"].get("value") for x in config["components"]}
    calls = config["dependencies"]
    preview = next(
        c
        for c in calls
        if any(ids.get(at) == "model" and event == "change" for at, event in c["targets"])
    )
    tick = next(c for c in calls if c["targets"] and c["targets"][0][1] == "tick")
    before, calm = polls(page, tick["id"], time.monotonic() + 15)
    names = ("dimensions", "tensors", "splits", "layers", "vocabulary", "index")
    stop = time.monotonic() + seconds
    statuses: list[int] = []

    def attack(number: int) -> None:
        n = 0
        while time.monotonic() < stop:
            data = [values[i] for i in preview["inputs"]]
            data[0] = f"evil/{names[(number + n) % len(names)]}"
            body = {"data": data, "fn_index": preview["id"], "session_hash": f"evil{number}-{n}"}
            n += 1
            with contextlib.suppress(OSError, http.client.HTTPException):
                path = "/gradio_api/queue/join"
                statuses.append(ask(f"127.0.0.{number + 2}", "POST", path, body)[0])
            time.sleep(0.5)

    for number in range(N_VISITORS):
        threading.Thread(target=attack, args=(number,), daemon=True).start()
    took, most = polls(page, tick["id"], stop)
    counts = {status: statuses.count(status) for status in sorted(set(statuses))}
    print(
        f"calm: {said(before)}\nunder attack: {said(took)}\n"
        f"memory {calm / 2**20:.0f} MiB, {most / 2**20:.0f} MiB at most;"
        f" {len(statuses)} hostile requests: {counts}"
    )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 90.0)
