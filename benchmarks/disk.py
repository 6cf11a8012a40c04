"""What a run holds on the disk at the peak of every stage, beside what `plan` says.

    python benchmarks/disk.py run MODEL --out FOLDER [options of quantkit run]
    python benchmarks/disk.py shapes 8B [--bpw 4.7] [--profile standard] [--device cuda]
                                        [--memory 128GiB] [--levels ...]

`run` runs the pipeline in FOLDER and looks at the blocks of its files all the time; a file with two
names counts once. `shapes` runs nothing: it is `plan` for a model of these shapes, without weights.
Both print a table by stage, in bytes and in sizes of base.gguf.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import gguf  # noqa: E402
import numpy as np  # noqa: E402
from disk_watch import watched  # noqa: E402

from quantkit.checkpoint.info import ModelInfo  # noqa: E402
from quantkit.config import PROFILES, RunConfig  # noqa: E402
from quantkit.config.targets import BitsPerWeight  # noqa: E402
from quantkit.ggml.types import STOCK_MIXES  # noqa: E402
from quantkit.gguf_file.base import load_base, load_specs  # noqa: E402
from quantkit.gguf_file.read import GgufFile  # noqa: E402
from quantkit.llamacpp.stock import StockRecipe, stock_bytes  # noqa: E402
from quantkit.markdown import table  # noqa: E402
from quantkit.pipeline import load_config, open_run  # noqa: E402
from quantkit.planning.cost import free_bytes  # noqa: E402
from quantkit.planning.disk import by_stage, footprint  # noqa: E402
from quantkit.planning.plan import made_levels, specs_of  # noqa: E402
from quantkit.sandbox.untrusted import Settings  # noqa: E402
from quantkit.sizes import parse_bytes  # noqa: E402
from quantkit.sources.snapshot import load_snapshot  # noqa: E402
from quantkit.tensors import TensorSpec  # noqa: E402


@dataclass(frozen=True)
class Shape:
    """A dense Llama; `tied`: its head is its table of embeddings."""

    n_vocab: int
    width: int
    inner: int
    n_blocks: int
    n_kv: int  # features of keys and of values
    tied: bool = False


SHAPES = {
    "135M": Shape(49_152, 576, 1536, 30, 192, True),
    "1B": Shape(128_256, 2048, 8192, 16, 512, True),
    "3B": Shape(128_256, 3072, 8192, 28, 1024, True),
    "8B": Shape(128_256, 4096, 14_336, 32, 1024),
}


def write_skeleton(path: Path, shape: Shape) -> Path:
    """A base.gguf in BF16 whose weights are a hole."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(131_072)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.n_blocks)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.width // 64)
    writer.add_head_count_kv(shape.n_kv // 64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(64)
    writer.add_tokenizer_model("llama")
    fixed = ["<unk>", "<s>", "</s>"]
    writer.add_token_list([*fixed, *(f"▁w{i}" for i in range(shape.n_vocab - 3))])
    writer.add_token_scores([0.0] * shape.n_vocab)
    writer.add_token_types([2, 3, 3] + [1] * (shape.n_vocab - 3))
    d, f, kv = shape.width, shape.inner, shape.n_kv
    tensors: dict[str, tuple[int, ...]] = {"token_embd": (shape.n_vocab, d), "output_norm": (d,)}
    if not shape.tied:
        tensors["output"] = (shape.n_vocab, d)
    for i in range(shape.n_blocks):
        own = {"attn_norm": (d,), "attn_q": (d, d), "attn_k": (kv, d), "attn_v": (kv, d)}
        own |= {"attn_output": (d, d), "ffn_norm": (d,), "ffn_gate": (f, d), "ffn_up": (f, d)}
        own |= {"ffn_down": (d, f)}
        tensors |= {f"blk.{i}.{name}": dims for name, dims in own.items()}
    n_bytes = 0
    for name, dims in tensors.items():
        kind = gguf.GGMLQuantizationType.F32 if len(dims) == 1 else gguf.GGMLQuantizationType.BF16
        size = (4 if len(dims) == 1 else 2) * dims[0] * (dims[1] if len(dims) == 2 else 1)
        writer.add_tensor_info(f"{name}.weight", dims, np.dtype(np.float32), size, raw_dtype=kind)
        n_bytes += gguf.GGUFWriter.ggml_pad(size, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = gguf.GGUFWriter.ggml_pad(path.stat().st_size, writer.data_alignment)
    os.truncate(path, header + n_bytes)
    return path


def planned(
    config: RunConfig,
    info: ModelInfo,
    base: GgufFile,
    specs: Mapping[str, TensorSpec],
    free: tuple[int, int],
    keeps_levels: bool = False,
) -> dict[str, int]:
    """What `plan` says, or what is taken where there is room; prints which levels are made."""
    made = made_levels(config, base, specs)
    print(f"levels: {', '.join(map(str, made.levels.levels))}; left out: {made.left_out}")
    stock = [stock_bytes(base, StockRecipe(label)) for label in STOCK_MIXES]
    found = footprint(config, info, base, *free)
    print({name: round(n / base.path.stat().st_size, 3) for name, n in vars(found).items()})
    sizes = made.sizes
    return by_stage(found, config, sizes.uniform, sizes.limits, stock, keeps_levels)


def show(columns: Mapping[str, Mapping[str, int]], base: int) -> None:
    """A table by stage: GB, and sizes of base.gguf."""
    stages = next(iter(columns.values()))
    rows = [
        [stage, *(f"{n[stage] / 1e9:.3f} ({n[stage] / base:.2f}x)" for n in columns.values())]
        for stage in stages
        if all(stage in n for n in columns.values())
    ]
    most = [
        f"{max(n.values()) / 1e9:.3f} ({max(n.values()) / base:.2f}x)" for n in columns.values()
    ]
    print(table(["stage, GB", *columns], [*rows, ["most", *most]]))


def of_run(model: str, out: Path, options: list[str]) -> None:
    """Run it and watch."""
    command = [sys.executable, "-m", "quantkit", "run", model, "--out", str(out), *options]
    with watched(out) as peaks:
        code = subprocess.run(command, cwd=ROOT).returncode
    directory = open_run(out)
    config, base = load_config(directory), load_base(directory)
    free = free_bytes(config.device), free_bytes("cpu")
    info = load_snapshot(directory).info
    plan = planned(config, info, base, load_specs(directory), free)
    roomy = planned(config, info, base, load_specs(directory), free, keeps_levels=True)
    show({"plan": plan, "where there is room": roomy, "run": peaks}, base.path.stat().st_size)
    sys.exit(code)


def of_shapes(given: argparse.Namespace) -> None:
    """Plan for shapes."""
    levels = tuple(given.levels.split(",")) if given.levels else None
    targets = tuple(BitsPerWeight(bpw) for bpw in given.bpw.split(","))
    config = RunConfig(
        "a/b", targets=targets, profile=given.profile, levels=levels, device=given.device
    )
    memory = parse_bytes(given.memory)
    with tempfile.TemporaryDirectory() as folder:
        base = GgufFile(write_skeleton(Path(folder) / "base.gguf", SHAPES[given.shape]))
        n_bytes = base.path.stat().st_size
        info = ModelInfo(
            kind="hub",
            id="a/b",
            revision=None,
            sha="0" * 40,
            files=(),
            weights=(),
            n_download_bytes=n_bytes,
            architectures=("LlamaForCausalLM",),
            model_type="llama",
            n_parameters=base.n_elements,
            n_by_dtype={"BF16": base.n_elements},
            dtype="BF16",
            config=Settings({}),
            quantization=None,
        )
        plan = planned(config, info, base, specs_of(base), (memory, memory))
        show({"plan": plan}, n_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="of a run")
    run.add_argument("model")
    run.add_argument("--out", type=Path, required=True)
    shapes = commands.add_parser("shapes", help="of shapes, without a run")
    shapes.add_argument("shape", choices=SHAPES)
    shapes.add_argument("--bpw", default="4.7", help="one or several, with commas")
    shapes.add_argument("--profile", default="standard", choices=PROFILES)
    shapes.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    shapes.add_argument("--memory", default="128GiB", help="free on the device and beside it")
    shapes.add_argument("--levels")
    given, options = parser.parse_known_args()
    if given.command == "run":
        of_run(given.model, given.out, options)
    else:
        of_shapes(given)


if __name__ == "__main__":
    main()
