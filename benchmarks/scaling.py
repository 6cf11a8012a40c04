"""Whole runs of models of growing size: seconds, memory and disk of every stage, beside the plan.

    python benchmarks/scaling.py FOLDER --shapes 8B --device cuda      # as many rows as calls
    python benchmarks/scaling.py FOLDER --shapes 135M --threads 2
    python benchmarks/scaling.py FOLDER --show [--plot docs/images/scaling.svg]

Makes a checkpoint of the shapes of a well-known model (`SHAPES`) with random weights in FOLDER, and
runs `quantkit run` on it as a user would: the profile `standard`, one budget of 4.7 bits a weight.
Weights are scaled so that logits have a standard deviation of 3; the tokenizer is SmolLM2's and
knows 49,152 tokens of the vocabulary. Nothing is downloaded; what is said of quality is not worth
reading. It is published to a Hub on this machine.

`--memory` is QUANTKIT_MEMORY of the run, and on a GPU all that PyTorch may take of it: what does
not fit fails. `--blocks` and `--until` make a run shorter. With `--pause N` it is killed at its
first progress after N seconds and taken up again by the next call; times add up, peaks are those of
all pieces. A row for each model and number of GPUs is kept in FOLDER/rows.

Memory is the resident set of the process and its children: pages of mapped files count as long as
they are mapped. "anonymous" leaves those out, which the system takes back when others need memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from quantkit.files import write_json  # noqa: E402
from quantkit.markdown import table  # noqa: E402
from quantkit.run.artifacts import NAMES  # noqa: E402
from quantkit.run.folder import read_as  # noqa: E402

SPREAD = 3.0  # standard deviation of logits
_EVERY = 0.1  # seconds between two looks at the memory


@dataclass(frozen=True)
class Shapes:
    """The shapes of a decoder; with experts, `inner` is the width of one."""

    width: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = True
    experts: int = 0
    head_width: int = 0  # 0: width / heads

    @property
    def head(self) -> int:
        return self.head_width or self.width // self.heads


SHAPES = {
    "135M": Shapes(576, 1536, 30, 9, 3, 49_152),  # SmolLM2
    "270M": Shapes(640, 2048, 18, 4, 1, 262_144, head_width=256),  # Gemma 3's, as a Llama
    "1B": Shapes(2048, 8192, 16, 32, 8, 128_256),  # Llama 3.2
    "3B": Shapes(3072, 8192, 28, 24, 8, 128_256),  # Llama 3.2
    "8B": Shapes(4096, 14_336, 32, 32, 8, 128_256, tied=False),  # Llama 3.1
    "30B-A3B": Shapes(2048, 768, 48, 32, 4, 151_936, False, 128, 128),  # Qwen3
}


@dataclass
class Measured:
    """One stage: seconds, and the most bytes of memory, disk and GPU."""

    seconds: float = 0.0
    rss: int = 0
    anonymous: int = 0
    disk: int = 0
    gpu: int = 0


@dataclass
class Row:
    """A whole run and what was planned for it."""

    name: str
    device: str
    n_processes: int
    cap: str
    n_parameters: int
    base_bytes: int
    stages: dict[str, Measured] = field(default_factory=dict)
    planned: dict[str, int] = field(default_factory=dict)  # seconds by stage
    planned_memory: dict[str, int] = field(default_factory=dict)
    planned_disk: int = 0

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages.values())

    @property
    def planned_seconds(self) -> int:
        """Those of the stages that were measured."""
        return sum(self.planned.get(name, 0) for name in self.stages)

    @property
    def disk(self) -> int:
        return max((stage.disk for stage in self.stages.values()), default=0)

    @property
    def gpu(self) -> int:
        return max((stage.gpu for stage in self.stages.values()), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shapes", choices=SHAPES, default="135M")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--profile", default="standard")
    parser.add_argument("--bpw", default="4.7")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, help="of torchrun; by default one for each GPU")
    parser.add_argument("--threads", type=int, help="of a run on a CPU")
    parser.add_argument("--tokenizer", type=Path, help="a folder with SmolLM2's tokenizer")
    parser.add_argument("--memory")
    parser.add_argument("--until", default=NAMES[-1], choices=NAMES)
    parser.add_argument("--pause", type=float, default=float("inf"))
    parser.add_argument("--plan", action="store_true", help="only say what is planned")
    parser.add_argument("--show", action="store_true", help="only print what was measured")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--more", default="", help="more options of `quantkit run`, in one string")
    options = parser.parse_args()
    if not options.show:
        measure(options)
    rows = [read_as(Row, path) for path in sorted((options.folder / "rows").glob("*.json"))]
    for row in rows:
        show(row)
    summary(rows)
    if options.plot:
        plot(rows, options.plot)


def measure(options: argparse.Namespace) -> None:
    """Make the checkpoint and run what is left of the stages; keep the row."""
    shapes = SHAPES[options.shapes]
    if options.blocks:
        shapes = Shapes(**{**asdict(shapes), "blocks": options.blocks})
    name = options.shapes + (f"-{options.blocks}" if options.blocks else "")
    model, n_gpus = options.folder / (name + "-empty" * options.plan), n_processes(options)
    if not (model / "model.safetensors.index.json").exists():
        began = time.monotonic()
        write_model(model, shapes, None if options.plan else options.device, options.tokenizer)
        print(f"checkpoint: {size_of(model) / 1e9:.2f} GB, {time.monotonic() - began:.0f} s")
    label = f"{name}-{options.device}{n_gpus}{options.memory and '-' + options.memory or ''}"
    path, run = options.folder / "rows" / f"{label}.json", options.folder / f"run-{label}"
    weights = sum(p.stat().st_size for p in model.glob("*.safetensors"))
    row = (
        read_as(Row, path)
        if path.exists()
        else Row(name, options.device, n_gpus, options.memory or "", weights // 2, weights)
    )
    path.parent.mkdir(exist_ok=True)
    arguments = run_options(options, model)
    if not options.plan:
        measure_run(options, arguments, run, row, path)
    planned(options, arguments, row)
    write_json(path, row)


def n_processes(options: argparse.Namespace) -> int:
    if options.device == "cpu":
        return options.processes or 1
    import torch

    return options.processes or torch.cuda.device_count()


def run_options(options: argparse.Namespace, model: Path) -> list[str]:
    """What a user types behind `quantkit run` or `quantkit plan`."""
    return [
        *(str(model), "--target-bpw", options.bpw, "--profile", options.profile),
        *("--device", options.device, *shlex.split(options.more)),
    ]


def measure_run(
    options: argparse.Namespace, arguments: list[str], run: Path, row: Row, path: Path
) -> None:
    from hub_server import ALICE, HubServer

    program = ["-m", "quantkit"]
    if options.device == "cuda" and options.memory:
        program = [__file__, "--capped"]
    if options.processes:
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        program = [*torchrun, f"--nproc-per-node={options.processes}", *program]
    command = [sys.executable, *program, "run", *arguments, "--out", str(run)]
    command += ["--publish", f"alice/{row.name}-GGUF"]
    with HubServer() as server, tempfile.TemporaryDirectory() as home:
        server.add_user(ALICE, "alice")
        env = {**os.environ, **server.env, "HF_TOKEN": ALICE, "HF_HOME": home}
        env |= {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
        if options.threads:
            env["OMP_NUM_THREADS"] = str(options.threads)
        if options.memory:
            env["QUANTKIT_MEMORY"] = options.memory
        process = subprocess.Popen(command, env=env, start_new_session=True)
        try:
            watch(process, options, run, row)
        finally:
            for pid in family_of(process.pid):  # torchrun's have sessions of their own
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            write_json(path, row)


def capped(arguments: list[str]) -> None:
    """Run the command line where PyTorch gets no more of the GPU than QUANTKIT_MEMORY."""
    import torch

    from quantkit import cli
    from quantkit.sizes import parse_bytes

    _, whole = torch.cuda.mem_get_info()
    share = parse_bytes(os.environ["QUANTKIT_MEMORY"]) / whole
    torch.cuda.set_per_process_memory_fraction(share)
    sys.exit(cli.main(arguments))


def planned(options: argparse.Namespace, arguments: list[str], row: Row) -> None:
    """What `quantkit plan` says of the same run."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if options.memory:
        env["QUANTKIT_MEMORY"] = options.memory
    command = [sys.executable, "-m", "quantkit", "plan", *arguments, "--json"]
    found = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True)
    estimates = json.loads(found.stdout)["estimates"]
    row.planned = estimates["stage_seconds"]
    row.planned_disk = max(estimates["disk"][name] for name in row.stages or NAMES)
    row.planned_memory = estimates["memory"]


def write_model(folder: Path, shapes: Shapes, device: str | None, tokenizer: Path | None) -> None:
    """Write one file of weights a block, several at a time; the index last. Without a device files
    have headers, and holes for weights: enough for a plan.
    """
    from safetensors.torch import save_file

    if tokenizer:
        shutil.copytree(tokenizer, folder)
    else:
        from tiny_models import write_tokenizer

        folder.mkdir(parents=True, exist_ok=True)
        write_tokenizer(folder, "smollm2")
    _config(shapes).save_pretrained(folder)
    parts = list(_parts(shapes))
    weight_map: dict[str, str] = {}

    def write(i: int) -> None:
        name = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        weight_map.update(dict.fromkeys(parts[i], name))
        if device is None:
            return write_holes(folder / name, parts[i])
        tensors = {key: _random(i, j, *of, device) for j, (key, of) in enumerate(parts[i].items())}
        save_file(tensors, folder / name, metadata={"format": "pt"})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(len(parts))))
    n_bytes = sum((folder / name).stat().st_size for name in set(weight_map.values()))
    index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_holes(path: Path, tensors: dict[str, _Of]) -> None:
    """Write a safetensors file of BF16 tensors that takes no room on the disk."""
    header, end = {}, 0
    for name, (rows, columns, _) in tensors.items():
        begin, end = end, end + 2 * rows * (columns or 1)
        shape = [rows, columns] if columns else [rows]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _config(shapes: Shapes):  # type: ignore[no-untyped-def]
    from transformers import LlamaConfig, Qwen3MoeConfig

    common = {
        "vocab_size": shapes.vocabulary,
        "hidden_size": shapes.width,
        "intermediate_size": shapes.inner,
        "num_hidden_layers": shapes.blocks,
        "num_attention_heads": shapes.heads,
        "num_key_value_heads": shapes.kv_heads,
        "head_dim": shapes.head,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": shapes.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }
    if not shapes.experts:
        return LlamaConfig(architectures=["LlamaForCausalLM"], rope_theta=500_000.0, **common)
    return Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        num_experts=shapes.experts,
        num_experts_per_tok=8,
        moe_intermediate_size=shapes.inner,
        norm_topk_prob=True,
        rope_theta=1_000_000.0,
        **common,
    )


_Of = tuple[int, int, float]  # rows, columns (0: a vector of norms), standard deviation


def _parts(shapes: Shapes) -> Iterator[dict[str, _Of]]:
    """Names and shapes of every file of weights."""
    width, kv, q = shapes.width, shapes.kv_heads * shapes.head, shapes.heads * shapes.head

    def linear(rows: int, columns: int) -> _Of:
        return rows, columns, columns**-0.5

    mlp = {
        "gate_proj": linear(shapes.inner, width),
        "up_proj": linear(shapes.inner, width),
        "down_proj": linear(width, shapes.inner),
    }
    for i in range(shapes.blocks):
        block: dict[str, _Of] = {
            "self_attn.q_proj": linear(q, width),
            "self_attn.k_proj": linear(kv, width),
            "self_attn.v_proj": linear(kv, width),
            "self_attn.o_proj": linear(width, q),
            "input_layernorm": (width, 0, 0.1),
            "post_attention_layernorm": (width, 0, 0.1),
        }
        if shapes.experts:
            block |= {"self_attn.q_norm": (shapes.head, 0, 0.1)}
            block |= {"self_attn.k_norm": (shapes.head, 0, 0.1)}
            block["mlp.gate"] = linear(shapes.experts, width)
            for expert in range(shapes.experts):
                block |= {f"mlp.experts.{expert}.{name}": of for name, of in mlp.items()}
        else:
            block |= {f"mlp.{name}": of for name, of in mlp.items()}
        yield {f"model.layers.{i}.{name}.weight": of for name, of in block.items()}
    head = SPREAD * width**-0.5
    # A tied table is the head as well.
    yield {
        "model.embed_tokens.weight": (shapes.vocabulary, width, head if shapes.tied else 1.0),
        "model.norm.weight": (width, 0, 0.1),
    }
    if not shapes.tied:
        yield {"lm_head.weight": (shapes.vocabulary, width, head)}


def _random(part: int, tensor: int, rows: int, columns: int, std: float, device: str):  # type: ignore[no-untyped-def]
    import torch

    generator = torch.Generator(device).manual_seed(1000 * part + tensor)
    shape = (rows, columns) if columns else (rows,)
    values = torch.randn(shape, generator=generator, device=device).mul_(std)
    return (values if columns else 1 + values).bfloat16().cpu()


def watch(process: subprocess.Popen, options: argparse.Namespace, run: Path, row: Row) -> None:
    """Look at the process until it ends or may pause."""
    events = run / "events.jsonl"
    began = last = time.monotonic()
    stage, looks, n_bytes, gpu_before = NAMES[0], 0, 0, gpu_bytes()
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
        measured = row.stages.setdefault(stage, Measured())
        measured.seconds += now - last
        last = now
        total, anonymous = memory_of(process.pid)
        measured.rss = max(measured.rss, total)
        measured.anonymous = max(measured.anonymous, anonymous)
        if looks % 10 == 0:
            measured.disk = max(measured.disk, size_of(run))
            measured.gpu = max(measured.gpu, gpu_bytes() - gpu_before)
            if is_finished(events, options.until):
                return
        looks += 1
        time.sleep(_EVERY)
    if process.poll():
        sys.exit(f"the run ended with {process.returncode}")


def is_finished(events: Path, stage: str) -> bool:
    """Whether a stage that is not the last has ended."""
    if stage == NAMES[-1] or not events.exists():
        return False
    said = [json.loads(line) for line in events.read_bytes().splitlines() if b"finished" in line]
    return any(event["stage"] == stage and event["kind"] == "finished" for event in said)


def gpu_bytes() -> int:
    """The most that is taken of a visible GPU, by anybody; 0 without one."""
    if shutil.which("nvidia-smi") is None:
        return 0
    ask = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        ask.append(f"--id={visible}")
    found = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    return max(int(line) for line in found.splitlines()) * 2**20


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
    key = "VmHWM"
    for own in family_of(pid):
        try:
            status = Path(f"/proc/{own}/status").read_text()
        except OSError:  # it has ended
            continue
        lines = dict(line.split(":", 1) for line in status.splitlines() if "kB" in line)
        total += 1024 * int(lines.get(key, "0").split()[0])
        anonymous += 1024 * int(lines.get("RssAnon", "0").split()[0])
        key = "VmRSS"
    return total, anonymous


def family_of(pid: int) -> list[int]:
    """A process and all that it has started, itself first."""
    found, todo = [], [pid]
    while todo:
        own = todo.pop()
        found.append(own)
        with suppress(OSError):  # it has ended
            for thread in Path(f"/proc/{own}/task").iterdir():
                children = map(int, (thread / "children").read_text().split())
                todo += [child for child in children if child not in todo]
    return found


def size_of(folder: Path) -> int:
    """Bytes on disk."""
    n_bytes = 0
    for path in folder.rglob("*"):
        try:
            n_bytes += 512 * path.stat().st_blocks if path.is_file() else 0
        except OSError:
            continue
    return n_bytes


def show(row: Row) -> None:
    """Print a run by its stages."""
    print(f"\n{_title(row)}, {row.n_parameters / 1e9:.2f}G parameters\n")
    head = ["stage", "seconds", "planned", "memory", "planned", "of it anonymous", "disk", "GPU"]
    lines = []
    for name in NAMES:
        if (stage := row.stages.get(name)) is None:
            continue
        sizes = (stage.rss, row.planned_memory.get(name, 0), stage.anonymous)
        gib = [f"{n / 2**30:.2f} GiB" for n in sizes]
        disk, gpu = f"{stage.disk / 1e9:.1f} GB", f"{stage.gpu / 2**30:.2f} GiB"
        seconds = f"{stage.seconds:.0f}", f"{row.planned.get(name, 0)}"
        lines.append([name, *seconds, *gib, disk, gpu if stage.gpu else ""])
    print(table(head, lines))


def _title(row: Row) -> str:
    where = row.device if row.device == "cpu" else f"{row.n_processes} GPU"
    return f"{row.name} on {where}{f', capped to {row.cap}' * bool(row.cap)}"


def summary(rows: list[Row]) -> None:
    """Print all runs beside what was planned."""
    head = ["run", "seconds", "planned", "disk / base", "planned", "most memory", "planned", "GPU"]
    lines = []
    for row in rows:
        memory = max((stage.rss for stage in row.stages.values()), default=0)
        planned_memory = max(row.planned_memory.values(), default=0)
        lines.append(
            [
                _title(row),
                f"{row.seconds:.0f}",
                f"{row.planned_seconds}",
                f"{row.disk / row.base_bytes:.2f}",
                f"{row.planned_disk / row.base_bytes:.2f}",
                f"{memory / 2**30:.1f} GiB",
                f"{planned_memory / 2**30:.1f} GiB",
                f"{row.gpu / 2**30:.1f} GiB" if row.gpu else "",
            ]
        )
    print(table(head, lines))


def plot(rows: list[Row], path: Path) -> None:
    """Draw seconds and disk over parameters, with the plan's as hollow marks. What was not
    measured has no mark; times are those of fetch to stitch.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    groups: dict[str, list[Row]] = {}
    for row in rows:
        where = "CPU" if row.device == "cpu" else f"{row.n_processes} GPU"
        groups.setdefault(where, []).append(row)
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for where, own in sorted(groups.items()):
        own.sort(key=lambda row: row.n_parameters)
        found = [
            ([to_stitch(row) for row in own], [planned_to_stitch(row) for row in own]),
            ([row.disk / 1e9 for row in own], [row.planned_disk / 1e9 for row in own]),
        ]
        for axis, (measured, planned_) in zip(axes, found, strict=True):
            (line,) = axis.plot(*_known(own, measured), "o-", label=where)
            axis.plot(*_known(own, planned_), "o", mfc="none", color=line.get_color())
    for axis, title in zip(axes, ("seconds to stitch", "disk, GB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="parameters, 10⁹", title=title)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter("{x:g}")
            side.set_minor_formatter("{x:g}" if side is axis.yaxis else "")
        axis.grid(visible=True, which="both", alpha=0.25)
    axes[0].legend(title="filled: measured\nhollow: planned")
    figure.savefig(path)


def _known(rows: list[Row], values: list[float]) -> tuple[list[float], list[float]]:
    """Parameters in 1e9 and values, where there are values."""
    both = [(row.n_parameters / 1e9, v) for row, v in zip(rows, values, strict=True) if v]
    return [n for n, _ in both], [v for _, v in both]


def to_stitch(row: Row) -> float:
    """Seconds of fetch to stitch; 0 where one of them is missing."""
    names = NAMES[: NAMES.index("stitch") + 1]
    if any(name not in row.stages for name in names):
        return 0.0
    return sum(row.stages[name].seconds for name in names)


def planned_to_stitch(row: Row) -> float:
    """The same as it was planned."""
    return float(sum(row.planned.get(n, 0) for n in NAMES[: NAMES.index("stitch") + 1]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--capped"]:
        capped(sys.argv[2:])
    else:
        main()
