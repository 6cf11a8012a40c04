"""How codebooks are best tuned: one small model, many settings, in one process.

    python benchmarks/small_model.py MODEL --width 256 --inner 768 --layers 4 --device cuda
    python dev/experiments/tuned_units.py MODEL --types IQ2_XXS,IQ3_XXS,IQ1_M [--device cuda] \
        --try steps=200 --try steps=200,rate_units=0.03 --try steps=200,norms=0.001

All linear layers of the blocks get one type: GPTQ and descent by Hessians of text that is the
model's own `eval.txt`, of which seven tenths are also what blocks are tuned on. Every --try is a
line of JSON with KL(original || file) on the rest of that text, before and after, and each block's
error after tuning over that before on held-out sequences. A try sets fields of `Effort`, and:
`norms`, the rate (relative) of the blocks' norm gains, which no file would hold; `toward`, how far
levels begin from their entry towards the original, in shares of what leaves the entry the nearest.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import nn

from quantkit.ggml.codebooks import UNIT
from quantkit.ggml.decode import values_of
from quantkit.ggml.types import QuantType
from quantkit.gptq.inputs import make_inputs
from quantkit.gptq.select import solve_tensor
from quantkit.model.blockwise import BlockwiseModel, load_model, load_tokenizer
from quantkit.model.row_maps import RowMap
from quantkit.tuning import tuner as tuning
from quantkit.tuning.shards import Shards
from quantkit.tuning.tunable_units import TunableUnits
from quantkit.tuning.tuner import Effort, Stored, TunedBlock, Tuner
from quantkit.tuning.units import nearest

METHODS = ("gptq", "imatrix")
HESSIAN, HELDOUT, JUDGED = 96, 24, 64  # sequences
CPU = torch.device("cpu")

File = dict[str, Stored]


class Trial(Tuner):
    """A tuner that can also move norm gains, and begin levels elsewhere."""

    norms = toward = 0.0
    found: dict[str, torch.Tensor]
    _changes: dict[str, torch.Tensor]
    _moves: bool = True

    def block(self, index: int, known: TunedBlock | None = None) -> TunedBlock:
        named = self._model.blocks[index].named_parameters()
        self._gains = {n: p.data.clone() for n, p in named if p.dim() == 1}
        self._changes = {n: torch.zeros_like(p).requires_grad_() for n, p in self._gains.items()}
        self._changes = self._changes if self.norms else {}
        tuned = super().block(index, known)
        prefix = self._model.block_name(index) + "."
        if tuned.rows:
            self.found |= {prefix + n: w.detach() for n, w in self._moved().items()}
        return tuned

    def _moved(self) -> dict[str, torch.Tensor]:
        return {n: self._gains[n] * (1 + change) for n, change in self._changes.items()}

    def _run(self, *given: Any) -> torch.Tensor:
        *others, weights = given
        return super()._run(*others, {**weights, **(self._moved() if self._moves else {})})

    def _pass(self, stream: str, *given: Any) -> None:
        self._moves = stream == "tuned"
        super()._pass(stream, *given)
        self._moves = True

    def _tune(self, index: int, plain: Mapping[str, torch.Tensor]) -> TunedBlock:
        groups = tuning._groups
        gains = (
            [{"params": list(self._changes.values()), "lr": self.norms}] if self._changes else []
        )
        tuning._groups = lambda rows, effort: groups(rows, effort) + gains
        try:
            tuned = super()._tune(index, plain)
        finally:
            tuning._groups = groups
        self._changes = self._changes if tuned.rows else {}
        return tuned

    def _tunable(self, name: str, packed: torch.Tensor, shards: Shards) -> Any:
        rows = super()._tunable(name, packed, shards)
        if self.toward and isinstance(rows, TunableUnits):
            begin_towards(rows, self._model.model.get_parameter(name).data, self.toward)
        return rows


@torch.no_grad()
def begin_towards(rows: TunableUnits, weight: torch.Tensor, share: float) -> None:
    """Move levels from their entries towards the original's, a share of what is possible."""
    scale = rows.scale().repeat_interleave(rows.book.group, 1)
    entry = (rows.level * rows.unit).view(-1, UNIT)
    wanted = torch.where(scale == 0, 0.0, weight / torch.where(scale == 0, 1.0, scale))
    way = wanted.view(-1, UNIT) - entry
    half = rows.half.repeat_interleave(rows.book.group // UNIT, 1).flatten()
    own = nearest(rows.book, entry, half)

    def stays(at: torch.Tensor) -> torch.Tensor:
        found = nearest(rows.book, entry + at * way, half)
        return ((found.entry == own.entry).all(1) & (found.signs == own.signs))[:, None]

    low, high = torch.zeros_like(way[:, :1]), torch.ones_like(way[:, :1])
    whole = stays(high)
    for _ in range(6):
        middle = (low + high) / 2
        good = stays(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    moved = entry + share * torch.where(whole, 1.0, low) * way
    rows.level.copy_((moved / rows.unit).view_as(rows.level))


class Lab:
    """A model, its text in three parts, and its layers in some types."""

    def __init__(self, folder: Path, n_ctx: int, device: str) -> None:
        self.model = load_model(folder, torch.float32, device)
        text = (folder / "eval.txt").read_text("utf-8")
        ids = torch.tensor(load_tokenizer(folder)(text, verbose=False).input_ids)
        ids = ids[: len(ids) // n_ctx * n_ctx].view(-1, n_ctx).to(device)
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(1)).to(device)]
        n = len(ids) * 7 // 10
        self.train, self.heldout = ids[:n], ids[n : n + HELDOUT]
        self.judged = ids[n + HELDOUT :][:JUDGED].split(8)
        self.wanted = [self._log_p(self.model, batch) for batch in self.judged]
        self.linears = [
            name
            for name, module in self.model.named_modules()
            if type(module) is nn.Linear and "layers" in name
        ]
        self.maps = {
            f"{n}.weight": RowMap(f"{n}.weight", f"{n}.weight", False, None, n, False)
            for n in self.linears
        }

    @staticmethod
    def _log_p(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(ids, use_cache=False).logits.float().log_softmax(-1)
        return found

    def files(self, types: Sequence[QuantType], n_sweeps: int) -> dict[QuantType, File]:
        """All linear layers of the blocks, in each of the types."""
        hessians: dict[str, torch.Tensor] = {}

        def add(name: str) -> Any:
            def hook(_: nn.Module, given: tuple[torch.Tensor]) -> None:
                x = given[0].flatten(0, -2).float()
                hessians[name] = hessians.get(name, 0) + (x.T @ x).cpu()

            return hook

        hooks = [
            self.model.get_submodule(n).register_forward_pre_hook(add(n)) for n in self.linears
        ]
        for batch in self.train[:HESSIAN].split(8):
            self.model(batch, use_cache=False)
        for hook in hooks:
            hook.remove()
        found: dict[QuantType, File] = {qtype: {} for qtype in types}
        for name in self.linears:
            hessian = hessians[name] / HESSIAN
            inputs = make_inputs(hessian, hessian, METHODS, "cpu")
            weight = self.model.get_submodule(name).weight.data.cpu()
            solved = solve_tensor(weight, types, METHODS, inputs, None, n_sweeps)
            for qtype in types:
                found[qtype][f"{name}.weight"] = Stored(qtype, solved[qtype].packed)
        return found

    def kl(self, file: File, gains: Mapping[str, torch.Tensor]) -> float:
        """Mean KL(original || file) in nats per token."""
        changed = copy.deepcopy(self.model)
        for name, stored in file.items():
            values = values_of(stored.packed, stored.qtype, CPU)
            changed.get_parameter(name).data.copy_(values)
        for name, gain in gains.items():
            changed.get_parameter(name).data.copy_(gain)
        total = 0.0
        for ids, wanted in zip(self.judged, self.wanted, strict=True):
            total += float((wanted.exp() * (wanted - self._log_p(changed, ids))).sum())
        return total / sum(ids.numel() for ids in self.judged)

    def trial(self, file: File, given: Mapping[str, float]) -> dict[str, Any]:
        """Tune a file as one --try says."""
        fields = dict(given)
        norms, toward = fields.pop("norms", 0.0), fields.pop("toward", 0.0)
        n_steps, n_batch = int(fields.pop("steps", 200)), int(fields.pop("batch", 2))
        begun, now = time.perf_counter(), dict(file)
        with tempfile.TemporaryDirectory() as scratch:
            model = BlockwiseModel(copy.deepcopy(self.model))
            effort = Effort(n_steps, n_batch, **fields)
            rest = self.train, self.heldout, effort, Path(scratch)
            tuner = Trial(model, self.maps, file, *rest, exact=False)
            tuner.norms, tuner.toward, tuner.found = norms, toward, {}
            errors = []
            for index in range(tuner.n_blocks):
                block = tuner.block(index)
                errors.append(round(block.after / block.before, 3))
                now |= {n: Stored(file[n].qtype, rows) for n, rows in block.rows.items()}
            before, after = tuner.kl()
        taken = round(time.perf_counter() - begun, 1)
        heldout = round(after / before, 3)
        return {"kl": self.kl(now, tuner.found), "heldout": heldout, "blocks": errors, "s": taken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--types", required=True)
    parser.add_argument("--try", action="append", default=[], dest="tries")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--sweeps", type=int, default=4)
    given = parser.parse_args()
    lab = Lab(given.model, given.context, given.device)
    types = [QuantType(name) for name in given.types.split(",")]
    begun = time.perf_counter()
    files = lab.files(types, given.sweeps)
    print(f"quantized in {time.perf_counter() - begun:.0f} s", flush=True)
    for qtype, file in files.items():
        before = lab.kl(file, {})
        print(json.dumps({"type": str(qtype), "kl": round(before, 5)}), flush=True)
        for tried in given.tries:
            pairs = (pair.split("=") for pair in tried.split(","))
            row = lab.trial(file, {key: float(value) for key, value in pairs})
            row["ratio"] = round(row["kl"] / before, 3)
            print(json.dumps({"type": str(qtype), "try": tried, **row}), flush=True)


if __name__ == "__main__":
    main()
