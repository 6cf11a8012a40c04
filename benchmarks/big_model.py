"""Llama-3.1-8B's widths with random weights through all stages: time, disk and memory of each.

    python benchmarks/big_model.py FOLDER [--blocks 4] [--until publish] [--tokens 4096]
                                   [--levels Q3_K,Q4_K] [--memory 12GiB] [--pause N]
                                   [--device cuda] [--tuning STEPS]
                                   [--windows 2] [--beside 3]

FOLDER gets the checkpoint (one shard a block) and the run. Weights are random, scaled so that
logits have a standard deviation of 3; the vocabulary has 128,256 tokens, of which the tokenizer (of
SmolLM2) knows 49,152. `--tokens` is how many calibrate, a quarter more judges, and as many are
searched with; the head gets one type alone, Q6_K. validate reads `--windows` of each text and
measures `--beside` of llama.cpp's files of at most the output's size, and the next larger.
`--memory` is QUANTKIT_MEMORY of the run, and on a GPU all that PyTorch may take of it: what does
not fit fails. With `--pause` the run is killed at its first progress after so many seconds and
taken up again by the next call; times add up, peaks are those of all pieces. It is published to a
Hub on this machine.

Memory is the resident set of the process and its children: pages of mapped files count as long as
they are mapped. "anonymous" leaves those out, which the system takes back when others need memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from quantkit.config.targets import BitsPerWeight

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from quantkit import config as settings  # noqa: E402
from quantkit.config import RunConfig  # noqa: E402
from quantkit.files import write_json  # noqa: E402
from quantkit.run.artifacts import NAMES  # noqa: E402
from quantkit.run.events import Event  # noqa: E402
from quantkit.run.folder import read_json  # noqa: E402

WIDTH, INNER, HEADS, KV_HEADS = 4096, 14_336, 32, 8
SPREAD = 3.0  # standard deviation of logits
_EVERY = 0.1  # seconds between two looks at the memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--levels", default="Q3_K,Q4_K")
    parser.add_argument("--bpw", default="4.7")
    parser.add_argument("--until", default=NAMES[-1], choices=NAMES)
    parser.add_argument("--memory")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tuning", type=int, default=0)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--beside", type=int, default=3)
    parser.add_argument("--pause", type=float, default=float("inf"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run(options)
        return
    model = options.folder / "Big-Llama"
    if not (model / "model.safetensors.index.json").exists():
        began = time.time()
        write_model(model, options.blocks, options.vocabulary)
        print(f"checkpoint: {size_of(model) / 1e9:.2f} GB in {time.time() - began:.0f} s")
    table = measure(options)
    if options.device == "cuda":
        for stage, n_bytes in read_json(options.folder / "gpu.json").items():
            table[stage]["gpu"] = n_bytes
    show(table, planned(options))


def write_model(folder: Path, n_blocks: int, n_vocab: int) -> None:
    """One file of weights at a time; the index last."""
    import torch
    from safetensors.torch import save_file
    from tiny_models import write_tokenizer
    from transformers import LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, "smollm2")
    config = LlamaConfig(
        vocab_size=n_vocab,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=n_blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    table: dict[str, str] = {}

    def matrix(rows: int, columns: int, std: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(std).bfloat16()

    def norm() -> torch.Tensor:
        return (1 + 0.1 * torch.randn(WIDTH, generator=generator)).bfloat16()

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        table.update(dict.fromkeys(tensors, name))

    kv = WIDTH * KV_HEADS // HEADS
    shapes = {
        **{"self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (kv, WIDTH)},
        **{"self_attn.v_proj": (kv, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH)},
        **{"mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH)},
        "mlp.down_proj": (WIDTH, INNER),
    }
    n_files = n_blocks + 2
    for i in range(n_blocks):
        own = {f"{n}.weight": matrix(*s, s[1] ** -0.5) for n, s in shapes.items()}
        own |= {f"{n}.weight": norm() for n in ("input_layernorm", "post_attention_layernorm")}
        name = f"model-{i + 1:05}-of-{n_files:05}.safetensors"
        save(name, {f"model.layers.{i}.{n}": w for n, w in own.items()})
    embeddings = {"model.embed_tokens.weight": matrix(n_vocab, WIDTH, 1.0)}
    save(f"model-{n_files - 1:05}-of-{n_files:05}.safetensors", embeddings)
    del embeddings
    head = {"lm_head.weight": matrix(n_vocab, WIDTH, SPREAD * WIDTH**-0.5)}
    save(f"model-{n_files:05}-of-{n_files:05}.safetensors", head | {"model.norm.weight": norm()})
    n_bytes = sum((folder / name).stat().st_size for name in set(table.values()))
    index = {"metadata": {"total_size": n_bytes}, "weight_map": table}
    write_json(folder / "model.safetensors.index.json", index)


def run(options: argparse.Namespace) -> None:
    """The run itself."""
    import torch

    from quantkit import pipeline
    from quantkit.sizes import parse_bytes

    on_gpu = options.device == "cuda"
    if on_gpu and options.memory:
        _, whole = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(parse_bytes(options.memory) / whole)
    kept = options.folder / "gpu.json"
    peaks: dict[str, int] = read_json(kept) if kept.exists() else {}

    def look(event: Event) -> None:
        if on_gpu and event.stage:
            taken = torch.cuda.max_memory_reserved()
            peaks[event.stage] = max(peaks.get(event.stage, 0), taken)
            torch.cuda.reset_peak_memory_stats()
            write_json(kept, peaks)

    pipeline.run(config_of(options), options.folder / "run", look, options.until)


def planned(options: argparse.Namespace) -> dict[str, int]:
    """The peak memory of every stage, as `quantkit plan` states it."""
    from quantkit.planning.plan import make_plan

    if options.memory:
        os.environ["QUANTKIT_MEMORY"] = options.memory
    return make_plan(config_of(options)).estimates.memory


def config_of(options: argparse.Namespace) -> RunConfig:
    """The demo's profile with other numbers of tokens, and of files to stand beside the output."""
    profiles: Any = settings.PROFILES
    profiles["demo"] = dataclasses.replace(
        profiles["demo"],
        calibration_tokens=options.tokens,
        heldout_tokens=max(2048, options.tokens // 4),
        search_tokens=options.tokens,
        eval_windows=options.windows,
        effort=dataclasses.replace(profiles["demo"].effort, n_below=options.beside),
    )
    return RunConfig(
        model=str(options.folder / "Big-Llama"),
        targets=(BitsPerWeight(options.bpw),),
        profile="demo",
        levels=tuple(options.levels.split(",")),
        device=options.device,
        tuning=options.tuning,
        types=((r"^output\.weight$", "Q6_K"),),
        calibration="docs,code",
        publish="alice/Big-Llama-GGUF" if options.until == "publish" else None,
    )


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run what is left of the stages in a process of its own; numbers by stage, with those of
    earlier calls.
    """
    from hub_server import ALICE, HubServer

    kept = options.folder / "measured.json"
    table: dict[str, dict[str, float]] = read_json(kept) if kept.exists() else {}
    arguments = [*sys.argv[1:], "--child"]
    with HubServer() as server, tempfile.TemporaryDirectory() as home:
        server.add_user(ALICE, "alice")
        env = {**os.environ, **server.env, "HF_TOKEN": ALICE, "HF_HOME": home}
        env |= {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
        if options.memory:
            env["QUANTKIT_MEMORY"] = options.memory
        command = [sys.executable, __file__, *arguments]
        process = subprocess.Popen(command, env=env, start_new_session=True)
        try:
            watch(process, options, table)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            write_json(kept, table)
    return table


def watch(
    process: subprocess.Popen, options: argparse.Namespace, table: dict[str, dict[str, float]]
) -> None:
    """Look at the process until it ends or may pause."""
    events = options.folder / "run" / "events.jsonl"
    began = last = time.monotonic()
    stage, looks, n_bytes = "fetch", 0, 0
    while process.poll() is None:
        now = time.monotonic()
        if now - began < options.pause:
            n_bytes = events.stat().st_size if events.exists() else 0
        elif events.stat().st_size > n_bytes:
            return
        current = stage_now(events) or stage
        if current != stage or not looks:
            stage = current
            reset_peak(process.pid)
        row = table.setdefault(stage, {"seconds": 0, "rss": 0, "anonymous": 0, "disk": 0})
        row["seconds"] += now - last
        last = now
        total, anonymous = memory_of(process.pid)
        row["rss"] = max(row["rss"], total)
        row["anonymous"] = max(row["anonymous"], anonymous)
        if looks % 20 == 0:
            row["disk"] = max(row["disk"], size_of(options.folder / "run"))
        looks += 1
        time.sleep(_EVERY)
    if process.poll():
        sys.exit(f"the run ended with {process.returncode}")


def stage_now(events: Path) -> str | None:
    """The stage of the last event that names one."""
    try:
        with events.open("rb") as file:
            file.seek(max(0, events.stat().st_size - 4096))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            stage = json.loads(line).get("stage")
        except ValueError:
            continue
        if stage:
            return str(stage)
    return None


def reset_peak(pid: int) -> None:
    """Let the kernel's own peak of the process begin anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def memory_of(pid: int) -> tuple[int, int]:
    """Bytes of a process and its children: resident (of the process itself at its peak since
    `reset_peak`), and without pages of files.
    """
    total = anonymous = 0
    todo, key = [pid], "VmHWM"
    while todo:
        own = todo.pop()
        try:
            status = Path(f"/proc/{own}/status").read_text()
            for thread in Path(f"/proc/{own}/task").iterdir():
                todo += [
                    child
                    for child in map(int, (thread / "children").read_text().split())
                    if child not in todo
                ]
        except OSError:  # it has ended
            continue
        lines = dict(line.split(":", 1) for line in status.splitlines() if "kB" in line)
        total += 1024 * int(lines.get(key, "0").split()[0])
        anonymous += 1024 * int(lines.get("RssAnon", "0").split()[0])
        key = "VmRSS"
    return total, anonymous


def size_of(folder: Path) -> int:
    """Bytes on disk."""
    n_bytes = 0
    for path in folder.rglob("*"):
        try:
            n_bytes += 512 * path.stat().st_blocks if path.is_file() else 0
        except OSError:
            continue
    return n_bytes


def show(table: dict[str, dict[str, float]], plan: dict[str, int]) -> None:
    gpu = any("gpu" in row for row in table.values())
    print(
        "| stage | time | peak memory | planned | of it anonymous | disk of the run at most |"
        + " GPU memory |" * gpu
    )
    print("|---|---:|---:|---:|---:|---:|" + "---:|" * gpu)
    for stage in NAMES:
        if stage in table:
            row = table[stage]
            sizes = (row["rss"], plan[stage], row["anonymous"])
            gib = " | ".join(f"{n / 2**30:.2f} GiB" for n in sizes)
            cells = f"{row['seconds']:.0f} s | {gib} | {row['disk'] / 1e9:.1f} GB |"
            cells += f" {row.get('gpu', 0) / 2**30:.2f} GiB |" * gpu
            print(f"| {stage} | {cells}")


if __name__ == "__main__":
    main()
