"""calibrate: text becomes tokens, and a backward pass says what output errors cost.

Writes `tokens.safetensors` (train and heldout sequences) and `calibrated.txt` (their text),
`eval/<domain>.txt` (text that nothing before validation sees), `calibration.json`,
`gradients/fisher.safetensors` and `gradients/embedding.safetensors` (the gradients' outer products
at what is looked up).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.config.calibration import shown
from quantkit.files import write_json
from quantkit.ranks.group import Ranks
from quantkit.ranks.join import Task
from quantkit.run.stage import Run, Stage, StageResult
from quantkit.sandbox.untrusted import build
from quantkit.sources.snapshot import Place, load_quantized
from quantkit.tensors import to_json

if TYPE_CHECKING:
    import torch

    from quantkit.calibration.prepare import Bar
    from quantkit.model.blockwise import BlockwiseModel
    from quantkit.statistics.fisher import Fisher
    from quantkit.statistics.hessian import HessianCollector

NAME = "calibrate"

_FISHER_TOKENS = 4096  # gradients are averaged over all positions: few tokens price a layer well


_PARTS = ("train", "heldout")


@dataclass(frozen=True)
class _Told:
    """What the other ranks are told when the stage begins."""

    model: Place
    dtype: str
    device: str
    seed: int


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _take_part(ranks: Ranks, payload: Any) -> None:
    """Do another rank's share of the stage."""
    import torch

    from quantkit.calibration.sampling import follow_writer
    from quantkit.calibration.tokenizer import Tokenizer
    from quantkit.model.streaming import open_model

    told = build(_Told, payload)
    folder = told.model.find()
    model = open_model(folder, getattr(torch, told.dtype), told.device)
    tokenizer = Tokenizer(folder)

    def write(asked: Any) -> None:
        follow_writer(ranks, model.model, tokenizer, asked)

    def fisher(_: None) -> None:
        (path,) = ranks.local([])
        _gradients(model, path, told.seed, ranks)

    ranks.follow({"write": write, "fisher": fisher})


def _gradients(
    model: BlockwiseModel, path: Path, seed: int, ranks: Ranks, bar: Bar | None = None
) -> tuple[Fisher, dict[str, HessianCollector]]:
    """The backward pass over some of the held-out tokens in the file `path`: the Fisher
    information, and the outer products of the gradients at what is looked up.
    """
    import torch
    from safetensors.numpy import load_file

    from quantkit.config import N_CTX
    from quantkit.statistics.fisher import output_fisher
    from quantkit.statistics.hessian import HessianCollector

    ids = torch.from_numpy(load_file(path)["heldout"][: max(1, _FISHER_TOKENS // N_CTX)])
    lookups = {part: HessianCollector({}) for part in _PARTS}

    def progress(done: int, total: int) -> None:
        if bar is not None:
            bar.gradients(done, total)

    return output_fisher(model, ids, seed, lookups, progress=progress, ranks=ranks), lookups


class Calibrate(Stage):
    """Take the text, and learn from gradients which outputs matter."""

    name = NAME
    version = 7
    fields = ("calibration", "profile", "seed", "device")
    takes_long = True

    def execute(self, run: Run) -> StageResult:
        """Raise QuantkitError for texts that cannot be read."""
        from safetensors.numpy import load_file

        from quantkit.calibration.prepare import Bar, write_texts
        from quantkit.calibration.tokenizer import Tokenizer
        from quantkit.config import N_CTX
        from quantkit.model.blockwise import compute_dtype
        from quantkit.model.opening import open_model
        from quantkit.statistics.stored import embedding_file, fisher_file, save_gradients

        made, ranks = run.artifacts, run.ranks
        snapshot = load_quantized(run.dir)
        dtype = compute_dtype(run.config.device)
        told = _Told(Place.of(snapshot), _name(dtype), run.config.device, run.config.seed)
        with ranks.session(NAME, to_json(told)):
            model = open_model(run, NAME, snapshot.folder, dtype, run.config.device)
            bar = Bar(run.events)
            about = write_texts(run, model, Tokenizer(snapshot.folder), bar)
            if not fisher_file(made.gradients).exists():
                with ranks.task("fisher"):
                    (path,) = ranks.local([made.tokens])
                    found = _gradients(model, path, run.config.seed, ranks, bar)
                save_gradients(made.gradients, *found)
        stored = load_file(made.tokens)
        tokens = {part: stored[part] for part in _PARTS}
        outputs = [made.tokens, made.calibrated]
        outputs += [made.eval_texts / name for name in about.eval]
        report = {
            "spec": shown(run.config.calibration),
            "note": about.note,
            "domains": about.domains,
            "languages": about.languages,
            "n_tokens": {part: int(ids.size) for part, ids in tokens.items()},
            "n_ctx": N_CTX,
            "seed": run.config.seed,
            "dtype": _name(dtype),
        }
        outputs += [
            write_json(made.calibration, report),
            embedding_file(made.gradients),
            fisher_file(made.gradients),
        ]
        return StageResult(outputs, {"n_tokens": report["n_tokens"], "note": about.note})

    @property
    def tasks(self) -> Mapping[str, Task]:
        """Return the text that the model writes, and the backward pass."""
        return {NAME: _take_part}

    def is_intermediate(self, path: str) -> bool:
        """Gradients are only needed by the quantize stage."""
        return "/gradients/" in path

    def last_reader(self, path: str) -> str:
        """Gradients are not looked at after their stage."""
        return "quantize" if self.is_intermediate(path) else "publish"
