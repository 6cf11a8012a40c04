"""Ideas for better quantizers side by side: weight KL of uniform and mixed models on held-out text.

    python benchmarks/quantizer_trials.py CHECKPOINT --calibration FILE.txt \
        --heldout wiki=FILE.txt code=FILE.txt ... [--types Q4_0,MIX.json] [--arms gptq,aimed] \
        [--device cuda] [--minutes 5] [--out FOLDER]

Every linear layer of the blocks is stored at one type (or at the types of a JSON file, module name
to type); embeddings and head stay as they are. An arm is a way to choose the bytes:

    imatrix            ggml with the diagonal of H as importances
    gptq               what the package does: every layer for the inputs of the original model
    disturbed          in order; H from the inputs that the layers quantized before it leave
    aimed, aimed-half  the same, and weights are moved first, all the way or half of it, so that
                       W' X~ is near W X
    stream             aimed, and layers that write to the residual stream make up for its error too
    X+scales, X+codes  after arm X: d and dmin (and codes, straight through) by gradient against
                       each block's output, in order
    X+kl-scales, X+kl-codes
                       the same against the whole model's KL

All of them give packed rows that a GGUF can hold. KL is that of the decoded model in float32
against the original, second half of windows of 512 tokens. Arms run in the order of the list, while
the minutes last; --out keeps the table as trials.json, written after every arm.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn
from torch.func import functional_call

from quantkit.blockwise import BlockCall, BlockwiseModel, load_model, load_tokenizer
from quantkit.gptq.compete import Inputs, solve_tensor
from quantkit.gptq.descent import RowState, put_together
from quantkit.gptq.hessian import is_linear
from quantkit.gptq.solver import factorize
from quantkit.kquants.formats import FORMATS, levels_of
from quantkit.qtypes import QuantType

N_CTX = 512
DAMPING = 0.1  # of the median of diag H, as in the package
Packed = dict[str, tuple[QuantType, torch.Tensor]]  # by the module's name in the model


@dataclass(frozen=True)
class Arm:
    """How to choose the bytes. `aim` and `stream` are how much of the difference is made up for."""

    disturbed: bool = False
    aim: float = 0.0
    stream: float = 0.0
    method: str = "gptq"


ARMS = {
    "imatrix": Arm(method="imatrix"),
    "gptq": Arm(),
    "disturbed": Arm(disturbed=True),
    "aimed-half": Arm(disturbed=True, aim=0.5),
    "aimed": Arm(disturbed=True, aim=1.0),
    "stream-half": Arm(disturbed=True, aim=0.5, stream=0.5),
    "stream": Arm(disturbed=True, aim=1.0, stream=1.0),
}
DEFAULT = (
    "imatrix,gptq,disturbed,aimed-half,aimed,stream,gptq+kl-scales,gptq+kl-codes,gptq+codes,"
    "gptq+scales,aimed+kl-codes"
)


@dataclass(frozen=True)
class Settings:
    """How much of everything."""

    n_sweeps: int
    batch: int  # sequences of a forward pass
    block_steps: int
    kl_steps: int
    rate_codes: float  # Adam's, in steps between neighbouring codes; falls to zero
    rate_scales: float  # Adam's, relative to d and dmin; falls to zero
    n_blocks: int | None  # quantize only the first ones


class Probe:
    """Inputs and outputs of a block's linear layers during one call."""

    def __init__(self, block: nn.Module) -> None:
        self._linears = {name: m for name, m in block.named_modules() if is_linear(m)}
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        def note(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                self.inputs[name], self.outputs[name] = args[0], output

            return hook

        handles = [m.register_forward_hook(note(name)) for name, m in self._linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def groups(self) -> list[tuple[str, ...]]:
        """Layers in the order of their calls, those that read the same tensor together."""
        found: dict[int, list[str]] = {}
        for name, x in self.inputs.items():
            found.setdefault(id(x), []).append(name)
        return [tuple(names) for names in found.values()]


class Trial:
    """The original, the model that is changed, and the texts."""

    def __init__(
        self,
        folder: Path,
        calibration: torch.Tensor,
        heldout: dict[str, torch.Tensor],
        device: str,
        settings: Settings,
    ) -> None:
        self.base = BlockwiseModel(load_model(folder, torch.float32, device))
        self.model = BlockwiseModel(load_model(folder, torch.float32, device))
        self.settings, self.device = settings, device
        whole = len(calibration) // settings.batch * settings.batch
        self.calibration = calibration[:whole].to(device).split(settings.batch)
        self.heldout = {name: ids.to(device) for name, ids in heldout.items()}
        self.modules = dict(self.base.model.named_modules())
        n_blocks = len(self.base.blocks) if settings.n_blocks is None else settings.n_blocks
        self.blocks = range(n_blocks)
        self.names = [
            f"{self.base.block_name(i)}.{name}"
            for i in self.blocks
            for name, m in self.base.blocks[i].named_modules()
            if is_linear(m)
        ]

    def load(self, packed: Packed) -> None:
        """Put the decoded rows into the changed model; what is not in `packed` is original."""
        mine = dict(self.model.model.named_modules())
        for name in self.names:
            mine[name].weight.data.copy_(self.modules[name].weight)
        for name, (qtype, rows) in packed.items():
            mine[name].weight.data.copy_(_values(qtype, rows))

    @torch.no_grad()
    def kl(self) -> dict[str, list[float]]:
        """Mean KL of every window by domain."""
        found = {}
        for name, windows in self.heldout.items():
            parts = []
            for ids in windows.split(self.settings.batch):
                log_p, log_q = (
                    m.model(input_ids=ids, use_cache=False).logits[:, N_CTX // 2 :].log_softmax(-1)
                    for m in (self.base, self.model)
                )
                parts.append((log_p.exp() * (log_p - log_q)).sum(-1).mean(1))
            found[name] = torch.cat(parts).tolist()
        return found

    @torch.no_grad()
    def quantize(self, arm: Arm, types: dict[str, QuantType]) -> Packed:
        """The rows of every layer, block by block, groups in the order of their calls."""
        self.load({})
        packed: Packed = {}
        hidden = [self.base.trace(ids)[0] for ids in self.calibration]
        call = self.base.trace(self.calibration[0])[1]
        ours = [h.clone() for h in hidden] if arm.disturbed else hidden
        for index in self.blocks:
            probe = Probe(self.base.blocks[index])
            with probe.watching():
                self.base.run_block(index, hidden[0], call[index])
            for group in probe.groups():
                moments = self._moments(index, group, hidden, ours, call[index], arm)
                for name in group:
                    full = f"{self.base.block_name(index)}.{name}"
                    packed[full] = types[full], self._solve(full, types[full], moments, arm)
                    if arm.disturbed:
                        target = self.model.blocks[index].get_submodule(name)
                        target.weight.copy_(_values(*packed[full]))
            if arm.disturbed:
                ours = [self.model.run_block(index, h, call[index]) for h in ours]
            hidden = [self.base.run_block(index, h, call[index]) for h in hidden]
            if not arm.disturbed:
                ours = hidden
        return packed

    def _moments(
        self,
        index: int,
        group: tuple[str, ...],
        hidden: Sequence[torch.Tensor],
        ours: Sequence[torch.Tensor],
        call: BlockCall,
        arm: Arm,
    ) -> Moments:
        """Means over tokens of the group's inputs x (original) and y (ours): y y^T, x y^T, and of
        the residual stream's difference after the group times y^T.
        """
        name, n_tokens = group[0], 0
        n = self.base.blocks[index].get_submodule(name).weight.shape[1]
        n_embd = hidden[0].shape[-1]
        own = torch.zeros(n, n, device=self.device)
        cross, stream = torch.zeros_like(own), torch.zeros(n_embd, n, device=self.device)
        writes = len(group) == 1 and self.modules_of(index)[name].weight.shape[0] == n_embd
        for before, after in zip(hidden, ours, strict=True):
            theirs, mine = Probe(self.base.blocks[index]), Probe(self.model.blocks[index])
            with theirs.watching():
                self.base.run_block(index, before, call)
            if arm.disturbed:
                with mine.watching():
                    self.model.run_block(index, after, call)
            else:
                mine = theirs
            x, y = theirs.inputs[name].reshape(-1, n), mine.inputs[name].reshape(-1, n)
            own.addmm_(y.T, y)
            n_tokens += len(x)
            if arm.aim:
                cross.addmm_(x.T, y)
            if arm.stream and writes:
                gap = _written(theirs, before, name) - _written(mine, after, name)
                stream.addmm_(gap.reshape(-1, n_embd).T, y)
        return Moments(own / n_tokens, cross / n_tokens, stream / n_tokens, writes)

    def modules_of(self, index: int) -> dict[str, nn.Module]:
        return dict(self.base.blocks[index].named_modules())

    def _solve(self, name: str, qtype: QuantType, moments: Moments, arm: Arm) -> torch.Tensor:
        weight = self.modules[name].weight
        own = moments.own
        factor = factorize(own, DAMPING) if arm.method == "gptq" else None
        inputs = Inputs(own.diagonal().cpu().numpy().copy(), own, own, factor)
        if arm.aim or arm.stream:
            root = torch.linalg.cholesky(inputs.damped)
            wanted = torch.zeros_like(weight)
            if (
                arm.stream and moments.writes
            ):  # the layer's own difference is a part of the stream's
                wanted += arm.stream * moments.stream
            elif arm.aim:
                wanted += arm.aim * (weight @ (moments.cross - own))
            weight = weight + torch.cholesky_solve(wanted.T, root).T
        solved = solve_tensor(
            weight.cpu().numpy(), [qtype], (arm.method,), inputs, None, self.settings.n_sweeps
        )
        return torch.from_numpy(solved[qtype].packed).to(self.device)

    def tune_blocks(self, packed: Packed, with_codes: bool) -> Packed:
        """Every block against the original's output, its inputs being those that the tuned blocks
        before it give.
        """
        self.load(packed)
        tuned: Packed = {}
        with torch.no_grad():
            hidden = [self.base.trace(ids)[0] for ids in self.calibration]
            call = self.base.trace(self.calibration[0])[1]
            ours = [h.clone() for h in hidden]
        for index in self.blocks:
            prefix = self.base.block_name(index)
            with torch.no_grad():
                wanted = [self.base.run_block(index, h, call[index]) for h in hidden]
            own = {name: p for name, p in packed.items() if name.startswith(prefix + ".")}
            rows = self._tunables(own, with_codes)
            block = self.model.blocks[index]

            loss = self._block_loss(index, rows, ours, wanted, call[index])
            self._descend(loss, rows, self.settings.block_steps)
            of_block = {name: (own[name][0], r.packed()) for name, r in rows.items()}
            tuned |= of_block
            with torch.no_grad():
                for name, (qtype, values) in of_block.items():
                    target = block.get_submodule(name[len(prefix) + 1 :])
                    target.weight.copy_(_values(qtype, values))
                ours = [self.model.run_block(index, h, call[index]) for h in ours]
            hidden = wanted
        return tuned

    def _block_loss(
        self,
        index: int,
        rows: dict[str, Tunable],
        ours: Sequence[torch.Tensor],
        wanted: Sequence[torch.Tensor],
        call: BlockCall,
    ) -> Callable[[int], torch.Tensor]:
        """The mean squared error of the block's output, by batch."""
        block, skip = self.model.blocks[index], len(self.base.block_name(index)) + 1

        def loss(batch: int) -> torch.Tensor:
            weights = {f"{name[skip:]}.weight": r.weight() for name, r in rows.items()}
            answer = functional_call(block, weights, (ours[batch], *call.args), call.kwargs)
            answer = answer[0] if isinstance(answer, tuple) else answer
            return (answer - wanted[batch]).square().mean()

        return loss

    def tune_whole(self, packed: Packed, with_codes: bool) -> Packed:
        """All layers together against the KL of the whole model."""
        self.load(packed)
        rows = self._tunables(packed, with_codes)

        def loss(batch: int) -> torch.Tensor:
            ids = self.calibration[batch]
            with torch.no_grad():
                log_p = self.base.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
            weights = {f"{name}.weight": r.weight() for name, r in rows.items()}
            answer = functional_call(
                self.model.model, weights, (), {"input_ids": ids, "use_cache": False}
            )
            log_q = answer.logits.log_softmax(-1)
            return (
                nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True) / ids.numel()
            )

        self._descend(loss, rows, self.settings.kl_steps)
        return {name: (packed[name][0], r.packed()) for name, r in rows.items()}

    def _tunables(self, packed: Packed, with_codes: bool) -> dict[str, Tunable]:
        return {
            name: Tunable(qtype, rows, self.modules[name].weight, with_codes)
            for name, (qtype, rows) in packed.items()
        }

    def _descend(
        self, loss: Callable[[int], torch.Tensor], rows: dict[str, Tunable], n_steps: int
    ) -> None:
        codes = [r.level for r in rows.values() if r.level.requires_grad]
        groups = [
            {"params": [r.scales for r in rows.values()], "lr": self.settings.rate_scales},
            {"params": codes, "lr": self.settings.rate_codes},
        ]
        optimizer = torch.optim.Adam([g for g in groups if g["params"]], betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / n_steps)
        generator = torch.Generator().manual_seed(0)
        order: list[int] = []
        with _fast_products():
            for _ in range(n_steps):
                order = order or torch.randperm(len(self.calibration), generator=generator).tolist()
                optimizer.zero_grad(set_to_none=True)
                with torch.enable_grad():
                    loss(order.pop()).backward()
                optimizer.step()
                schedule.step()


@dataclass(frozen=True)
class Moments:
    own: torch.Tensor
    cross: torch.Tensor
    stream: torch.Tensor
    writes: bool  # whether the group writes to the residual stream


def _written(probe: Probe, before: torch.Tensor, last: str) -> torch.Tensor:
    """The residual stream after layer `last`: the block's input and all that was written to it."""
    stream = before
    for group in probe.groups():
        (name, *others) = group
        if not others and probe.outputs[name].shape == before.shape:
            stream = stream + probe.outputs[name]
        if name == last:
            break
    return stream


class Tunable:
    """Packed rows whose d and dmin (and codes) are reached by gradients.

    `scales` are relative changes of d, then of dmin; `level` what the codes are rounded from, in
    units of the mean step between codes.
    """

    def __init__(
        self, qtype: QuantType, packed: torch.Tensor, weight: torch.Tensor, with_codes: bool
    ) -> None:
        self.form = FORMATS[qtype]
        self._rows = packed
        n_rows = len(packed)
        blocks = self.form.blocks(packed)
        self._halves = self.form.scales(packed)
        self._scale, self._minimum = (
            x.reshape(n_rows, -1).float().contiguous() for x in self.form.multipliers(blocks)
        )
        self._codes = self.form.codes(packed)
        table = self.form.table
        self._unit = 1.0 if table is None else (table[-1] - table[0]) / (len(table) - 1)
        ends = (self.form.low, self.form.high) if table is None else (table[0], table[-1])
        self._range = ends[0] - self._unit / 2, ends[1] + self._unit / 2
        grid = self.form.grid(packed)
        step = grid.scale.repeat_interleave(grid.group, 1)
        floor = grid.minimum.repeat_interleave(grid.group, 1)
        level = (weight.float() - floor) / torch.where(step == 0, 1.0, step)
        low, high = self._cell()
        margin = 0.02 * (high - low)
        level = torch.minimum(torch.maximum(level, low + margin), high - margin)
        level = torch.where(step == 0, levels_of(self._codes, table), level)
        self.level = (level / self._unit).requires_grad_(with_codes)
        self.scales = torch.zeros_like(self._halves).requires_grad_(True)

    def _cell(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The levels that round to the codes."""
        if self.form.table is None:
            codes = self._codes.float()
            return codes - 0.5, codes + 0.5
        table = torch.tensor(self.form.table, dtype=torch.float32, device=self._codes.device)
        middle = (table[1:] + table[:-1]) / 2
        bounds = torch.cat([2 * table[:1] - middle[:1], middle, 2 * table[-1:] - middle[-1:]])
        return bounds[self._codes.long()], bounds[self._codes.long() + 1]

    def _rounded(self) -> torch.Tensor:
        """Codes as they are now."""
        if not self.level.requires_grad:
            return self._codes
        return self.form.nearest(self.level.detach() * self._unit)

    def weight(self) -> torch.Tensor:
        """float32 (n_rows, n_columns), with gradients."""
        levels = levels_of(self._rounded(), self.form.table)
        if self.level.requires_grad:
            soft = self.level * self._unit
            inside = soft.clamp(*self._range)  # beyond the last codes nothing pulls
            levels = levels + inside - inside.detach()
        halves = self._halves * (1 + self.scales)
        n_rows, n_blocks = len(levels), self.form.blocks(self._rows).shape[1]
        per_block = self._scale.shape[1] // n_blocks

        def widen(per_row: torch.Tensor, integers: torch.Tensor) -> torch.Tensor:
            return (per_row[..., None] * integers.view(n_rows, n_blocks, per_block)).view(
                n_rows, -1
            )

        grouped = levels.view(n_rows, -1, self.form.group)
        values = grouped * widen(halves[:, :n_blocks], self._scale)[..., None]
        if self.form.dmin_at is not None:
            minimum = widen(halves[:, n_blocks:], self._minimum)[..., None]
            values = values + self.form.dmin_sign * minimum
        return values.view(n_rows, -1)

    @torch.no_grad()
    def packed(self) -> torch.Tensor:
        """The rows as bytes."""
        halves = (self._halves * (1 + self.scales)).half().float()
        n_blocks = self.form.blocks(self._rows).shape[1]
        state = RowState(
            self.form,
            self._rounded().to(torch.int8),
            halves[:, :n_blocks],
            halves[:, n_blocks:],
            self._scale,
            self._minimum,
            self._halves,
        )
        return put_together(state, self._rows)


def _values(qtype: QuantType, packed: torch.Tensor) -> torch.Tensor:
    return FORMATS[qtype].values(packed)


@contextmanager
def _fast_products() -> Iterator[None]:
    """Tensor cores for the gradients."""
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "tf32"
    try:
        yield
    finally:
        setting.fp32_precision = before


def tokens_of(tokenizer: Any, path: Path, n_tokens: int) -> torch.Tensor:
    """int64 (n, N_CTX) of a text, in its order."""
    ids = tokenizer(path.read_text("utf-8"), verbose=False).input_ids
    n = min(len(ids), n_tokens) // N_CTX
    return torch.tensor(ids[: n * N_CTX]).view(n, N_CTX)


def types_of(spec: str, names: Sequence[str]) -> dict[str, QuantType]:
    """The type of every layer: one for all, or those of a JSON file."""
    if not spec.endswith(".json"):
        return dict.fromkeys(names, QuantType(spec))
    said = json.loads(Path(spec).read_text())
    return {name: QuantType(said[name]) for name in names}


def summary(rows: dict[str, list[float]], reference: dict[str, list[float]]) -> str:
    """KL by domain and its ratio to the reference's, with the ratio's standard error."""
    words = []
    for domain, kls in rows.items():
        own, other = torch.tensor(kls), torch.tensor(reference[domain])
        ratio = float(own.mean() / other.mean())
        spread = (own - ratio * other).std() / other.mean() / math.sqrt(len(own))
        words.append(f"{domain} {own.mean():.5f} {ratio:.3f}({spread * 1000:.0f})")
    return "  ".join(words)


def run_arm(trial: Trial, name: str, types: dict[str, QuantType], made: dict[str, Packed]) -> None:
    """Makes the rows of an arm, and first those of the arm that it starts from."""
    start, _, tuning = name.partition("+")
    if start not in made:
        made[start] = trial.quantize(ARMS[start], types)
    if tuning:
        tune = trial.tune_whole if tuning.startswith("kl-") else trial.tune_blocks
        made[name] = tune(made[start], tuning.endswith("codes"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--heldout", nargs="+", required=True, help="NAME=FILE.txt")
    parser.add_argument("--types", default="Q4_0")
    parser.add_argument("--arms", default=DEFAULT)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--eval-tokens", type=int, default=16384, help="of each domain")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a forward pass")
    parser.add_argument("--block-steps", type=int, default=200)
    parser.add_argument("--kl-steps", type=int, default=256)
    parser.add_argument("--rate-codes", type=float, default=5e-3)
    parser.add_argument("--rate-scales", type=float, default=5e-4)
    parser.add_argument("--sweeps", type=int, default=4)
    parser.add_argument("--blocks", type=int, help="quantize only the first ones")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no arm begins after them")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    begun = time.perf_counter()
    settings = Settings(
        given.sweeps,
        given.batch,
        given.block_steps,
        given.kl_steps,
        given.rate_codes,
        given.rate_scales,
        given.blocks,
    )
    tokenizer = load_tokenizer(given.checkpoint)
    files = dict(entry.split("=", 1) for entry in given.heldout)
    heldout = {n: tokens_of(tokenizer, Path(f), given.eval_tokens) for n, f in files.items()}
    calibration = tokens_of(tokenizer, given.calibration, given.tokens)
    trial = Trial(given.checkpoint, calibration, heldout, given.device, settings)
    print(f"{calibration.numel()} tokens, {len(trial.names)} layers, torch {torch.__version__}")
    results: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(given).items()}}
    for spec in given.types.split(","):
        types, made = types_of(spec, trial.names), {}
        label = Path(spec).stem
        results[label] = {}
        for name in given.arms.split(","):
            if time.perf_counter() - begun > 60 * given.minutes:
                print(f"{label:8} {name:16} left out: the time is over")
                continue
            start = time.perf_counter()
            run_arm(trial, name, types, made)
            taken = time.perf_counter() - start
            trial.load(made[name])
            kls = trial.kl()
            results[label][name] = {"seconds": taken, "kl": kls}
            reference = results[label].get("gptq", results[label][name])["kl"]
            print(f"{label:8} {name:16} {taken:6.1f} s  {summary(kls, reference)}", flush=True)
            if given.out:
                given.out.mkdir(parents=True, exist_ok=True)
                (given.out / "trials.json").write_text(json.dumps(results) + "\n")
    if given.device == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
