"""Run folders in every state, for the tests of the launcher and the page. Holds no tests.

They are written with the code that writes real ones (EventLog, RunDir), so that what the page reads
is what a run leaves behind; only the weights are missing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from quantkit import hub
from quantkit.config import RunConfig
from quantkit.config.targets import LikeMix
from quantkit.errors import QuantkitError
from quantkit.files import write_json
from quantkit.run.artifacts import NAMES
from quantkit.run.events import EventLog
from quantkit.run.folder import RunDir, StageRecord, read_json
from quantkit.sandbox import secrets
from quantkit.server.executors import local, process
from quantkit.server.runs.record import RunRecord, load_record, owner_hash, save_record
from quantkit.server.runs.store import RunStore
from quantkit.server.web.visitor import COOKIE, TOKEN, Visitors

CONFIG = RunConfig("HuggingFaceTB/SmolLM2-135M-Instruct", targets=(LikeMix("Q4_K_M"),))
GGUF = "SmolLM2-135M-Instruct-EVO-Q4_K_M.gguf"
MESSAGES = {
    "fetch": "downloading model.safetensors",
    "convert": "llama.cpp's converter writes base.gguf",
    "calibrate": "activations of block 12",
    "quantize": "block-012: 5 levels",
    "search": "generation 31: KL 0.0151 ± 0.0004",
    "stitch": GGUF,
    "validate": "KL of llama.cpp's Q4_K_M",
    "publish": "uploading to you/model-GGUF",
}


@contextmanager
def opened_files(root: Path) -> Iterator[list[str]]:
    """Collect the paths below a folder as this process opens them, whoever does."""
    found: list[str] = []
    watches = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watches and event == "open" and str(arguments[0]).startswith(f"{root}{os.sep}"):
            found.append(str(arguments[0]))

    sys.addaudithook(hook)  # there for good: no hook can be taken away
    try:
        yield found
    finally:
        watches = False


def scores(kl: float, perplexity: float, top1: float) -> dict[str, Any]:
    """The measured part of a report's row."""
    spread = dict.fromkeys(("median", "p99", "p999", "max"), kl)
    domain = {"kl": {"mean": kl, "stderr": kl / 60, "ci95": None, **spread, "n": 2040}}
    return {
        **domain,
        "top1": top1,
        "perplexity": {"value": perplexity, "stderr": 0.2, "ci95": None, "n": 2040},
        "domains": {"code": domain, "docs": domain, "prose": domain},
    }


def make_allocation() -> dict[str, Any]:
    kinds = ("ffn_down", "ffn_gate", "ffn_up", "attn_k", "attn_output", "attn_q", "attn_v")
    rng = random.Random(1)
    types = ("IQ4_XS", "Q4_K", "Q4_K", "Q4_1", "Q5_K", "Q6_K")
    allocation = {
        f"blk.{block}.{kind}.weight": {"qtype": rng.choice(types), "method": "gptq"}
        for block in range(30)
        for kind in kinds
    }
    return {**allocation, "token_embd.weight": {"qtype": "Q6_K", "method": "imatrix"}}


def make_report() -> dict[str, Any]:
    """A report.json as validate writes it."""
    n_parameters = 134_515_008

    def row(n_bytes: int, kl: float, perplexity: float, top1: float) -> dict[str, Any]:
        return {
            "n_bytes": n_bytes,
            "bpw": 8 * n_bytes / n_parameters,
            **scores(kl, perplexity, top1),
        }

    stock = [
        ("Q4_0 --pure", 91_700_000, 0.1412, 18.9, 0.792),
        ("Q4_K_S", 101_700_000, 0.0521, 17.1, 0.861),
        ("Q4_K_M", 105_500_000, 0.0433, 16.9, 0.874),
        ("Q5_K_M", 112_100_000, 0.0262, 16.6, 0.902),
    ]
    zero = {"status": "not run", "reason": "no --tasks file"}
    ours = {
        "kind": "ours",
        "name": GGUF,
        "path": f"7-stitch/{GGUF}",
        "budget_bytes": 105_500_000,
        "sha256": "6a" * 32,
        "zero_shot": zero,
        "trace": [
            {"generation": i, "tokens": 33_000 * i, "kl": 0.021 * 0.98**i, "stderr": 0.0004}
            for i in range(60)
        ],
        "integrity": [
            {"name": "dequantized weights", "passed": True, "about": "4,810,752 weights are equal"},
            {"name": "chat turn", "passed": True, "about": "108 characters"},
        ],
        "tensors": {
            name: {"n_elements": 331_776, "n_bytes": 331_776 * bits // 8, **tensor}
            for name, tensor in make_allocation().items()
            for bits in [int(tensor["qtype"].strip("IQ")[0])]
        },
    }
    return {
        "schema": 3,
        "model": "SmolLM2-135M-Instruct",
        "base": {
            "path": "2-convert/base.gguf",
            "n_bytes": 270_900_000,
            "n_parameters": n_parameters,
            "perplexity": {"value": 16.3, "stderr": 0.2, "ci95": None, "n": 2040},
        },
        "outputs": [{**ours, **row(105_400_000, 0.0147, 16.45, 0.93)}],
        "baselines": [{"kind": "stock", "name": name, **row(*values)} for name, *values in stock],
        "protocol": "llama.cpp: windows of 512 tokens, second half scored, KL in nats",
        "texts": dict.fromkeys(("code", "docs", "prose"), "ab" * 32),
        "calibration": {"note": "calibration text as asked: builtin"},
        "fallbacks": [],
        "unmapped": [],
        "n_windows": 19,
    }


def write_run(
    folder: Path,
    config: RunConfig = CONFIG,
    *,
    until: str = "publish",
    share: float | None = None,
    outcome: str | None = "finished",
    error: tuple[str, str] = ("", ""),
) -> Path:
    """Write a run's folder: all stages before `until` done; `until` itself at `share` of its work,
    or done when that is None; then the run's last event.
    """
    folder.mkdir(parents=True, exist_ok=True)
    directory = RunDir(folder)
    write_json(directory.config_path, config)
    events = EventLog(directory.events_path)
    events.emit(None, "started", f"{config.model}, {config.sizes}")
    for stage in NAMES[: NAMES.index(until) + 1]:
        events.emit(stage, "started")
        if stage == "fetch":
            events.emit(stage, "note", "SmolLM2 at 12fd25f77366: LlamaForCausalLM, 135M parameters")
        if stage == "search":
            _search_events(directory.events_path, 1.0 if stage != until else share or 1.0)
            directory.stage_dir(stage).mkdir(exist_ok=True)
            write_json(directory.stage_dir(stage) / "best.json", make_allocation())
        if stage == until and share is not None:
            if stage != "search":
                message = MESSAGES.get(stage, "")
                events.emit(stage, "progress", message, done=int(1000 * share), total=1000)
            break
        _finish(directory, stage, events)
    if outcome == "failed":
        events.emit(until, "failed", error[0], remedy=error[1])
    elif outcome == "finished":
        events.emit(None, "finished", "all stages are done")
    return folder


def work(folder: Path, seconds: float) -> None:
    """A worker that takes `seconds` a stage and makes nothing: what `quantkit resume` looks like
    from outside.
    """
    directory = RunDir(folder)
    with directory.lock():
        config = RunConfig.from_json(read_json(directory.config_path))
        events = EventLog(directory.events_path)
        events.emit(None, "started", f"{config.model}, {config.sizes}")
        if config.publish:
            hub.check_write(config.publish, hub.resolve_token(), config.private)
        done = directory.records()
        for stage in NAMES:
            if stage in done and not (stage == "publish" and config.publish):
                events.emit(stage, "skipped", "done before")
                continue
            events.emit(stage, "started")
            if config.seed == 13 and stage == "calibrate":
                events.emit(stage, "failed", "Not enough <b>disk</b>.", remedy="Free 3 GB.")
                print("quantkit: Not enough disk.", flush=True)
                sys.exit(1)
            for step in range(5):
                data = {"done": step + 1, "total": 5}
                if stage == "search":
                    data |= {"generation": step, "kl": 0.02 / (step + 1), "stderr": 0.0005}
                events.emit(stage, "progress", MESSAGES.get(stage, ""), **data)
                print(f"{stage} {step}", flush=True)
                time.sleep(seconds / 5)
            shutil.rmtree(directory.stage_dir(stage), ignore_errors=True)
            _finish(directory, stage, events, config)
        if secrets.get("QUANTKIT_HF_TOKEN") and "QUANTKIT_HF_TOKEN" not in os.environ:
            events.emit("publish", "note", "a token is there")
        events.emit(None, "finished", "all stages are done")


def _search_events(path: Path, share: float) -> None:
    """A search's progress: a falling KL, as its events say it."""
    rng, kl, now, total = random.Random(0), 0.021, time.time(), 2_000_000
    with path.open("a", encoding="utf-8") as file:
        n = int(60 * share)
        for generation in range(n):
            kl *= 1 - 0.02 * rng.random()
            data = {
                **{"done": generation * total // 60, "total": total},
                **{"generation": generation, "kl": kl, "stderr": kl / 30},
            }
            message = f"generation {generation}: KL {kl:.4f} ± {kl / 30:.4f}"
            moment = now - 4.0 * (n - generation)
            event = {"time": moment, "stage": "search", "kind": "progress", "message": message}
            file.write(json.dumps({**event, "data": data}, ensure_ascii=False) + "\n")


def _upload(folder: Path, config: RunConfig) -> dict[str, Any]:
    """As the real publish stage does it."""
    assert config.publish is not None
    token = hub.resolve_token()
    made = hub.publish(folder, config.publish, token, config.private, "Upload")
    if config.collection is not None:
        hub.add_to_collection(config.collection, made.repo_id, token, config.private)
    about = {"url": made.url, "private": made.private, "commit": made.sha}
    return {**about, "changed": list(made.changed)}


def _finish(
    directory: RunDir, stage: str, events: EventLog, config: RunConfig | None = None
) -> None:
    folder = directory.stage_dir(stage)
    folder.mkdir(exist_ok=True)
    outputs = []
    if stage == "search":
        outputs.append(write_json(folder / "best.json", make_allocation()))
    if stage == "stitch":
        (folder / GGUF).write_bytes(b"GGUF" + bytes(range(256)) * 400)
        outputs.append(folder / GGUF)
    if stage == "validate":
        outputs.append(write_json(folder / "report.json", make_report()))
    if stage == "publish":
        upload = folder / "upload"
        upload.mkdir(exist_ok=True)
        (upload / "README.md").write_text(
            "---\nlicense: apache-2.0\n---\n\n# SmolLM2-135M-Instruct-EVO-Q4_K_M\n\nA card.\n",
            "utf-8",
        )
        for name, source in ((GGUF, "7-stitch"), ("report.json", "8-validate")):
            os.link(directory.path / source / name, upload / name)
        (upload / "SmolLM2-135M-Instruct-imatrix.gguf").write_bytes(b"GGUF" + b"i" * 2000)
        outputs += sorted(upload.iterdir())
    summary: dict[str, Any] = {}
    if stage == "publish" and config is not None and config.publish:
        summary = _upload(folder / "upload", config)
    seconds = {"calibrate": 68.0, "quantize": 142.0, "search": 213.0}.get(stage, 9.0)
    described = tuple(directory.describe(path) for path in outputs)
    directory.save_record(StageRecord(stage, {}, described, seconds, summary))
    events.emit(stage, "finished", f"{seconds:.0f} s", seconds=seconds, **summary)


def own(folder: Path, owner: str | None, phase: str = "started", **fields: Any) -> Path:
    """Make a folder the job of a visitor. `owner` is an id as the page's server knows it."""
    now = time.time()
    record = RunRecord(None if owner is None else owner_hash(owner), now, phase, now)
    save_record(folder, dataclasses.replace(record, **fields))
    return folder


def alive(folder: Path, owner: str, pid: int) -> Path:
    """Make a folder the running job of a visitor, with a real process as its worker."""
    return own(folder, owner, "started", pid=pid, pid_started=process.started_at(pid))


def patience(seconds: float, pause: float = 0.05) -> Callable[..., None]:
    """A function that waits until a check is true, and fails after so many seconds."""

    def until(check: Callable[[], bool], seconds: float = seconds) -> None:
        deadline = time.monotonic() + seconds
        while not check():
            assert time.monotonic() < deadline, "it did not come to that in time"
            time.sleep(pause)

    return until


def kill_workers(root: Path) -> None:
    """End what still works on the runs of a store."""
    for folder in root.glob("*/"):
        record = load_record(folder)
        if record is not None and record.pid is not None:
            process.kill_group(record.pid, record.pid_started, signal.SIGKILL)


@contextmanager
def serving(
    root: Path, *, public: bool = False, schedule: bool = True, planned: bool = True
) -> Iterator[tuple[str, RunStore, Visitors]]:
    """The page on a free port, its workers being `work`; with `planned` every model has one plan.
    Yields its address, store and visitors.
    """
    import plans

    from quantkit.server.web import form_handlers, server
    from quantkit.server.web.page import build_app

    command, local.COMMAND = local.COMMAND, (sys.executable, __file__)
    planner = form_handlers.estimate
    if planned:
        form_handlers.estimate = plans.ask_small
    path, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), os.pathsep.join(sys.path)
    store, visitors = RunStore(root, public=public), Visitors(b"test")
    app = build_app(store, visitors)
    if not schedule:
        store.start = lambda: None  # type: ignore[method-assign]
    try:
        _, url, _ = server.launch(app, store, visitors, prevent_thread_lock=True, quiet=True)
        yield url, store, visitors
    finally:
        app.close(verbose=False)
        store.close()
        if schedule:
            kill_workers(root)
        local.COMMAND, form_handlers.estimate = command, planner
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path


def ask(
    url: str, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Send exactly this; status, headers (lower case) and body of the answer."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=300)
    try:
        given = dict(headers or {})
        if body is not None:
            given = {"Content-Type": "application/json", **given}
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, body, given)
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def event_number(url: str, elem_id: str, kind: str = "") -> tuple[int, int]:
    """The number of the page's event of a component, and how many values it takes."""
    config = json.loads(ask(url, "GET", "/config")[2])
    ids = {c["id"]: c["props"].get("elem_id") for c in config["components"]}
    for found in config["dependencies"]:
        for target in found["targets"]:
            if ids.get(target[0]) == elem_id or (kind and target[1] == kind):
                return found["id"], len(found["inputs"])
    raise AssertionError(f"no event of {elem_id}")


def page_headers(url: str, visitors: Visitors, key: str) -> dict[str, str]:
    """What a visitor's page sends with each of its events."""
    visitor = visitors.check(key)
    assert visitor is not None
    return {
        "Content-Type": "application/json",
        "Cookie": f"{COOKIE}={key}",
        "Origin": url.rstrip("/"),
        "Sec-Fetch-Site": "same-origin",
        TOKEN: visitors.page_token(visitor),
    }


def make_states(root: Path, owner: str, pid: int) -> dict[str, str]:
    """One job in every state under `root`. Returns state -> job id."""
    write_run(root / "demo")
    running = write_run(root / "r1", until="search", share=0.55, outcome=None)
    early = write_run(root / "r2", until="quantize", share=0.3, outcome=None)
    failed_config = dataclasses.replace(CONFIG, model="meta-llama/Llama-3.2-1B")
    sentence = (
        "meta-llama/Llama-3.2-1B is gated and this token has no access to it.",
        "Ask for access on its page of the Hub, then resume.",
    )
    alive(running, owner, pid)
    alive(early, owner, pid)
    own(write_run(root / "done", until="publish"), owner)
    own(
        write_run(
            root / "failed",
            failed_config,
            until="fetch",
            share=0.02,
            outcome="failed",
            error=sentence,
        ),
        owner,
    )
    own(write_run(root / "cut", until="validate", share=0.4, outcome=None), owner)
    own(write_run(root / "off", until="calibrate", share=0.4, outcome=None), owner, "cancelled")
    waiting = root / "waiting"
    waiting.mkdir()
    write_json(waiting / "config.json", CONFIG)
    own(waiting, owner, "queued")
    return {
        **{"running": "r1", "early": "r2", "finished": "done", "failed": "failed"},
        **{"interrupted": "cut", "cancelled": "off", "queued": "waiting", "local": "demo"},
    }


if __name__ == "__main__":
    secrets.hide()
    target = Path(sys.argv[-1])
    try:
        work(target, float(os.environ.get("QUANTKIT_TEST_SECONDS", "0.2")))
    except QuantkitError as error:
        log = EventLog(RunDir(target).events_path)
        log.emit("publish", "failed", error.message, remedy=error.remedy)
        sys.exit(1)
