"""Where quantize spends its time on a GPU: blocks of true shapes from hidden states to slots.

    python benchmarks/quantize_block.py                        # an 8B block, a layer of 128 experts
    python benchmarks/quantize_block.py --device cpu --small   # tiny shapes, to try it
    python benchmarks/quantize_block.py --shapes mixture --memory 4GiB
    python benchmarks/quantize_block.py --shapes "large mixture" --levels Q4_K --once

The models have random weights and one block; only shapes matter. A block is run three times: to
compile kernels, as quantize runs it, and with a clock around every part that waits for the GPU
before and after. (On a CPU two threads share that clock, and its parts are not right.) The whole
model's seconds are extrapolated. A line of JSON for each model follows its table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import gguf
import numpy as np
import torch
from one_pass import large_mixture, llama, mixture

from quantkit.config import RunConfig
from quantkit.config.levels import plan_levels
from quantkit.ggml.types import BF16, QuantType
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.write import SlotFile, lay_out
from quantkit.gptq import inputs, select, units
from quantkit.markdown import table
from quantkit.model.blockwise import BlockwiseModel
from quantkit.model.row_maps import RowMap
from quantkit.sizes import parse_bytes
from quantkit.statistics import collect
from quantkit.statistics.fisher import Fisher
from quantkit.statistics.inputs import BlockStatistics, InputStatistics
from quantkit.statistics.stored import Gradients
from quantkit.tensors import TensorSpec

LEVELS = "Q3_K,IQ4_XS,Q4_K,Q5_K,Q6_K"
MODELS = {"8B": llama, "mixture": mixture, "large mixture": large_mixture}
N_BLOCKS = {"8B": 32, "mixture": 48, "large mixture": 58}
_KINDS = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


@dataclass
class Clock:
    """Seconds by part. What runs inside of a part is taken out of the part around it."""

    device: str
    spent: dict[str, float] = field(default_factory=dict)
    _inside: list[float] = field(default_factory=list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._wait()
        begun = time.perf_counter()
        self._inside.append(0.0)
        yield
        self._wait()
        taken = time.perf_counter() - begun
        self.spent[name] = self.spent.get(name, 0.0) + taken - self._inside.pop()
        if self._inside:
            self._inside[-1] += taken

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Put the clock around the parts of quantize."""

        def grid(_: object, qtype: QuantType, known: object, *__: object) -> str:
            return f"grid {qtype} {'imatrix' if known else 'rtn'}"

        watched: list[tuple[Any, str, str | Callable[..., str]]] = [
            (collect, "_run", "forward and Hessians"),
            (BlockStatistics, "of", "Hessians: means"),
            (inputs, "factorize", "Cholesky"),
            (select, "_ggml", grid),
            (select, "gptq_experts", "GPTQ"),
            (select, "descend", lambda form, *_: f"descent {form.qtype}"),
            (select, "row_errors", "errors, train"),
            (select, "_parts", "errors, held out"),
            (select.Part, "on_cpu", "rows to the CPU"),
            (select, "_decide", "rows to the CPU"),
            (units, "decide_experts", "experts put together"),
            (units, "_as_stored", "reading"),
            (SlotFile, "write", "writing"),
            (SlotFile, "flush", "flush to disk"),
        ]
        before = [(owner, name, owner.__dict__[name]) for owner, name, _ in watched]
        try:
            for owner, name, part in watched:
                setattr(owner, name, self._timed(getattr(owner, name), part))
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def _timed(self, function: Any, part: str | Callable[..., str]) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part if isinstance(part, str) else part(*args)):
                return function(*args, **kwargs)

        return timed


def write_base(path: Path, model: BlockwiseModel) -> dict[str, RowMap]:
    """Write the block's weights as a `base.gguf` and return where its rows come from."""
    writer = gguf.GGUFWriter(path, "llama")
    maps = {}
    for name, parameter in model.blocks[0].named_parameters():
        module = f"{model.block_name(0)}.{name}"
        parts = name.split(".")
        if parameter.dim() == 3:
            n_experts, n_rows, _ = parameter.shape
            kinds = ["gate", "up"] if "gate_up" in name else ["down"]
            rows = torch.arange(n_experts * n_rows).view(n_experts, len(kinds), -1)
            for i, kind in enumerate(kinds):
                own = rows[:, i].flatten()
                tensor = f"blk.0.ffn_{kind}_exps.weight"
                maps[tensor] = RowMap(tensor, module, False, own, module, False)
                values = parameter.flatten(0, 1)[own.to(parameter.device)]
                add(writer, tensor, values.view(n_experts, -1, parameter.shape[2]))
        elif parts[-1] == "weight" and parts[-2] in _KINDS:
            tensor = f"blk.0.{_KINDS[parts[-2]]}.weight"
            module = module.removesuffix(".weight")
            maps[tensor] = RowMap(tensor, f"{module}.weight", False, None, module, False)
            add(writer, tensor, parameter)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return maps


def add(writer: gguf.GGUFWriter, name: str, values: torch.Tensor) -> None:
    packed = values.contiguous().cpu().view(torch.uint8).numpy()
    writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.BF16)


def make_work(
    folder: Path, model: BlockwiseModel, config: RunConfig, maps: dict[str, RowMap]
) -> units.Work:
    base = GgufFile(folder / "base.gguf")
    specs = {t.name: TensorSpec(t.name, t.shape, BF16, True) for t in base.tensors.values()}
    plan = plan_levels(specs, config)
    files = {q: SlotFile(folder / f"{q}.gguf", lay_out(base, plan.uniform(q))) for q in plan.levels}
    n_rows: dict[str, int] = {}
    for name, map_ in maps.items():
        spec = specs[name]
        n_rows[map_.module] = n_rows.get(map_.module, 0) + spec.n_rows
    prices = {module: torch.rand(n) for module, n in n_rows.items()}
    nothing = InputStatistics(("none",), 1, torch.eye(1), torch.eye(1))
    gradients = Gradients(Fisher(prices, torch.ones(1)), nothing)
    return units.Work(config, 4, base, plan, files, (), maps, gradients)


def quantize(model: BlockwiseModel, work: units.Work, n_sequences: int, folder: Path) -> int:
    """The block from hidden states to flushed slots; return how many turns it took."""
    ids = np.random.default_rng(0).integers(0, 2048, (n_sequences, 512))
    tokens = {"train": ids[: n_sequences * 4 // 5], "heldout": ids[n_sequences * 4 // 5 :]}
    done = [f"block-{index:03d}" for index in range(1, len(model.blocks))] + ["head"]
    n_turns = 0

    def use(_: str, turns: Iterable[BlockStatistics]) -> None:
        nonlocal n_turns
        unit = units.Unit(work)
        for statistics in turns:
            n_turns += 1
            unit.add(statistics)
            del statistics
        unit.end()
        for file in work.files.values():
            file.flush()

    collect.walk(model, tokens, done, use, folder / "states")
    return n_turns


def measure(shapes: str, arguments: argparse.Namespace) -> None:
    device, is_cuda = arguments.device, arguments.device == "cuda"
    os.environ.pop("QUANTKIT_MEMORY", None)
    model = MODELS[shapes](arguments.small, device)
    config = RunConfig("m", levels=tuple(arguments.levels.split(",")), device=device)
    clock = Clock(device)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        maps = write_base(folder / "base.gguf", model)
        work = make_work(folder, model, config, maps)
        if arguments.memory:
            os.environ["QUANTKIT_MEMORY"] = arguments.memory
        if arguments.memory and is_cuda:  # no more is to be had
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(parse_bytes(arguments.memory) / total)
        begun = time.perf_counter()
        if not arguments.once:
            quantize(model, work, max(10, arguments.sequences // 16), folder)
            print(f"{shapes}: kernels compiled, {time.perf_counter() - begun:.1f} s", flush=True)
        if is_cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        n_turns = quantize(model, work, arguments.sequences, folder)
        if is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        gib = torch.cuda.max_memory_allocated() / 2**30 if is_cuda else 0.0
        if not arguments.once:
            with clock.watching(), clock.part("all else"):
                quantize(model, work, arguments.sequences, folder)
    whole = sum(clock.spent.values())
    rows = [
        [part, f"{taken:.3f}", f"{taken / whole:.1%}"]
        for part, taken in sorted(clock.spent.items(), key=lambda item: -item[1])
    ]
    if rows:
        print(table([f"{shapes}, one block", "seconds", "share"], rows))
    n_weights = sum(spec.n_bytes for spec in work.base.tensors.values()) // 2
    found = {
        "shapes": shapes,
        "memory": arguments.memory or "all",
        "levels": arguments.levels,
        "tokens": arguments.sequences * 512,
        "weights": n_weights,
        "turns": n_turns,
        "seconds": round(seconds, 2),
        "whole model": round(seconds * N_BLOCKS[shapes]),
        "GiB": round(gib, 2),
        "parts": {part: round(taken, 3) for part, taken in clock.spent.items()},
    }
    print(json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--shapes", default="8B,mixture", help="default: 8B,mixture")
    parser.add_argument("--levels", default=LEVELS, help=f"default: {LEVELS}")
    parser.add_argument("--sequences", type=int, default=320, help="of 512 tokens (default: 320)")
    parser.add_argument("--once", action="store_true", help="without the clock around the parts")
    parser.add_argument("--memory", help="QUANTKIT_MEMORY of the run, such as 4GiB")
    parser.add_argument("--folder", help="where files are written, instead of the system's")
    arguments = parser.parse_args()
    for shapes in arguments.shapes.split(","):
        measure(shapes, arguments)


if __name__ == "__main__":
    main()
