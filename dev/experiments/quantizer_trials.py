"""Ideas for better quantizers side by side: weight KL of uniform and mixed models on held-out text.

    python dev/experiments/quantizer_trials.py CHECKPOINT --calibration FILE.txt \
        --heldout wiki=FILE.txt code=FILE.txt ... [--types Q4_0,MIX.json] [--arms gptq,aimed] \
        [--device cuda] [--minutes 5] [--out FOLDER]

Every linear layer of the blocks is stored at one type (or at the types of a JSON file, module name
to type); embeddings and head stay as they are. An arm is a way to choose the bytes:

    imatrix            ggml with the diagonal of H as importances
    gptq               what the package does: every layer for the inputs of the original model
    disturbed          in order; H from the inputs that the layers quantized before it leave
    aimed, aimed-half  the same, and weights are moved first, all the way or half of it, so that
                       W' X~ is near W X
    stream, stream-half  aimed, and layers that write to the residual stream make up for its error
                       too
    weighted            gptq, every token counted by the squared gradient at the layer's output
    weighted-root       the same by the gradient's norm
    rows                gptq under the Kronecker product of H and G, the mean outer product of those
                        gradients: rows make up for each other's errors (YAQA, arXiv:2505.22988),
                        in layers where gradients of other tokens say that it helps
    rows-weighted       both
    aimed-fit, stream-fit  how far, and against what ridge, is what is best on the other half of
                       the tokens, each layer for itself
    X+scales, X+codes  after arm X: d and dmin (and codes, straight through) by gradient against
                       each block's output, in order
    X+fisher-scales, X+fisher-codes, X+diagonal-scales, X+diagonal-codes
                       the same, errors weighted by the gradients' mean outer product there, or by
                       its diagonal; X+relative-codes: over the power of the token
    X+kl-scales, X+kl-codes
                       the same against the whole model's KL; tunings may follow each other

All of them give packed rows that a GGUF can hold. KL is that of the decoded model in float32
against the original, second half of windows of 512 tokens; gradients are taken with TF32 products
on a GPU and bf16 ones on a CPU. Arms run in the order of the list, while the minutes last; --out
keeps the table as trials.json, written after every arm.
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
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from trial_gradients import Curvature, curvatures, feedback, gain, stream_curvatures
from trial_inputs import DAMPING, Moments, Reference, Replay, linears_of, moved

from quantkit.ggml.formats import FORMATS
from quantkit.ggml.types import QuantType
from quantkit.gptq.select import Inputs, solve_tensor
from quantkit.gptq.solver import factorize
from quantkit.model.blockwise import (
    BlockCall,
    BlockwiseModel,
    compute_dtype,
    load_model,
    load_tokenizer,
)
from quantkit.tuning.tunable import Tunable

N_CTX = 512
ROW_DAMPINGS = (0.03, 0.1, 0.3, 1.0)  # of the mean of diag G
Packed = dict[str, tuple[QuantType, torch.Tensor]]  # by the module's name in the model


@dataclass(frozen=True)
class Arm:
    """How to choose the bytes. `share` of the difference from what the original gives is made up
    for (`fit`: as much as helps unseen tokens), with `stream` that of the residual stream, too.
    """

    disturbed: bool = True
    share: float = 0.0
    stream: bool = False
    fit: bool = False
    weighted: bool = False
    root: bool = False
    rows: bool = False
    method: str = "gptq"


ARMS = {
    "imatrix": Arm(disturbed=False, method="imatrix"),
    "gptq": Arm(disturbed=False),
    "weighted": Arm(disturbed=False, weighted=True),
    "weighted-root": Arm(disturbed=False, weighted=True, root=True),
    "rows": Arm(disturbed=False, rows=True),
    "rows-weighted": Arm(disturbed=False, rows=True, weighted=True),
    "rows-weighted-root": Arm(disturbed=False, rows=True, weighted=True, root=True),
    "disturbed": Arm(),
    "aimed-half": Arm(share=0.5),
    "aimed": Arm(share=1.0),
    "aimed-fit": Arm(share=1.0, fit=True),
    "stream-half": Arm(share=0.5, stream=True),
    "stream": Arm(share=1.0, stream=True),
    "stream-fit": Arm(share=1.0, stream=True, fit=True),
}
DEFAULT = (
    "imatrix,gptq,rows,weighted,rows-weighted,disturbed,aimed-half,aimed,stream,gptq+kl-scales,"
    "gptq+kl-codes,gptq+codes,gptq+scales,gptq+codes+kl-scales,aimed+kl-codes"
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
    gradient_tokens: int
    row_block: int  # rows solved side by side
    row_margin: float  # rows are coupled where that promises to save more than this share


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
            for name in linears_of(self.base.blocks[i])
        ]
        with torch.no_grad():
            self.reference = Reference(self.base, self.calibration, n_blocks)
            self._ends = {
                name: [self._end(self.base, ids) for ids in windows.split(settings.batch)]
                for name, windows in self.heldout.items()
            }

    def _end(self, model: BlockwiseModel, ids: torch.Tensor) -> torch.Tensor:
        """The hidden state after the last block, of the second half of the windows."""
        hidden, calls = model.trace(ids)
        for index, call in enumerate(calls):
            hidden = model.run_block(index, hidden, call)
        return hidden[:, N_CTX // 2 :]

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
            for ids, end in zip(windows.split(self.settings.batch), self._ends[name], strict=True):
                log_p = self.base.head(end).log_softmax(-1)
                log_q = self.model.head(self._end(self.model, ids)).log_softmax(-1)
                parts.append((log_p.exp() * (log_p - log_q)).sum(-1).mean(1))
            found[name] = torch.cat(parts).tolist()
        return found

    @torch.no_grad()
    def quantize(self, arm: Arm, types: dict[str, QuantType]) -> Packed:
        """The rows of every layer, block by block, groups in the order of their calls."""
        self.load({})
        packed: Packed = {}
        ours = self.reference.hidden[0]
        for index in self.blocks:
            before = self.reference.hidden[index]
            replay = Replay(self.model, index, self.reference.calls[index])
            if not arm.disturbed:
                ours = before
            behind = [b - h for b, h in zip(before, ours, strict=True)]
            for group, x in self.reference.inputs(index).items():
                y = replay.inputs(group[0], ours) if arm.disturbed else x
                moments = Moments.of(x, y, behind)
                halves = []
                if arm.fit:
                    halves = [Moments.of(x[i::2], y[i::2], behind[i::2]) for i in range(2)]
                for name in group:
                    full = f"{self.base.block_name(index)}.{name}"
                    weight = self.modules[full].weight
                    writes = len(group) == 1 and len(weight) == behind[0].shape[-1]
                    if arm.share:
                        weight = moved(weight, moments, halves, arm.share, arm.stream and writes)
                    hessian = moments.own
                    if arm.weighted:
                        found = self.curvature[full]
                        hessian = found.rooted if arm.root else found.inputs
                    solve = self._solve_rows if arm.rows else self._solve
                    packed[full] = types[full], solve(full, weight, types[full], hessian, arm)
                    if not arm.disturbed:
                        continue
                    _set_weight(replay.linears[name], _values(*packed[full]))
                    replay.settle(name, y)
                    if writes:
                        gave = [self.modules[full](each) for each in x]
                        parts = zip(behind, gave, replay.kept[name], strict=True)
                        behind = [b + g - k for b, g, k in parts]
            if arm.disturbed:
                ours = replay.outputs(ours)
        return packed

    @cached_property
    def curvature(self) -> dict[str, Curvature]:
        n = max(1, self.settings.gradient_tokens // self.calibration[0].numel())
        return curvatures(self.base, self.calibration[:n], self.names)

    def _solve_rows(
        self, name: str, weight: torch.Tensor, qtype: QuantType, hessian: torch.Tensor, arm: Arm
    ) -> torch.Tensor:
        """Rows by blocks: each makes up for the errors of those before it. Rows of a block, which
        are solved side by side, lie far apart: neighbours feel each other most. Which G and what
        damping is decided by the other half of the gradients, as is whether rows are coupled.
        """
        step, form, n_rows = self.settings.row_block, FORMATS[qtype], len(weight)
        n_blocks = -(-n_rows // step)
        order = torch.cat([torch.arange(k, n_rows, n_blocks) for k in range(n_blocks)])
        order = order.to(weight.device)
        found = self.curvature[name]
        unseen = found.outputs[1][order][:, order]
        tried, whole = [], {}
        for label, (half, other) in (("raw", found.outputs), ("capped", found.capped)):
            for damping in ROW_DAMPINGS:
                g = half[order][:, order]
                tried.append((gain(feedback(g, damping), unseen, step), damping, label))
                whole[label] = (half + other)[order][:, order]
        best, damping, label = min(tried)
        if best > 1 - self.settings.row_margin:
            return self._solve(name, weight, qtype, hessian, arm)
        upper = feedback(whole[label], damping)
        wanted, parts = weight[order], []
        for first in range(0, n_rows, step):
            own, rest = slice(first, first + step), slice(first + step, n_rows)
            parts.append(self._solve(name, wanted[own].contiguous(), qtype, hessian, arm))
            error = wanted[own] - form.values(parts[-1])
            error = torch.linalg.solve_triangular(upper[own, own].T, error, upper=False)
            wanted[rest] -= upper[own, rest].T @ error
        return torch.cat(parts)[torch.argsort(order)]

    def _solve(
        self, _: str, weight: torch.Tensor, qtype: QuantType, hessian: torch.Tensor, arm: Arm
    ) -> torch.Tensor:
        factor = factorize(hessian, DAMPING) if arm.method == "gptq" else None
        inputs = Inputs(hessian.diagonal().cpu().numpy().copy(), hessian, hessian, factor)
        solved = solve_tensor(
            weight.cpu(), [qtype], (arm.method,), inputs, None, self.settings.n_sweeps
        )
        return torch.from_numpy(solved[qtype].packed).to(self.device)

    @cached_property
    def stream_roots(self) -> list[torch.Tensor]:
        """Of every block, L with L L^T the curvature of the loss in the block's output."""
        n = max(1, self.settings.gradient_tokens // self.calibration[0].numel())
        found = []
        for c in stream_curvatures(self.base, self.calibration[:n]):
            c.diagonal().add_(0.01 * c.diagonal().mean())
            found.append(torch.linalg.cholesky(c / c.diagonal().mean()))
        return found

    def tune_blocks(self, packed: Packed, with_codes: bool, errors: str) -> Packed:
        """Every block against the original's output, its inputs being those that the tuned blocks
        before it give. `errors` count alike ("plain"), over the token's power ("relative"), by the
        gradients' mean squares ("diagonal") or by their mean outer product ("fisher").
        """
        self.load(packed)
        tuned: Packed = {}
        ours = self.reference.hidden[0]
        for index in self.blocks:
            prefix, call = self.base.block_name(index) + ".", self.reference.calls[index]
            own = {name: p for name, p in packed.items() if name.startswith(prefix)}
            rows = self._tunables(own, with_codes)
            by_gradients = errors in ("diagonal", "fisher")
            root = self.stream_roots[index] if by_gradients else None
            if root is not None and errors == "diagonal":
                root = root.square().sum(1).sqrt().diag()
            wanted = self.reference.hidden[index + 1]
            powers = [
                w.square().mean(-1, keepdim=True) if errors == "relative" else None for w in wanted
            ]
            loss = self._block_loss(index, rows, ours, wanted, powers, call, root)
            self._descend(loss, rows, self.settings.block_steps)
            linears = linears_of(self.model.blocks[index])
            with torch.no_grad():
                for name, r in rows.items():
                    tuned[name] = own[name][0], r.packed()
                    _set_weight(linears[name.removeprefix(prefix)], _values(*tuned[name]))
                ours = [self.model.run_block(index, h, call) for h in ours]
        return tuned

    def _block_loss(
        self,
        index: int,
        rows: dict[str, Tunable],
        ours: Sequence[torch.Tensor],
        wanted: Sequence[torch.Tensor],
        powers: Sequence[torch.Tensor | None],
        call: BlockCall,
        root: torch.Tensor | None,
    ) -> Callable[[int], torch.Tensor]:
        """The mean squared error of the block's output (times `root`, over `powers`), by batch."""
        block, skip = self.model.blocks[index], len(self.base.block_name(index)) + 1

        def loss(batch: int) -> torch.Tensor:
            weights = {f"{name[skip:]}.weight": r.weight() for name, r in rows.items()}
            answer = functional_call(block, weights, (ours[batch], *call.args), call.kwargs)
            answer = answer[0] if isinstance(answer, tuple) else answer
            error = answer - wanted[batch]
            squares = (error if root is None else error @ root).square()
            power = powers[batch]
            return (squares if power is None else squares / power).mean()

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
        for _ in range(n_steps):
            order = order or torch.randperm(len(self.calibration), generator=generator).tolist()
            optimizer.zero_grad(set_to_none=True)
            with _fast_products(self.device), torch.enable_grad():
                value = loss(order.pop())
            with _fast_products(self.device):
                value.backward()
            optimizer.step()
            schedule.step()


def _set_weight(layer: nn.Module, values: torch.Tensor) -> None:
    layer.get_parameter("weight").data.copy_(values)


def _values(qtype: QuantType, packed: torch.Tensor) -> torch.Tensor:
    return FORMATS[qtype].values(packed)


@contextmanager
def _fast_products(device: str) -> Iterator[None]:
    """Products for the gradients: TF32 on a GPU, bf16 on a CPU that has them."""
    if device == "cpu":
        with torch.autocast("cpu", torch.bfloat16, compute_dtype(device) != torch.float32):
            yield
        return
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "tf32"
    try:
        yield
    finally:
        setting.fp32_precision = before


def tokens_of(tokenizer: Any, path: Path, n_tokens: int) -> torch.Tensor:
    """int64 (n, N_CTX) of a text, in its order; of a run's `3-calibrate/tokens.safetensors` those
    that it calibrates on.
    """
    if path.suffix == ".safetensors":
        train = load_file(path)["train"].long()
        return train.flatten()[: n_tokens // N_CTX * N_CTX].view(-1, N_CTX)
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
    start, _, tuning = name.rpartition("+")
    if not start:
        made[name] = trial.quantize(ARMS[name], types)
        return
    if start not in made:
        run_arm(trial, start, types, made)
    with_codes = tuning.endswith("codes")
    if tuning.startswith("kl-"):
        made[name] = trial.tune_whole(made[start], with_codes)
    else:
        errors = tuning.rpartition("-")[0] or "plain"
        made[name] = trial.tune_blocks(made[start], with_codes, errors)


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
    parser.add_argument("--gradient-tokens", type=int, default=131072)
    parser.add_argument("--row-block", type=int, default=64)
    parser.add_argument("--row-margin", type=float, default=0.1)
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
        given.gradient_tokens,
        given.row_block,
        given.row_margin,
    )
    tokenizer = load_tokenizer(given.checkpoint)
    files = dict(entry.split("=", 1) for entry in given.heldout)
    heldout = {n: tokens_of(tokenizer, Path(f), given.eval_tokens) for n, f in files.items()}
    calibration = tokens_of(tokenizer, given.calibration, given.tokens)
    trial = Trial(given.checkpoint, calibration, heldout, given.device, settings)
    print(f"{calibration.numel()} tokens, {len(trial.names)} layers, torch {torch.__version__}")
    results: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(given).items()}}
    for spec in given.types.split(","):
        types = types_of(spec, trial.names)
        made: dict[str, Packed] = {}
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
